# SPDX-License-Identifier: Apache-2.0
"""The report: its JSON has the documented keys and types, and its tables say what a user must know."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pathlib
import re
import types
from typing import Any

import onnx_ir as ir
import rich.console
from faexport import match, pipeline
from faexport.files import model_io
from faexport.report import grouping, html_page
from faexport.report.data import (
    HalfOutput,
    HalfPrecision,
    OutputDifference,
    Report,
    SiteComparison,
    SiteReport,
    Skip,
    Verification,
    VerificationRun,
    VerificationStatus,
    count_nodes,
)
from faexport.report.terminal_view import view
from faexport.spec import Assumption, Candidate, Fact, Refusal, RefusalKind

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
    "num_sets": int, "inputs": str, "fault": str, "ok": bool, "quantization_error": (float, types.NoneType),
    "original_quantization_error": (float, types.NoneType), "any_numbers": bool,
}  # fmt: skip
SITE = {
    "name": str, "source": str, "batch_size": DIM, "num_q_heads": DIM, "num_kv_heads": DIM, "seqlen_q": DIM,
    "seqlen_kv": DIM, "head_dim": DIM, "head_dim_v": DIM, "dtype": (str, types.NoneType),
    "facts": [{"text": str, "nodes": [str], "assumed": bool}],
    "refusal": ({"reason": str, "node": str, "kind": str, "defect": bool}, types.NoneType), "fused": bool,
}  # fmt: skip
FILE = {"path": str, "bytes": int, "sha256": str}
REPORT = {
    "schema_version": int, "num_fused": int, "num_refused": int, "sites": [SITE], "nodes_before": {...: int},
    "nodes_after": {...: int}, "notes": [str], "joined": {...: int}, "defects": [str], "invalid_nodes": [str],
    "model": (str, types.NoneType), "output": (str, types.NoneType),
    "verification": ({"status": str, "reason": str,
                      "runs": [{"inputs": {...: [int]}, "outputs": [OUTPUT], "skipped": str, "label": str,
                                "skip": (str, types.NoneType), "any_numbers": bool}],
                      "sites": [COMPARISON], "notes": [str], "of_output": bool, "any_numbers": bool,
                      "lost_optimizations": str}, types.NoneType),
    "half_precision": ({"keep_io_types": bool, "kept": {...: str}, "status": str, "reason": str, "notes": [str],
                        "dtype": str,
                        "outputs": [{"name": str, "dtype": str, "max_abs_diff": (float, str), "plain_abs_diff": float,
                                     "tolerance": float, "ok": bool, "inputs": str}]}, types.NoneType),
    "float8": ({"sites": [{"name": str, "left": str, "own_factors": bool, "error": (float, types.NoneType)}],
                "outputs": [{"name": str, "error": float, "max_abs_diff": float}], "inputs": str, "status": str,
                "reason": str}, types.NoneType),
    "error": (str, types.NoneType),
    "provenance": ({"versions": {...: str}, "options": {...: (bool, str, int, types.NoneType, [str])},
                    "seconds": {...: float}, "files_read": [FILE], "files_written": [FILE]}, types.NoneType),
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
    half = HalfOutput("y", "float32", math.inf, 1e-3, 2e-3, False, "batch=1")
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
        half_precision=HalfPrecision(True, {"n": "computes positions"}, VerificationStatus.FAILED, "too far", (half,)),
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
    assert [site["dtype"] for site in data["sites"]] == ["float32", "float32"]
    assert data["num_fused"] == 2 and data["sites"][0]["head_dim"] == 16 and data["sites"][0]["num_q_heads"] == 4
    assert data["nodes_after"]["faexport::FlashAttention"] == 2 and "Softmax" not in data["nodes_after"]


def test_the_page_names_every_key() -> None:
    page = (pathlib.Path(__file__).parents[2] / "docs/faexport.md").read_text()
    for key in [*REPORT, *SITE, *OUTPUT, *COMPARISON, *FILE, "versions", "options", "seconds", "files_read"]:
        assert re.search(rf"`{key}`", page), f"docs/faexport.md does not describe {key}"


def printed(report: Report) -> str:
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    for part in view(report):
        console.print(part)
    return console.export_text()


def test_tables_say_what_happened() -> None:
    text = printed(example())
    for words in (
        "batch",
        "8/2",
        "causal",
        "fused",
        "left [2]",
        "[2] the scores [QK] are an output too",
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


def test_a_series_whose_first_name_has_no_number_is_one_row() -> None:
    names = ["sdpa_FlashAttention", *(f"sdpa_{i}_FlashAttention" for i in (1, 2)), "other_FlashAttention"]
    rows = [SiteComparison(name, "o", "float32", False, 1e-6, 1e-3, 9, "batch=2") for name in names]
    found = [name for name, _ in grouping.group_comparisons(rows)]
    assert found == ["sdpa_FlashAttention and 2 more", "other_FlashAttention"]


def test_what_to_do_is_said_once_for_each_kind_of_reason() -> None:
    refusals = [
        *(Refusal(f"the attention weights are also read by {n}", "x", RefusalKind.SCORES_READ) for n in "ab"),
        Refusal("Dropout is in training mode", "x", RefusalKind.RANDOM),
    ]
    sites = [SiteReport(f"s{refusal.reason[-1]}", "softmax_core", refusal=refusal) for refusal in refusals]
    text = " ".join(printed(Report(sites)).split())
    assert text.count("what to do: Export without it") == 1 and text.count("what to do: Call eval()") == 1
    assert "what to do" not in printed(Report([SiteReport("s", "softmax_core")]))


def test_sets_that_the_original_does_not_run_on_take_two_lines() -> None:
    """Most have no elements. What the rewritten model does not run on is listed."""
    why = "the original does not run on n={}: no elements"
    runs = [VerificationRun({}, skipped=why.format(n), label=f"n={n}", skip=Skip.ORIGINAL) for n in range(5)]
    runs += [VerificationRun({}, skipped=f"it is open, on n={n}", label="", skip=Skip.OPEN) for n in range(2)]
    found = Verification(VerificationStatus.PASSED, "", tuple(runs))
    lines = [line for line in printed(Report(verification=found)).splitlines() if "not compared" in line]
    assert lines == [
        "not compared: it is open, on n=0",
        "not compared: it is open, on n=1",
        "not compared: the original does not run on n=0: no elements",
        "not compared: 4 more sets of inputs that it does not run on (--json lists all)",
    ]


def layers() -> Report:
    """A decoder of 24 layers: 22 are fused, of two that are left each has its own reason; one has a longer window."""
    sizes = ("batch", 32, 8, "sequence", "total", 128, 128, "float16")
    sites = []
    for index in range(24):
        facts = (Fact("causal", (f"/layers.{index}/Trilu",)), Fact(f"sliding window of {512 if index == 7 else 256}"))
        name = f"/layers.{index}/Softmax"
        refusal = {
            3: Refusal("the attention weights are also an output of the model", name, RefusalKind.SCORES_READ),
            20: Refusal("Dropout is in training mode", name, RefusalKind.RANDOM),
        }.get(index)
        sites.append(SiteReport(name, "softmax_core", *sizes, () if refusal else facts, refusal=refusal))
    comparisons = [
        SiteComparison(f"/layers.{i}/MatMul_FlashAttention", "o", "float16", False, i * 1e-5, 1e-3, 20, "batch=2")
        for i in range(24)
        if i not in (3, 20)
    ]
    outputs = tuple(OutputDifference(f"present.{i}.key", "float16", (1, 2), 1e-6 * i, 1e-3, True) for i in range(24))
    runs = (VerificationRun({"ids": (2, 3)}, outputs, label="batch=2"),)
    verification = Verification(VerificationStatus.PASSED, "", runs, tuple(comparisons))
    return Report(sites, {"MatMul": 96}, {"MatMul": 52, "faexport::FlashAttention": 22}, verification=verification)


def test_equal_layers_are_one_row_of_80_columns() -> None:
    text = printed(layers())
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines() if "/Softmax" in line]
    assert [(row[0], row[1], row[-2:]) for row in rows] == [
        ("21", "/layers.0…23/Softmax", ["fused", "[1]"]),
        ("1", "/layers.3/Softmax", ["left", "[2]"]),
        ("1", "/layers.7/Softmax", ["fused", "[3]"]),
        ("1", "/layers.20/Softmax", ["left", "[4]"]),
    ]
    assert "[1] found as a Softmax between two products; proven: causal; sliding window of 256" in " ".join(
        text.split()
    )
    assert "[2] the attention weights are also an output of the model" in text
    assert text.count("present.") == 1 and "present.0…23.key" in text and "2.3e-05" in text
    assert text.count("library") == 1 and "0.00023" in text, "of equal sites the worst"


def test_every_form_that_is_found_has_words() -> None:
    pipeline.run(model_io.load(big_model.encoder(big_model.EncoderSize())))  # registers the matchers
    for entry in match.MATCHERS:
        group = grouping.Group((SiteReport("a", entry.source),))
        assert " " in group.form, entry.source


def test_what_does_not_agree_is_a_row_of_its_own() -> None:
    report = layers()
    rows = list(report.verification.sites)
    rows[5] = dataclasses.replace(rows[5], max_abs_diff=0.5, fault="differs by 0.5")
    verification = dataclasses.replace(report.verification, status=VerificationStatus.FAILED, sites=tuple(rows))
    text = printed(dataclasses.replace(report, verification=verification))
    assert text.count("library") == 2 and "0.5" in text


def test_what_is_joined_around_attention_is_no_size() -> None:
    """Rows in which no fused node takes part, a normalization's for instance, are called what they are."""
    report = layers()
    row = dataclasses.replace(report.verification.sites[0], site="", value="normalized", quantization_error=0.1)
    row = dataclasses.replace(row, original_quantization_error=0.1)
    verification = dataclasses.replace(report.verification, sites=(*report.verification.sites, row))
    report = dataclasses.replace(report, verification=verification)
    for text in (printed(report), html_page.page(report)):
        assert text.count("(around attention)") == 2 and "(sizes)" not in text


