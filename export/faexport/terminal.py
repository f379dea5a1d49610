# SPDX-License-Identifier: Apache-2.0
"""What every command shares: the consoles, the progress display, and the end of a run that went wrong.

Colours and progress appear on terminals only, and not where NO_COLOR is set. Messages go to stderr, results to stdout.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

import rich.console
import rich.progress
import typer

from .model_io import ModelError

PIPE_WIDTH = 160  # columns where the output is not a terminal and COLUMNS is not set
EXIT_VERIFICATION_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERNAL_ERROR = 3
EXIT_INTERRUPTED = 130


def console(stderr: bool = False, quiet: bool = False) -> rich.console.Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return rich.console.Console(stderr=stderr, quiet=quiet, width=width, highlight=False)


def print_error(message: str) -> None:
    """One line on stderr."""
    console(stderr=True).print("error: " + " ".join(message.split()), style="red", markup=False, soft_wrap=True)


class Progress:
    """Says what is being done, with a bar where the amount is known. Invisible where stderr is not a terminal."""

    def __init__(self, bar: rich.progress.Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def step(self, text: str) -> None:
        """Starts another piece of work of unknown length."""
        self._bar.reset(self._task, total=None, description=text)

    def amount(self, done: float, total: float) -> None:
        self._bar.update(self._task, completed=done, total=total)


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """Shows a Progress while the body runs, and removes it afterwards."""
    columns = (
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    screen = console(stderr=True)
    with rich.progress.Progress(
        *columns, console=screen, transient=True, disable=quiet or not screen.is_terminal
    ) as bar:
        yield Progress(bar)


def run_app(app: Callable[[], None]) -> None:
    """Runs a typer app: bad input ends with one line and exit code 2, never with a traceback.

    Ctrl-C, SIGTERM and SIGHUP unwind what runs, so that temporary files go and child processes end.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, _interrupt)
    try:
        app()
    except ModelError as error:
        print_error(str(error))
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader went away: keep the interpreter's flush silent
        raise SystemExit(0) from None
    except Exception as error:
        if os.environ.get("FAEXPORT_TRACEBACK"):
            traceback.print_exc()
        print_error(
            f"internal error, please report it with the model: {type(error).__name__}: {error} "
            "(set FAEXPORT_TRACEBACK=1 to see where it happened)"
        )
        raise SystemExit(EXIT_INTERNAL_ERROR) from None


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class DefaultCommandGroup(typer.core.TyperGroup):
    """A group whose first command may be left out: `faexport model.onnx` is `faexport fuse model.onnx`.

    Its help shows that command's options too.
    """

    _show_default_options = False

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        own = {option for param in super().get_params(ctx) for option in param.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            self._check_is_no_misspelt_command(args[0], ctx)
            args = [self._default.name or "", *args]
        return super().parse_args(ctx, args)

    def _check_is_no_misspelt_command(self, word: str, ctx: typer.Context) -> None:
        near = difflib.get_close_matches(word, self.commands, n=1, cutoff=0.75)
        if near and not os.path.exists(word):
            ctx.fail(f"There is no file and no command '{word}'. Did you mean '{near[0]}'?")

    def get_params(self, ctx: typer.Context) -> list:
        params = super().get_params(ctx)
        if not self._show_default_options:
            return params
        names = {param.name for param in params}
        return [*(param for param in self._default.get_params(ctx) if param.name not in names), *params]

    def format_help(self, ctx: typer.Context, formatter: object) -> None:
        self._show_default_options = True
        try:
            super().format_help(ctx, formatter)  # type: ignore[arg-type]
        finally:
            self._show_default_options = False

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:
        return ["[OPTIONS] MODEL  or  COMMAND [ARGS]..."]

    @property
    def _default(self):  # of typer's private command type
        return next(iter(self.commands.values()))
