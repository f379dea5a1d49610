# SPDX-License-Identifier: Apache-2.0
"""The report: its JSON has the documented keys and types, and its tables say what a user must know."""

from __future__ import annotations

import json
import math
import pathlib
import re
import types
from typing import Any

import onnx_ir as ir
import rich.console
from faexport import model_io, pipeline
from faexport.report import (
    OutputDifference,
    Report,
    SiteComparison,
    SiteReport,
    Verification,
    VerificationRun,
    VerificationStatus,
    count_nodes,
)
from faexport.spec import Candidate, Fact, Refusal

from tests.export import big_model

DIM = (int, str, types.NoneType)
OUTPUT = {
    "name": str,
    "dtype": str,
    "shape": [int],
    "max_abs_diff": (float, str),
    "tolerance": float,
    "ok": bool,
    "num_lost": int,
}
COMPARISON = {
    "site": str, "value": str, "dtype": str, "by_stand_in": bool, "max_abs_diff": (float, str), "tolerance": float,
    "num_sets": int, "inputs": str, "fault": str, "ok": bool,
}  # fmt: skip
SITE = {
    "name": str, "source": str, "batch_size": DIM, "num_q_heads": DIM, "num_kv_heads": DIM, "seqlen_q": DIM,
    "seqlen_kv": DIM, "head_dim": DIM, "head_dim_v": DIM, "dtype": (str, types.NoneType),
    "facts": [{"text": str, "nodes": [str]}],
    "refusal": ({"reason": str, "node": str, "defect": bool}, types.NoneType), "fused": bool,
}  # fmt: skip
REPORT = {
    "schema_version": int, "num_fused": int, "num_refused": int, "sites": [SITE], "nodes_before": {...: int},
    "nodes_after": {...: int}, "notes": [str], "defects": [str],
    "model": (str, types.NoneType), "output": (str, types.NoneType),
    "verification": ({"status": str, "reason": str,
                      "runs": [{"inputs": {...: [int]}, "outputs": [OUTPUT], "skipped": str, "label": str}],
                      "sites": [COMPARISON], "notes": [str]}, types.NoneType),
    "error": (str, types.NoneType),
}  # fmt: skip


def conforms(data: Any, shape: Any) -> bool:
    """Does parsed JSON have this shape? (x, y): either; [x]: a list; {...: x}: any keys; another dict: these keys."""
    if isinstance(shape, tuple):
        return any(conforms(data, option) for option in shape)
    if isinstance(shape, list):
        return isinstance(data, list) and all(conforms(item, shape[0]) for item in data)
    if isinstance(shape, dict) and ... in shape:
        return isinstance(data, dict) and all(conforms(item, shape[...]) for item in data.values())
    if isinstance(shape, dict):
        return (
            isinstance(data, dict) and data.keys() == shape.keys() and all(conforms(data[k], shape[k]) for k in shape)
        )
    return type(data) is shape


def example() -> Report:
    """One site fused, one refused, one comparison that failed beyond all numbers."""
    difference = OutputDifference("y", "float32", (2, 3), math.inf, 1e-4, False)
    comparison = SiteComparison("a_FlashAttention", "o", "float32", False, 2.5, 1e-4, 7, "batch=1", "differs by 2.5")
    runs = (VerificationRun({"x": (2, 3)}, (difference,), label="batch=2"),)
    return Report(
        [
            SiteReport(
                "a", "softmax_core", "batch", 8, 2, "s", "s", 64, 64, "float16", (Fact("causal", ("n1", "n2")),)
            ),
            SiteReport("b", "softmax_core", refusal=Refusal("the scores [QK] are an output too", "b")),
        ],
        {"Softmax": 2, "MatMul": 4},
        {"Softmax": 1, "MatMul": 2, "faexport::FlashAttention": 1},
        ["a note"],
        verification=Verification(VerificationStatus.FAILED, "why", runs, (comparison,), ("what was not compared",)),
    )


def test_json_has_the_documented_keys() -> None:
    data = json.loads(example().to_json())
    assert conforms(data, REPORT)
    assert data["verification"]["runs"][0]["outputs"][0]["max_abs_diff"] == "inf", "JSON has no infinity"
    assert not conforms(data | {"extra": 1}, REPORT), "the check itself can fail"


def test_json_of_a_real_run_conforms() -> None:
    _, report = pipeline.run(model_io.load(big_model.encoder(big_model.EncoderSize())))
    data = json.loads(report.to_json())
    assert conforms(data, REPORT)
    assert data["num_fused"] == 2 and data["sites"][0]["head_dim"] == 16 and data["sites"][0]["num_q_heads"] == 4
    assert data["nodes_after"]["faexport::FlashAttention"] == 2 and "Softmax" not in data["nodes_after"]


def test_the_page_names_every_key() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs/faexport.md").read_text()
    for key in [*REPORT, *SITE, *OUTPUT, *COMPARISON]:
        assert re.search(rf"`{key}`", page), f"docs/faexport.md does not describe {key}"


def test_tables_say_what_happened() -> None:
    console = rich.console.Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(example())
    text = console.export_text()
    for words in (
        "batch",
        "8/2",
        "causal",
        "fused",
        "left: the scores [QK] are an output too",
        "a note",
        "why",
        "a_FlashAttention",
        "library",
        "2.5",
        "batch=2",
        "what was not compared",
        "-1",
        "+1",
    ):
        assert words in text, words
    assert "(b)" not in text, "the node is not repeated where it is the site itself"


def test_nodes_of_bodies_and_functions_count() -> None:
    body = ir.Graph([], [], nodes=[ir.node("Relu", [])], name="body")
    branch = ir.node("If", [], attributes={"then_branch": body, "else_branch": ir.Graph([], [], nodes=[], name="e")})
    function = ir.Function("f", "F", graph=ir.Graph([], [], nodes=[ir.node("Relu", [])]), attributes=[])
    model = ir.Model(
        ir.Graph([], [], nodes=[branch, ir.node("Op", [], domain="d")], name="g"), ir_version=9, functions=[function]
    )
    assert count_nodes(model) == {"If": 1, "Relu": 2, "d::Op": 1}


def test_a_candidate_without_an_outcome_is_not_called_fused() -> None:
    node = ir.node("Softmax", [ir.Value(name="s", shape=ir.Shape(["b", 8, 4, 6]))], name="soft")
    site = SiteReport.from_candidate(Candidate(node, ir.Graph([], [], nodes=[node]), "softmax_core"))
    assert not site.fused and (site.batch_size, site.num_q_heads, site.seqlen_q, site.seqlen_kv) == ("b", 8, 4, 6)
