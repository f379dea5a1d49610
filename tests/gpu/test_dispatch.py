# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs what on which GPU, by name: a kernel that suddenly refuses problems shows here, not as slowness."""

from __future__ import annotations

import pytest

from tests import cases

torch = pytest.importorskip("torch")
from tests.gpu import arrays  # noqa: E402

pytestmark = pytest.mark.gpu

HOPPER = {"float16": "prefill_sm90", "bfloat16": "prefill_sm90", "float32": "prefill_sm90_f32"}
ANY = "prefill_sm80"  # every GPU from compute capability 8.0 on has it
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
    *((cases.Case(dtype, 2, 8, 2, 1, 4096, 128), "decode_splitkv", "decode_splitkv") for dtype in cases.DTYPES),
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


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kind", cases.MASKS)
def test_every_kind_of_mask_runs_on_the_fast_kernel(kind: str, dtype: str) -> None:
    kernels = kernels_of(cases.Case(dtype, **LARGE, layout="BSHD", **cases.MASKS[kind]))
    assert kernels == ([HOPPER[dtype]] if is_hopper() else []) + [ANY]
