# SPDX-License-Identifier: Apache-2.0
"""Entries of onnxruntime's Attention whose length is 0: it rounds their scores beside -10000, and the fused node does
not. The verification tells that from a mistake."""

from __future__ import annotations

import pathlib

import faexport
import numpy as np
import onnx
import onnx.parser
import pytest
from faexport.feeds.settings import InputSet
from faexport.report.data import VerificationStatus
from faexport.runtimes import ort_session
from faexport.verify import compare, model_check, reference
from faexport.verify.side_by_side import Point
from faexport.verify.side_by_side_math import Statistics
from faexport.verify.site_check import judge

PASSED, FAILED = VerificationStatus.PASSED, VerificationStatus.FAILED
BLOCK = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
block (float[B, T, 32] x, int32[B] lengths) => (float[B, T, 32] y) {{
    w = Constant<value_floats = [{weights}]>() shape = Constant<value_ints = [32, 96]>()
    weight = Reshape(w, shape) width = Constant<value_ints = [96]>() zero = Constant<value = float[1] {{0.0}}>()
    bias = Expand(zero, width) a = com.microsoft.Attention<num_heads = 4>(x, weight, bias, lengths) {behind}
}}"""
RANDOM = np.random.default_rng(0)
WEIGHTS = ", ".join(f"{x:.4f}" for x in RANDOM.standard_normal(32 * 96) / 3)
INPUTS = {
    "x": RANDOM.standard_normal((3, 5, 32)).astype(np.float32) * 2,
    "lengths": np.array([0, 3, 5], np.int32),
}


def block(behind: str = "y = Identity(a)") -> onnx.ModelProto:
    return onnx.parser.parse_model(BLOCK.format(weights=WEIGHTS, behind=behind))


def fused_by(model: onnx.ModelProto, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Files of the model and of the fused one."""
    paths = folder / "original.onnx", folder / "fused.onnx"
    onnx.save(model, paths[0])
    fused, report = faexport.fuse(model)
    assert report.num_fused == 1
    onnx.save(fused, paths[1])
    return paths


def verified(original: pathlib.Path, rewritten: pathlib.Path) -> model_check.Verification:
    given = [InputSet("an entry without keys", INPUTS)]
    return model_check.verify(original, rewritten, extra_inputs=given, open_session=ort_session.SessionHere)


def share(original: pathlib.Path, rewritten: pathlib.Path, rows: slice) -> float:
    """How far the two are apart in these entries, of what is allowed."""
    jobs = (ort_session.Job(str(path), [INPUTS]) for path in (original, rewritten))
    want, got = (ort_session.run_here(job).outputs[0]["y"] for job in jobs)
    return compare.distance(want[rows], got[rows]) / (1e-4 * compare.magnitude(want))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("behind", ["y = Identity(a)", "y = Tanh(a)"])
def test_what_the_original_rounds_beside_its_fill_is_no_fault(behind: str, tmp_path: pathlib.Path) -> None:
    paths = fused_by(block(behind), tmp_path)
    assert share(*paths, slice(0, 1)) > 1 and share(*paths, slice(1, 3)) < 0.1
    found = verified(*paths)
    assert found.status is PASSED, found.reason


@pytest.mark.usefixtures("library")
def test_fewer_keys_in_such_an_entry_are_one(tmp_path: pathlib.Path) -> None:
    original, path = fused_by(block(), tmp_path)
    fused = onnx.load(path)
    choice = next(node for node in fused.graph.node if node.op_type == "Where")
    fused.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["two"], value_ints=[2]))
    choice.input[2] = "two"
    onnx.save(fused, path)
    found = verified(original, path)
    assert found.status is FAILED and found.sites, found.reason
    ends = model_check.verify_against(
        reference.make_reference(original, extra_inputs=[InputSet("", INPUTS)], open_session=ort_session.SessionHere),
        path,
    )
    assert ends.status is FAILED and ends.of_output


@pytest.mark.parametrize(
    ("twin_to_old", "twin_to_new", "ok"),
    [(0.01, 0.9e-4, True), (0.01, 1.1e-4, False), (0.2, 0.0, False), (0.0, 0.0, False)],
)
def test_ours_is_held_to_the_original_without_it(twin_to_old: float, twin_to_new: float, ok: bool) -> None:
    """Not where the original is so far from itself that more than a rounding is left out, nor where it could not be
    computed without."""
    numbers = dict.fromkeys(Statistics.__dataclass_fields__, 0.0) | {"magnitude": 1.0, "num_numbers": 5.0}
    found = Statistics(**numbers | {"max_abs_diff": 1e-3, "twin_to_old": twin_to_old, "twin_to_new": twin_to_new})
    point = Point("v", "site", "float32", "out", False, all_keys=True)
    assert judge(point, found, 1e-4, InputSet("", {})).ok == ok
