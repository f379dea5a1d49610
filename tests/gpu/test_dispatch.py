# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs what on which GPU, by name: a kernel that suddenly refuses problems shows here, not as slowness."""

from __future__ import annotations

import dataclasses

import pytest

from tests import cases

torch = pytest.importorskip("torch")
from tests.gpu import arrays, gradients  # noqa: E402

pytestmark = pytest.mark.gpu

HOPPER = {"float16": "prefill_sm90", "bfloat16": "prefill_sm90", "float32": "prefill_sm90_f32"}
ANY = "prefill_sm80"  # every GPU from compute capability 8.0 on has it
DECODE = {"float16": "decode_sm90", "bfloat16": "decode_sm90", "float32": "decode_splitkv"}
ANY_DECODE = "decode_splitkv"
# What each kind of problem runs on: on Hopper, and on other GPUs.
SIXTEEN_BITS = ("float16", "bfloat16")
EXPECTED = [
    *(
        (cases.Case(dtype, 2, 4, 4, 300, 300, d), HOPPER[dtype], ANY)
        for dtype in cases.DTYPES
        for d in (32, 64, 80, 256)
    ),
    *((cases.Case(dtype, 2, 4, 4, 300, 300, 33), ANY, ANY) for dtype in cases.DTYPES),
    *((cases.Case(dtype, 1, 1, 1, 300, 300, 512), "prefill_sm90_wide", ANY) for dtype in SIXTEEN_BITS),
    *((cases.Case(dtype, 2, 8, 2, 1, 4096, 128), DECODE[dtype], ANY_DECODE) for dtype in cases.DTYPES),
    *((cases.Case(dtype, 2, 8, 2, 1, 4096, 33), ANY_DECODE, ANY_DECODE) for dtype in cases.DTYPES),
    *(
        (cases.Case(dtype, 9, 8, 2, 4, 999, d), "decode_sm90", ANY_DECODE)
        for dtype in SIXTEEN_BITS
        for d in (80, 96, 192, 256)
    ),
    *((cases.Case(dtype, 3, 8, 2, 2, 999, 64, packed=True), "decode_sm90", ANY) for dtype in SIXTEEN_BITS),
]
# Too many rows for decoding, and addresses in whole steps of 16 bytes.
LARGE = {"seqlen_q": 300, "seqlen_kv": 300, "head_dim": 64}


def kernels_of(case: cases.Case) -> list[str]:
    problem = case.problem()
    inputs = {name: arrays.to_cuda(array) for name, array in problem.inputs.items()}
    return arrays.kernels_for(inputs, problem.attributes)


def is_hopper() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize(("problem", "on_hopper", "elsewhere"), EXPECTED, ids=str)
def test_the_kernel_that_is_meant_runs(problem: cases.Case, on_hopper: str, elsewhere: str) -> None:
    assert kernels_of(problem)[0] == (on_hopper if is_hopper() else elsewhere)


@pytest.mark.parametrize(("problem", "on_hopper", "elsewhere"), EXPECTED, ids=str)
def test_a_query_bias_runs_there_too(problem: cases.Case, on_hopper: str, elsewhere: str) -> None:
    """But for heads of more than 256 columns, and decoding on Hopper."""
    without = "prefill_sm80" if on_hopper == "prefill_sm90_wide" else "decode_splitkv"
    wanted = without if on_hopper in ("prefill_sm90_wide", "decode_sm90") else on_hopper
    wanted = "prefill_sm90" if problem.packed else wanted
    kernels = kernels_of(dataclasses.replace(problem, query_bias=True))
    assert kernels[0] == (wanted if is_hopper() else elsewhere)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kind", cases.MASKS)
def test_every_kind_of_mask_runs_on_the_fast_kernel(kind: str, dtype: str) -> None:
    kernels = kernels_of(cases.Case(dtype, **LARGE, layout="BSHD", **cases.MASKS[kind]))
    assert kernels == ([HOPPER[dtype]] if is_hopper() else []) + [ANY]


@pytest.mark.parametrize("kind", cases.MASKS)
def test_every_kind_of_mask_in_float8(kind: str) -> None:
    kernels = kernels_of(cases.Case("float8", **LARGE, layout="BSHD", **cases.MASKS[kind]))
    assert kernels == (["prefill_sm90_f8"] if is_hopper() else [])


FEW_ROWS = {"seqlen_q": 4, "seqlen_kv": 3000, "head_dim": 128, "num_q_heads": 8, "num_kv_heads": 2}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in cases.MASKS if not kind.startswith("packed")])
def test_every_kind_of_mask_decodes_on_the_fast_kernel(kind: str, dtype: str) -> None:
    kernels = kernels_of(cases.Case(dtype, **FEW_ROWS, layout="BSHD", **cases.MASKS[kind]))
    assert kernels[0] == (DECODE[dtype] if is_hopper() else ANY_DECODE)


@pytest.mark.parametrize("precision", ("tf32", "tf32x3"))
@pytest.mark.parametrize("head_dim", (33, 64, 128, 256))
@pytest.mark.parametrize("kind", ("none", "causal", "bias", "everything", "packed_causal"))
def test_float32_gradients_have_a_kernel(kind: str, head_dim: int, precision: str) -> None:
    case = cases.Case("float32", 2, 4, 2, 130, 150, head_dim, **cases.MASKS[kind], float32_precision=precision)
    problem = case.problem()
    inputs, arguments = gradients.arguments_of(problem)
    given = gradients.given_for(case, problem, inputs, arguments)
    taking = [name for name in gradients.KERNELS if gradients.takes(name, problem, inputs, arguments, given)]
    assert taking == ["backward_sm80"]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("head_dim", (40, 64, 96, 128, 192))
@pytest.mark.parametrize("kind", ("none", "causal", "packed", "packed_causal", "packed_outside"))
def test_gradients_run_on_the_kernel_that_is_meant(kind: str, head_dim: int, dtype: str) -> None:
    case = cases.Case(dtype, 3, 4, 2, 500, 600, head_dim, **cases.MASKS[kind])
    problem = case.problem()
    inputs, arguments = gradients.arguments_of(problem)
    given = gradients.given_for(case, problem, inputs, arguments)
    taking = [name for name in gradients.KERNELS if gradients.takes(name, problem, inputs, arguments, given)]
    fast = is_hopper() and not (case.packed and head_dim > 128)
    assert taking == (["backward_sm90", "backward_sm80"] if fast else ["backward_sm80"])
