# SPDX-License-Identifier: Apache-2.0
"""What every command shares: the consoles, the progress display, and the end of a run that went wrong.

Progress bars appear on terminals only, and so do colours, unless NO_COLOR is set; elsewhere a line says now and then
what is being done. Messages go to stderr, results to stdout.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import gc
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
import click.shell_completion
import rich.console

from faexport.errors import ModelError
from faexport.files.output import FULL_DISK

if TYPE_CHECKING:
    import rich.progress
    import rich.segment

PROGRAM = "faexport"
SHELLS = ("bash", "zsh", "fish")  # that completion is offered for
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
COMPLETE_VARIABLE = "_FAEXPORT_COMPLETE"  # set by the shell's script where names are to be completed
PIPE_WIDTH = 160  # columns where the output is not a terminal and COLUMNS is not set
FIRST_LINE = 15.0  # seconds of silence in front of the first line that says what is being done
MOST_BETWEEN_LINES = 60.0
EXIT_NOT_VERIFIED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERNAL_ERROR = 3
EXIT_STRICT = 4
EXIT_INTERRUPTED = 130


class _Console(rich.console.Console):
    """What would steer a terminal, as a name in a model may, is shown escaped, in tables too."""

    def render(self, *arguments: Any, **options: Any) -> Iterator[rich.segment.Segment]:
        for segment in super().render(*arguments, **options):
            if segment.control is None and not segment.text.isprintable():
                shown = "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in segment.text)
                segment = segment._replace(text=shown)
            yield segment

    def on_broken_pipe(self) -> None:
        """Leaves it to printing(): rich would end the program with exit code 1."""
        raise BrokenPipeError


def console(stderr: bool = False) -> rich.console.Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return _Console(stderr=stderr, width=width, highlight=False)


def print_error(message: str) -> None:
    """One line on stderr."""
    _print_line(f"error: {message}", "red")


def _print_line(text: str, style: str | None = None) -> None:
    with contextlib.suppress(OSError):
        console(stderr=True).print(" ".join(text.split()), style=style, markup=False, soft_wrap=True)


class Progress:
    """Says what is being done, with a bar where the amount is known. Where stderr is not a terminal, what finished() is
    told is seen, unless `quiet`, and a line now and then."""

    def __init__(self, bar: rich.progress.Progress, quiet: bool = False) -> None:
        self._bar = bar
        self._prints = bar.disable and not quiet
        self._task = bar.add_task("", total=None)

    def step(self, text: str) -> None:
        """Starts another piece of work of unknown length."""
        self._bar.reset(self._task, total=None, description=text)

    def amount(self, done: float, total: float) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def finished(self, text: str) -> None:
        """One of several parts is done, which on a terminal the next step() shows."""
        if self._prints:
            _print_line(text)


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """Shows a Progress while the body runs, and removes it afterwards."""
    import rich.progress

    columns = (
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    screen = console(stderr=True)
    bar = rich.progress.Progress(*columns, console=screen, transient=True, disable=quiet or not screen.is_terminal)
    with shown(bar, quiet):
        yield Progress(bar, quiet)


def shown(bar: rich.progress.Progress, quiet: bool) -> contextlib.AbstractContextManager[object]:
    """Shows the bars while a `with` statement runs. Where they are disabled a line says now and then what they would,
    unless `quiet`. NOTE: rich before 15 prints an empty line at the end of a display that is disabled, so that one is
    not begun."""
    if not bar.disable:
        return bar
    return contextlib.nullcontext() if quiet else _telling_now_and_then(bar)


@contextlib.contextmanager
def _telling_now_and_then(bar: rich.progress.Progress) -> Iterator[None]:
    """Long work in a log or a pipe: a line on stderr, ever more seldom, so that it is seen to go on."""
    ended, start = threading.Event(), time.monotonic()

    def tell() -> None:
        wait = FIRST_LINE
        while not ended.wait(wait):
            what = ", ".join(_in_words(task) for task in bar.tasks if task.description)
            _print_line(f"{what or 'working'}: {time.monotonic() - start:.0f} s since the start")
            wait = min(2 * wait, MOST_BETWEEN_LINES)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _in_words(task: rich.progress.Task) -> str:
    done = f" ({task.percentage:.0f} %)" if task.total else ""
    return f"{task.description.strip()}{done}"


def run_app(app: Callable[..., object]) -> None:
    """Runs the command line: bad input ends with one line and exit code 2, never with a traceback.

    Ctrl-C, SIGTERM and SIGHUP unwind what runs, so that temporary files go and child processes end.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, _interrupt)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that the terminal's encoding lacks are shown escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False, prog_name=PROGRAM, complete_var=COMPLETE_VARIABLE)
    except ModelError as error:
        print_error(str(error))
        code = EXIT_BAD_INPUT
    except click.ClickException as error:
        print_error(_usage_error(error))
        code = EXIT_BAD_INPUT
    except (KeyboardInterrupt, Interrupted, click.Abort):
        code = EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get("FAEXPORT_TRACEBACK"):
            traceback.print_exc()
        _give_up_unwritten()
        sentence, code = unexpected(error)
        print_error(sentence)
    # The interpreter's last search for cycles would go through SymPy and the model: a second after the last line.
    gc.freeze()
    raise SystemExit(code or 0)