def test_what_is_assumed_is_not_called_proven() -> None:
    facts = (Assumption("masks are full"), Fact("causal"))
    text = printed(Report([SiteReport("a", "softmax_core", *[None] * 7, "float32", facts)]))
    assert "proven: causal; assumed: masks are full" in " ".join(text.split()) and "(assumed)" not in text


def test_equal_settings_are_named_once() -> None:
    report = layers()
    runs = [dataclasses.replace(report.verification.runs[0], label=f"batch={size}") for size in (2, 2, 3, 4, 5, 6, 6)]
    verification = dataclasses.replace(report.verification, runs=tuple(runs))
    text = printed(dataclasses.replace(report, verification=verification))
    assert "on 7 sets of inputs" in text
    assert "compared on: batch=2; batch=3; batch=4; batch=5; and 1 more" in " ".join(text.split())


def test_groups_keep_every_site() -> None:
    groups = grouping.group_sites(layers().sites)
    assert sorted(site.name for group in groups for site in group.sites) == sorted(s.name for s in layers().sites)
    assert len(json.loads(layers().to_json())["sites"]) == 24


def test_names_that_differ_in_more_than_numbers_are_counted() -> None:
    assert grouping.common_name(["a1b", "a2b", "a7b"]) == "a1…7b"
    assert grouping.common_name(["enc_1", "dec_1", "dec_2"]) == "enc_1 and 2 more"
    assert grouping.common_name(["x1"]) == "x1" and grouping.common_name(["1/9", "2/9"]) == "1…2/9"


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
