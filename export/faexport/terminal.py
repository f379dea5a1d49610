# SPDX-License-Identifier: Apache-2.0
"""What every command shares: the consoles, the progress display, and the end of a run that went wrong.

Colours and progress appear on terminals only, and not where NO_COLOR is set. Messages go to stderr, results to stdout.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

import rich.console
import rich.progress
import typer

from .errors import ModelError

PROGRAM = "faexport"
USAGE_ERROR = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
PIPE_WIDTH = 160  # columns where the output is not a terminal and COLUMNS is not set
EXIT_NOT_VERIFIED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERNAL_ERROR = 3
EXIT_STRICT = 4
EXIT_INTERRUPTED = 130


class _Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Leaves it to printing(): rich would end the program with exit code 1."""
        raise BrokenPipeError


def console(stderr: bool = False, quiet: bool = False) -> rich.console.Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return _Console(stderr=stderr, quiet=quiet, width=width, highlight=False)


def print_error(message: str) -> None:
    """One line on stderr; what would steer a terminal is shown escaped."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    with contextlib.suppress(OSError):
        console(stderr=True).print(f"error: {line}", style="red", markup=False, soft_wrap=True)


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


def run_app(app: Callable[..., object]) -> None:
    """Runs a typer app: bad input ends with one line and exit code 2, never with a traceback.

    Ctrl-C, SIGTERM and SIGHUP unwind what runs, so that temporary files go and child processes end.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that the terminal's encoding lacks are shown escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False, prog_name=PROGRAM)
    except ModelError as error:
        print_error(str(error))
        code = EXIT_BAD_INPUT
    except USAGE_ERROR as error:
        if str(error):  # empty where no argument was given: then the help was shown
            print_error(_usage_error(error))
        code = EXIT_BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except MemoryError:
        print_error("there is not enough memory for this model; free some, or run where there is more")
        code = EXIT_BAD_INPUT
    except Exception as error:
        if os.environ.get("FAEXPORT_TRACEBACK"):
            traceback.print_exc()
        print_error(internal_error(error))
        code = EXIT_INTERNAL_ERROR
    raise SystemExit(code or 0)


def internal_error(error: Exception) -> str:
    """The sentence about a defect of ours."""
    return (
        f"internal error, please report it with the model: {type(error).__name__}: {error} "
        "(set FAEXPORT_TRACEBACK=1 to see where it happened)"
    )


def _usage_error(error: Exception) -> str:
    """typer's message in a line of ours, without the words of the library that checks the types."""
    text = " ".join(error.format_message().split()).removesuffix(".")  # type: ignore[attr-defined]
    text = text.replace("Value error, ", "").replace("Input should be", "it must be")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else PROGRAM
    return f"{text[:1].lower()}{text[1:]}; {command} --help shows the usage"


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Around the printing of results: that the reader went away is no error, that the disk is full is one."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered goes nowhere, so that the interpreter's own flush is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ModelError(f"the result can't be printed: {error.strerror or error}") from error


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
            ctx.fail(f"there is no file and no command '{word}' (Did you mean '{near[0]}'?)")

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