def _open_closed_streams() -> None:
    """Streams that the caller closed (>&-) lead nowhere. Else files that are opened later would take their numbers, to
    which native code prints."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # takes the lowest number that is free: the stream's


def unexpected(error: Exception) -> tuple[str, int]:
    """The sentence about an error that nobody raised on purpose, and the exit code: memory that ran out, also that of
    addresses, in which weights are mapped, a full disk, perhaps behind stdout, or a defect of ours."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "there is not enough memory for this model; free some, or run where there is more", EXIT_BAD_INPUT
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        place = f"{error.filename} " if error.filename else ""
        return f"{place}cannot be written: {error.strerror}; free some space".strip(), EXIT_BAD_INPUT
    sentence = (
        f"internal error, please report it with the model: {type(error).__name__}: {error} "
        "(set FAEXPORT_TRACEBACK=1 to see where it happened)"
    )
    return sentence, EXIT_INTERNAL_ERROR


def _usage_error(error: click.ClickException) -> str:
    """click's message in a line of ours."""
    text = " ".join(error.format_message().split()).removesuffix(".")
    text = text.replace("valid integer range", "valid integer").replace(". (Did", " (did")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else PROGRAM
    return f"{text[:1].lower()}{text[1:]}; {command} --help shows the usage"


def errors_as_json(command: Callable[..., None]) -> Callable[..., None]:
    """A command that ends in {"error": …} on bad input where JSON was asked for. fuse and inspect have a report that
    says it."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, as_json: bool, **options: Any) -> None:
        try:
            command(*arguments, as_json=as_json, **options)
        except ModelError as error:
            if as_json:
                with printing():
                    click.echo(json.dumps({"error": str(error)}, indent=2))
            raise

    return wrapped


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Around the printing of results: that the reader went away is no error, that the disk is full is one."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _give_up_unwritten()
    except OSError as error:
        _give_up_unwritten()
        raise ModelError(f"the result can't be printed: {error.strerror or error}") from error


def _give_up_unwritten() -> None:
    """What is still buffered for stdout is written, or if it can't be, given up: the interpreter would try once more
    when it ends, print what went wrong, and end with exit code 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class Interrupted(BaseException):
    """KeyboardInterrupt on its way through click, which would print an empty line for it."""


class DefaultCommandGroup(click.Group):
    """A group whose first command may be left out: `faexport model.onnx` is `faexport fuse model.onnx`.

    Its help and its completion show that command's options too.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit(EXIT_BAD_INPUT)
        own = {option for param in self.get_params(ctx) for option in param.opts}
        if args and args[0] not in self.commands and args[0].partition("=")[0] not in own:
            if not ctx.resilient_parsing:
                self._check_is_no_misspelt_command(args[0], ctx)
            args = [self._default.name or "", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted from error

    def _check_is_no_misspelt_command(self, word: str, ctx: click.Context) -> None:
        options = {option.removeprefix("--"): option for option in ("--help", "--version")}
        near = difflib.get_close_matches(word, [*self.commands, *options], n=1, cutoff=0.75)
        if near and not os.path.exists(word):
            meant = options.get(near[0], near[0])
            ctx.fail(f"there is no file and no command '{word}' (did you mean '{meant}'?)")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = {param.name for param in self._default.params}
        params = [*self._default.params, *(param for param in self.get_params(ctx) if param.name not in names)]
        options = [param for param in params if isinstance(param, click.Option)]
        records = [record for option in options if (record := option.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl(records)
        self.format_commands(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[click.shell_completion.CompletionItem]:
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            given = {item.value for item in found}
            return [*found, *(i for i in self._default.shell_complete(ctx, incomplete) if i.value not in given)]
        return [*found, click.shell_completion.CompletionItem(incomplete, type="file")]

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTIONS] MODEL...  or  COMMAND [ARGS]..."]

    @property
    def _default(self) -> click.Command:
        return next(iter(self.commands.values()))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # as they were added, not by the alphabet


def show_completion(context: click.Context, option: click.Parameter, shell: str | None) -> None:
    """Callback of --completion: prints the shell's script and ends the program."""
    if shell is None or context.resilient_parsing:
        return
    kind: Any = click.shell_completion.get_completion_class(shell)
    click.echo(kind(context.command, {}, PROGRAM, COMPLETE_VARIABLE).source())
    context.exit()
