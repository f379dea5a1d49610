# SPDX-License-Identifier: Apache-2.0
"""What happens before any model is read: help, version, completion and wrong usage come at once and say what to do."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import click
import pytest
from faexport.cli import app
from faexport.commands import terminal

from tests.export.commands import environment, faexport

# Each takes a tenth of a second or more to import; sympy, which onnx_ir imports, takes most of one.
SLOW = (
    "onnx",
    "onnx_ir",
    "sympy",
    "numpy",
    "ml_dtypes",
    "onnxscript",
    "onnxruntime",
    "google.protobuf",
    "rich.progress",
)
IMPORTED = """
import json, sys
from faexport.__main__ import main
try:
    main()
finally:
    print(json.dumps([name for name in {slow} if name in sys.modules]), file=sys.stderr)
"""
FROZEN = """
import gc
from faexport.__main__ import main
try:
    main()
finally:
    print(gc.get_freeze_count(), len(gc.get_objects()))
"""


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), ("inspect", "--help"), ("build", "--help"), ("--completion", "bash"), ("--no-such",)],
    ids=" ".join,
)
def test_nothing_slow_is_imported_before_a_command_runs(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", IMPORTED.format(slow=SLOW), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert done.returncode == (2 if arguments == ("--no-such",) else 0), done.stderr


def test_what_is_slow_is_imported_by_a_command_that_needs_it(tmp_path) -> None:
    """The test above would find it."""
    (tmp_path / "model.onnx").write_bytes(b"")
    command = [sys.executable, "-c", IMPORTED.format(slow=SLOW), "inspect", str(tmp_path / "model.onnx")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert {"onnx", "onnx_ir", "sympy", "numpy"} <= set(json.loads(done.stderr.splitlines()[-1]))


def test_the_end_of_a_command_searches_nothing_for_cycles(tmp_path) -> None:
    """The interpreter's last collection passes over what is frozen; it took a second."""
    (tmp_path / "model.onnx").write_bytes(b"")
    command = [sys.executable, "-c", FROZEN, "inspect", str(tmp_path / "model.onnx")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    frozen, left = map(int, done.stdout.split())
    assert frozen > 10_000 > left


def completions(line: str) -> set[str]:
    """What bash's script is answered for a command line with the cursor at its end: "type,value" in each line."""
    words = line.split()
    index = len(words) if line.endswith(" ") else len(words) - 1
    done = faexport(_FAEXPORT_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(index))
    assert done.stderr == ""
    return set(done.stdout.split())


def test_the_short_form_is_completed_like_the_long_one() -> None:
    assert completions("faexport --dr") == {"plain,--dry-run"}
    assert completions("faexport --ver") == {
        f"plain,--{name}" for name in ("verify", "verify-on", "verify-timeout", "version")
    }
    assert completions("faexport mod") == {"file,mod"}
    assert completions("faexport in") == {"plain,inspect", "file,in"}
    types = {f"plain,{name}" for name in ("fp16", "bf16", "fp8")}
    assert completions("faexport --dtype ") == completions("faexport m.onnx --dtype ") == types
    assert completions("faexport m.onnx -o ") == {"file,"}
    assert "plain,--strict" in completions("faexport m.onnx --")
    assert "plain,--dtype" not in completions("faexport inspect m.onnx --")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell: str) -> None:
    done = faexport("--completion", shell)
    assert done.returncode == 0 and "_FAEXPORT_COMPLETE" in done.stdout


USAGE = {
    "unknown option": (("--no-such", "x.onnx"), "--no-such"),
    "no number": (("x.onnx", "--opset", "x"), "invalid value for '--opset': 'x' is not a valid integer;"),
    "too small": (("x.onnx", "--opset", "3"), "3 is not in the range x>=7"),
    "unknown choice": (("x.onnx", "--dtype", "fp4"), "'fp4' is not one of 'fp16', 'bf16', 'fp8'"),
    "too many": (("inspect", "x.onnx", "y.onnx"), "(y.onnx)"),
    "no model": (("inspect",), "missing argument 'MODEL'"),
    "no value": (("x.onnx", "--inputs"), "'--inputs' requires an argument"),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_one_line_that_leads_on(name: str) -> None:
    arguments, words = USAGE[name]
    done = faexport(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line and "--help shows the usage" in line
    assert "Value error" not in line and "Traceback" not in line


def test_an_address_is_not_read() -> None:
    for given in ("https://example.org/model.onnx", "s3://bucket/model.onnx"):
        done = faexport(given)
        assert done.returncode == 2 and "so download the file first" in done.stderr


def test_memory_that_runs_out_is_no_defect() -> None:
    """Weights are mapped, for which the system may have no addresses left."""
    for error in (MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")):
        assert terminal.unexpected(error)[0].startswith("there is not enough memory")
        assert terminal.unexpected(error)[1] == terminal.EXIT_BAD_INPUT
    assert terminal.unexpected(OSError(errno.EIO, "no"))[1] == terminal.EXIT_INTERNAL_ERROR


def test_without_arguments_the_help_is_shown() -> None:
    done = faexport()
    assert done.returncode == 2 and done.stdout == faexport("--help").stdout and done.stderr == ""


@pytest.mark.parametrize("command", [None, *app.commands], ids=str)
def test_help_fits_80_columns_and_explains_every_option(command: str | None) -> None:
    text = faexport(*([command] if command else []), "--help", COLUMNS="80").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "<bool>" not in text and "[bold]" not in text
    assert "..." not in text.replace("[ARGS]...", "").replace("MODEL...", ""), "no sentence is cut off"
    shown = app.commands[command or "fuse"].params
    for option in (param for param in shown if isinstance(param, click.Option)):
        assert option.opts[-1] in text and option.help
