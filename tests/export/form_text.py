# SPDX-License-Identifier: Apache-2.0
"""Blocks written as ONNX text, and their comparison with what faexport makes of them at every kind of size.

Used by the test_forms_*.py files. A named size takes 1, 3, 6 and 0, each beside each of the others, so that a size
that is 1 meets one that isn't, and keys or rows are missing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import faexport
import numpy as np
import onnx
import onnx.parser
import pytest
from faexport.report.data import Report

from tests.export.compared import run

SIZES = (3, 1, 6, 0)
MAX_COMBINATIONS = 24
TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float16): 4e-3}

# The plainest block: queries of T rows, keys of S.
QKV = "float[B, 3, T, 8] q, float[B, 3, S, 8] k, float[B, 3, S, 8] v"
PRODUCT = "kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, kt)"


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """The text with pieces of it, all of which it must have, each by another."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


@dataclasses.dataclass(frozen=True)
class Form:
    """One block: its inputs, its nodes, and what is expected of it. The output is `y`."""

    inputs: str
    body: str
    facts: frozenset[str] = frozenset()  # of the fused sites
    reason: str = ""  # a part of the refusal; "" where it is to be fused
    opset: int = 17
    fused: int = 1  # how many sites are fused
    type: str = "float"  # of the output
    gone: frozenset[str] = frozenset({"Softmax"})  # op types that aren't left
    scale: float = 1.0  # of float inputs
    empty: bool = True  # sizes of 0 too (onnxruntime's Einsum crashes on them)
    output: tuple[str | int, ...] = ()  # the sizes that the file gives to the output; () where it gives none

    def model(self) -> onnx.ModelProto:
        header = f'<ir_version: 8, opset_import: ["" : {self.opset}, "com.microsoft" : 1]>'
        model = onnx.parser.parse_model(f"{header}\nblock ({self.inputs}) => ({self.type} y) {{{self.body}\n}}")
        tensor = model.graph.output[0].type.tensor_type
        tensor.ClearField("shape")  # the text says "a scalar"
        for size in self.output:
            tensor.shape.dim.add(**{"dim_param" if isinstance(size, str) else "dim_value": size})
        return model


def combinations(symbols: list[str], empty: bool) -> list[dict[str, int]]:
    """Sizes for the symbols, 0 among them where `empty`: all combinations, or a fixed choice of them."""
    whole = list(itertools.product(SIZES if empty else SIZES[:3], repeat=len(symbols)))
    if len(whole) > MAX_COMBINATIONS:
        chosen = np.random.default_rng(5).permutation(len(whole))[:MAX_COMBINATIONS]
        whole = [(3,) * len(symbols), *(whole[i] for i in sorted(chosen))]
    return [dict(zip(symbols, sizes, strict=True)) for sizes in whole]


def draw(model: onnx.ModelProto, sizes: dict[str, int], rng: np.random.Generator, scale: float = 1.0) -> dict:
    """Inputs of these sizes: numbers around 0, true in seven of ten places, small integers."""
    result = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype == np.bool_:
            result[value.name] = rng.random(shape) < 0.7
        elif np.issubdtype(dtype, np.integer):
            result[value.name] = rng.integers(0, 2, shape).astype(dtype)
        else:
            result[value.name] = np.asarray(rng.standard_normal(shape) * scale).astype(dtype)
    return result


def check(form: Form, library: str) -> Report:
    """Fuses the form, expects of the sites what it says, and compares both models wherever the original runs."""
    model = form.model()
    fused, report = faexport.fuse(model)
    refusals = [str(site.refusal) for site in report.sites if not site.fused]
    if form.reason:
        assert report.sites, "no site is listed"
        assert report.num_fused == 0 and all(form.reason in text for text in refusals), refusals
        return report
    assert report.num_fused == form.fused and not refusals, refusals
    assert form.facts <= {str(fact) for site in report.sites for fact in site.facts}, report.sites
    assert not form.gone & {node.op_type for node in fused.graph.node}
    assert compare(model, fused, library, form) > 0
    return report


def checks_of(forms: Mapping[str, Form]) -> Callable[[str, str], None]:
    """A test of each of the forms."""

    @pytest.mark.parametrize("name", forms)
    def test(name: str, library: str) -> None:
        check(forms[name], library)

    return test


def compare(model: onnx.ModelProto, fused: onnx.ModelProto, library: str, form: Form) -> int:
    """How many runs were compared. Numbers that the original has must be there; its NaN, in rows without any key, are
    documented to become 0."""
    names = dict.fromkeys(d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param)
    rng, count = np.random.default_rng(3), 0
    for sizes in combinations(list(names), form.empty):
        inputs = draw(model, sizes, rng, form.scale)
        try:
            expected = run(model, inputs)
        except Exception:  # whatever onnxruntime raises: the model doesn't take these sizes
            continue
        got = [run(fused, inputs, library)] + ([run(fused, inputs)] if fused.functions else [])
        for outputs in got:
            for want, have in zip(expected, outputs, strict=True):
                assert have.shape == want.shape, sizes
                finite = np.isfinite(want)
                tolerance = TOLERANCE[want.dtype] * max(1.0, float(np.abs(want[finite]).max(initial=0)))
                np.testing.assert_allclose(have[finite], want[finite], atol=tolerance, rtol=0, err_msg=str(sizes))
        count += 1
    return count
