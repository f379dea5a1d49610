# SPDX-License-Identifier: Apache-2.0
"""The command line: `faexport model.onnx` and the other commands, which are in commands/.

Exit codes: 0 done (also where nothing is to fuse), 1 not verified and nothing was written, 2 bad input, 3 internal
error, 4 with --strict where a site is left or nothing was fused. What does the work is imported when a command runs, so
that help, completion and wrong usage don't wait for it.
"""

from __future__ import annotations

import click

from faexport.commands import bench, build, deploy, fuse, inspect, terminal
from faexport.commands.help_texts import EXAMPLES, SUMMARY


def _show_version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from faexport.version import version

        click.echo(f"faexport {version()}")
        context.exit()


@click.group(
    cls=terminal.DefaultCommandGroup,
    help=SUMMARY,
    epilog=EXAMPLES,
    context_settings=terminal.CONTEXT_SETTINGS,
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Print the version and exit.",
)
@click.option(
    "--completion",
    type=click.Choice(terminal.SHELLS),
    metavar="SHELL",
    is_eager=True,
    expose_value=False,
    callback=terminal.show_completion,
    help="Print a script that makes this shell (bash, zsh, fish) complete names and options.",
)
def app() -> None:
    pass  # the help is SUMMARY


for command in (fuse.fuse, inspect.inspect, bench.bench, deploy.deploy, build.build, build.run):
    app.add_command(command)


def main() -> None:
    """Runs the command line; called by __main__.py."""
    terminal.run_app(app)
