# SPDX-License-Identifier: Apache-2.0
"""faexport as a library: optimize(), what its errors say, and what its report shows in an interpreter."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import faexport
import onnx
import pytest
from faexport.options import as_in_python

from tests.export import commands
from tests.export.mutations import MODELS

PACKAGE = pathlib.Path(faexport.__file__).parent
ONLY_TYPED = ("commands", "cli.py", "runtimes/engine.py", "runtimes/triton.py", "report/html_page.py")


@pytest.mark.parametrize(
    ("out", "arguments", "sentence"),
    [
        ("model.onnx", {}, "would overwrite the input; choose another name with out"),
        ("no/x.onnx", {}, "the folder .*no does not exist; create it or choose another place with out"),
        ("no/", {}, "this folder does not exist; create it or choose another place with out"),
        (None, {"options": faexport.Options(opset=99)}, "opset 99 is newer .*; choose another opset, or leave it out"),
        (None, {"timeout": 1e-9}, r"timeout=SECONDS allows more; .* \(verify=False would write it without"),
    ],
)
def test_errors_name_arguments(out: str | None, arguments: Any, sentence: str, tmp_path: pathlib.Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes((MODELS / "vit.onnx").read_bytes())
    place = f"{tmp_path}/{out}" if out else None
    with pytest.raises((faexport.ModelError, faexport.NotVerifiedError), match=sentence) as raised:
        faexport.optimize(model, place, **arguments)
    assert not re.search(r"(^|\s|\()-", str(raised.value))
    report = getattr(raised.value, "report", None)
    assert report is None or report.error == str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("typed", "spelled"),
    [
        ("(--no-verify would write it)", "(verify=False would write it)"),
        ("choose another place with -o", "choose another place with out"),
        ("--dtype fp8 measures", "dtype=DataType.FLOAT8E4M3FN measures"),
        ("give inputs with --inputs file.npz", 'give inputs with inputs="file.npz"'),
        ("(--assume full-rows rules them out)", "(assume_full_rows=True rules them out)"),
        ("--opset 18 converts it", "opset=18 converts it"),
        ("a-o --- of 3 - 1 and x--y, /tmp/--no-verify", "a-o --- of 3 - 1 and x--y, /tmp/--no-verify"),
    ],
)
def test_options_spelled_as_in_python(typed: str, spelled: str) -> None:
    assert as_in_python(typed) == spelled


def messages() -> Iterator[str]:
    """The package's strings that name an option, but for those that only the command line prints, and docstrings."""
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix().startswith(ONLY_TYPED):
            continue
        tree = ast.parse(path.read_text("utf-8"))
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
                yield from re.findall(r"(?<![^\s(])(?:--assume [a-z-]+|--[a-z][\w-]*|-o\b)", node.value)


def test_what_messages_name_is_there_in_python() -> None:
    known = {*inspect.signature(faexport.optimize).parameters}
    known |= {field.name for field in dataclasses.fields(faexport.Options)}
    named = {as_in_python(text).partition("=")[0] for text in messages()}
    # What the terminal alone prints, of the report's JSON and of its pages.
    assert {"out", "verify", "assume_full_rows", "opset"} <= named <= known | {"json", "report", "html", "svg"}, named


def test_arguments_of_wrong_types() -> None:
    for model in (onnx.ModelProto(), None, 3):
        with pytest.raises(TypeError, match=r"expected a path \(fuse\(\) takes a model in memory\)"):
            faexport.optimize(model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"options is of type dict; expected faexport\.Options"):
        faexport.optimize("model.onnx", options={"fp16": True})  # type: ignore[arg-type]
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="expected seconds, more than 0"):
            faexport.optimize("model.onnx", timeout=seconds)
    with pytest.raises(ValueError, match="opset is '17'; expected a number"):
        faexport.Options(opset="17")  # type: ignore[arg-type]


def test_a_report_in_an_interpreter(tmp_path: pathlib.Path) -> None:
    report = faexport.optimize(MODELS / "vit.onnx", tmp_path)  # into a folder that is there
    assert report.output == str(tmp_path / "vit.onnx")
    said = f"{report.model}: 1 of 1 attention sites fused; verification passed; wrote {report.output}"
    assert repr(report) == f"<faexport.Report of {said}>"
    assert str(report).splitlines()[0] == said
    assert all(line.startswith("note: ") for line in str(report).splitlines()[1:])
    assert len(repr(report.verification)) < 1000
    assert commands.here("inspect", report.output).returncode == 0


def test_a_report_names_what_is_left() -> None:
    softmax = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2, 4, 8] x, float[2, 8, 8] k, float[2, 8, 4] v) => (float[2, 4, 4] y, float[2, 4, 8] p) {
            s = MatMul(x, k)
            p = Softmax(s)
            y = MatMul(p, v)
        }"""
    )
    _, report = faexport.fuse(softmax)
    assert repr(report) == "<faexport.Report of a model in memory: 0 of 1 attention sites fused>"
    assert re.search(r"^left as it is: '.*': .*attention weights are also an output", str(report), re.MULTILINE)
