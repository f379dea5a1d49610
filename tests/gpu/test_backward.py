# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel of the backward pass against float64 on all cases: right, written everywhere and nowhere else, and
the same bits each time."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from tests import cases, reference_backward
from tests.problems import Case, Problem

torch = pytest.importorskip("torch")
import faplugin  # noqa: E402

from tests.gpu import arrays  # noqa: E402
from tests.gpu import gradients as on_gpu  # noqa: E402
from tests.gpu.test_dispatch import is_hopper  # noqa: E402

pytestmark = pytest.mark.gpu

WIDEST = 256  # head_dim with gradients on GPUs


def check(case: Case, expected: reference_backward.Expectation) -> None:
    """All kernels that take the problem, each twice."""
    problem = case.problem()
    inputs, arguments = on_gpu.arguments_of(problem)
    given = on_gpu.given_for(case, problem, inputs, arguments)
    took = []
    for kernel in on_gpu.KERNELS:
        first = on_gpu.takes(kernel, problem, inputs, arguments, given)
        if first is None:
            continue
        took.append(kernel)
        found = on_gpu.by_reference_names(problem, first)
        try:
            reference_backward.check(found, problem, *reference_backward.draw(case, problem), expected)
        except AssertionError as error:
            raise AssertionError(f"{kernel}: {error}") from None
        second = on_gpu.gradients(problem, inputs, arguments, given, kernel)
        for name in first:
            assert arrays.same_bits(first[name], second[name]), f"{kernel}: d_{name} differs between two runs"
    assert took or max(case.head_dim, case.dim_v) > WIDEST, "no kernel takes the problem"


# Many tiles of rows and of keys, and more thread blocks than a GPU has room for.
LARGE = [
    Case("bfloat16", 2, 8, 8, 2100, 2100, 64, is_causal=True),
    Case("float16", 1, 6, 2, 1513, 2300, 128, layout="BSHD", is_causal=True, window_left=300, alignment="bottom_right"),
    Case("bfloat16", 2, 3, 1, 900, 1515, 80, 96, layout="BSH", mask="B11K", bias="1HQK"),
    Case("float16", 3, 4, 2, 700, 1500, 256, is_causal=True, alignment="bottom_right"),
    Case("bfloat16", 9, 4, 2, 500, 600, 128, packed=True, is_causal=True, alignment="bottom_right"),
    Case("float16", 2, 4, 1, 600, 700, 48, softcap=5.0, bias="B1QK", kv_lengths=True, query_lengths=True, sinks=True),
    Case("bfloat16", 2, 16, 16, 1024, 1024, 32, kv_lengths=True),
    Case("bfloat16", 40, 8, 8, 100, 300, 64, kv_lengths=True),
    Case("float16", 40, 8, 4, 200, 333, 64, layout="BSHD", is_causal=True, alignment="bottom_right"),
    Case("float32", 2, 8, 8, 1100, 1100, 64, is_causal=True),
    Case("float32", 1, 6, 2, 1513, 1300, 128, layout="BSHD", is_causal=True, window_left=300, alignment="bottom_right"),
    Case("float32", 2, 3, 1, 900, 1515, 80, 96, layout="BSH", mask="B11K", bias="1HQK"),
    Case("float32", 3, 4, 2, 300, 700, 256, is_causal=True, alignment="bottom_right"),
    Case("float32", 9, 4, 2, 500, 600, 128, packed=True, is_causal=True, alignment="bottom_right"),
    Case("float32", 2, 8, 8, 1100, 1100, 64, is_causal=True, float32_precision="tf32"),
    Case("float32", 2, 4, 2, 1100, 900, 128, kv_lengths=True, float32_precision="tf32"),
    Case("float32", 2, 4, 2, 1100, 900, 128, float32_precision="tf32"),
    Case("float32", 2, 3, 1, 500, 700, 256),
    Case("float32", 2, 4, 2, 300, 333, 200, layout="BSH", query_lengths=True, window_left=90),
]

# So many rows that backward_sm90 takes tiles of 80: partly empty, whole, and of heads that are padded.
MANY_ROWS = [
    Case("bfloat16", 2, 4, 2, 2100, 1300, 128, kv_lengths=True),
    Case("float16", 2, 4, 4, 2080, 520, 104, 88),
    Case("float16", 1, 2, 2, 4190, 4190, 96, layout="BSHD", is_causal=True),
    Case("bfloat16", 1, 2, 1, 4200, 4300, 128, is_causal=True, window_left=2070, alignment="bottom_right"),
]

# Biases that the copy engine brings: each way to share one, ends inside tiles, keys that lengths and windows hide.
BIASED = [
    Case("bfloat16", 3, 4, 2, 300, 520, 64, bias="1HQK", is_causal=True, alignment="bottom_right"),
    Case("float16", 2, 6, 2, 700, 1104, 128, layout="BSHD", bias="B1QK", kv_lengths=True),
    Case("bfloat16", 5, 4, 4, 257, 264, 40, bias="11QK", window_left=70, window_right=30),
    Case("float16", 2, 3, 1, 130, 1024, 96, 64, layout="BSH", bias="BHQK"),
    Case("bfloat16", 5, 8, 8, 600, 640, 64, bias="1HQK"),
    Case("float16", 3, 8, 8, 500, 512, 128, bias="1HQK", kv_lengths=True, is_causal=True),
    Case("float16", 2, 4, 2, 200, 200, 64, bias="B1QK", bias_values="inf", empty=True),
    Case("bfloat16", 2, 4, 2, 200, 200, 128, bias="B1QK", bias_values="min", empty=True),
    Case("bfloat16", 2, 4, 2, 304, 304, 64, layout="QKV", bias="QK", is_causal=True),
]

# Packed sequences of many lengths; around some of them are rows and keys of no sequence.
PACKED = [
    Case("bfloat16", 5, 4, 2, 700, 900, 64, packed=True, outside=True),
    Case("float16", 5, 4, 2, 700, 900, 128, packed=True, outside=True, window_left=60, window_right=0),
    Case("float16", 40, 8, 8, 150, 300, 64, 40, packed=True, is_causal=True, alignment="bottom_right"),
    Case("bfloat16", 40, 8, 2, 150, 300, 96, 128, layout="BSHD", packed=True, outside=True, window_left=100),
    Case("float16", 4, 2, 1, 900, 200, 256, layout="BSHD", packed=True, outside=True, is_causal=True),
]


@pytest.mark.parametrize(
    "case",
    [*LARGE, *PACKED, *MANY_ROWS, *BIASED, *filter(cases.has_gradients, [*cases.full(), *cases.empty()])],
    ids=str,
)
def test_case(case: Case, expected_gradients) -> None:
    check(case, expected_gradients(case))


def with_starts(case: Case, starts: dict[str, list[int]]) -> Problem:
    """The case's problem with these starts of its packed sequences."""
    problem = case.problem()
    arrays_of_starts = {f"cu_seqlens_{name}": np.array(found, np.int32) for name, found in starts.items()}
    return dataclasses.replace(problem, inputs=problem.inputs | arrays_of_starts)


def gradients_of(case: Case, problem: Problem, kernel: str) -> dict[str, torch.Tensor] | None:
    inputs, arguments = on_gpu.arguments_of(problem)
    return on_gpu.takes(kernel, problem, inputs, arguments, on_gpu.given_for(case, problem, inputs, arguments))


@pytest.mark.parametrize("kernel", on_gpu.KERNELS)
@pytest.mark.parametrize("dtype", ("float16", "float32"))
def test_without_sequences_all_gradients_are_zero(dtype: str, kernel: str) -> None:
    case = Case(dtype, 1, 4, 2, 300, 300, 64, packed=True)
    found = gradients_of(case, with_starts(case, {"q": [0], "kv": [0]}), kernel)
    assert found is not None or kernel == "backward_sm90"
    assert all((gradient == 0).all() for gradient in (found or {}).values())


@pytest.mark.parametrize("kernel", on_gpu.KERNELS)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("fields", ({}, {"is_causal": True}, {"window_left": 200, "window_right": 30}), ids=str)
@pytest.mark.parametrize(
    "starts",
    (
        {"q": [0, 300, 0, 300], "kv": [0, 1000, 0, 1000]},
        {"q": [0, 100, 200, 300], "kv": [0, 1000, 0, 1000]},
        {"q": [0, 300, 0, 300], "kv": [0, 400, 700, 1000]},
        {"q": [290, -7, 5000, 20], "kv": [990, -7, 5000, 20]},
    ),
    ids=str,
)
def test_starts_that_fall_write_nothing_beside_and_come_to_an_end(
    starts: dict, fields: dict, head_dim: int, kernel: str
) -> None:
    """Of such sequences any gradients will do. Blocks of one must not wait for tiles of keys that another has taken."""
    case = Case("float16", 1, 2, 1, 300, 1000, head_dim, packed=True, **fields)
    found = gradients_of(case, with_starts(case, starts), kernel)
    assert found is not None or not is_hopper()


def refusal_by_hopper(case: Case) -> str | None:
    """None where backward_sm90 takes the case."""
    problem = case.problem()
    inputs, arguments = on_gpu.arguments_of(problem)
    given = on_gpu.given_for(case, problem, inputs, arguments)
    try:
        on_gpu.gradients(problem, inputs, arguments, given, "backward_sm90")
    except RuntimeError as refusal:
        return str(refusal)
    return None


@pytest.mark.parametrize("case", [*MANY_ROWS, *BIASED, *PACKED[:-1]], ids=str)
def test_the_fast_kernel_takes_it(case: Case) -> None:
    assert (refusal_by_hopper(case) is None) == is_hopper()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    (
        ({"bias": "B11K"}, "takes a bias of query's dtype, with rows of its own"),
        ({"bias": "BHQK", "bias_dtype": "float32"}, "takes a bias of query's dtype, with rows of its own"),
        ({"bias": "BHQK", "seqlen_kv": 129}, "takes a bias of query's dtype, with rows of its own"),
        ({"bias": "BHQK", "mask": "B11K"}, "takes no mask, alibi_slopes and softcap"),
        ({"bias": "BHQK", "head_dim": 192}, "head_dim or head_dim_v is above 128, with a bias"),
    ),
)
def test_other_biases_are_refused_there_with_a_sentence(fields: dict, sentence: str) -> None:
    refusal = refusal_by_hopper(Case(**({"dtype": "bfloat16", "seqlen_kv": 136} | fields)))
    assert refusal is not None and (sentence in refusal or not is_hopper())


@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("has_bias", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_many_launches_give_the_same_bits(dtype: torch.dtype, head_dim: int, is_causal: bool, has_bias: bool) -> None:
    """Blocks add to the gradient of the queries in turn: one out of turn is seen now and then only."""
    torch.manual_seed(head_dim)
    query, key, value, d_output = (torch.randn(4, 11, 1504, head_dim, device="cuda", dtype=dtype) for _ in range(4))
    options: dict = {"is_causal": is_causal}
    wanted = ("attn_bias",) if has_bias else ()
    if has_bias:
        options["attn_bias"] = torch.randn(1, 11, 1504, 1504, device="cuda", dtype=dtype)
    output, lse = faplugin.attention(query, key, value, **options, return_lse=True)
    for kernel in on_gpu.KERNELS:
        first = None
        for _ in range(30):
            try:
                found = faplugin.attention_backward(
                    d_output, output, lse, query, key, value, **options, wanted=wanted, kernel=kernel
                )
            except RuntimeError:
                break
            first = first or found
            assert all(arrays.same_bits(found[name], first[name]) for name in found), kernel


@pytest.mark.parametrize("precision", ("", "tf32", "tf32x3"))  # "": float16
def test_a_nan_reaches_only_the_rows_and_keys_that_see_it(precision: str) -> None:
    dtype = torch.float32 if precision else torch.float16
    query, key, value, d_output = (torch.randn(1, 2, 300, 64, device="cuda", dtype=dtype) for _ in range(4))
    value[0, 0, 250] = float("nan")
    d_output[0, 1, 40, 3] = float("inf")
    query[0, 1, 280] = float("nan")
    arguments = {"is_causal": True, "float32_precision": precision}
    output, lse = faplugin.attention(query, key, value, return_lse=True, **arguments)
    found = faplugin.attention_backward(d_output, output, lse, query, key, value, kernel="backward_sm80", **arguments)
    finite = {name: gradient.isfinite().all(-1)[0].cpu() for name, gradient in found.items()}
    assert finite["query"][0, :250].all() and not finite["query"][0, 250:].any()
    rows = torch.arange(300)
    assert torch.equal(finite["query"][1], (rows != 40) & (rows != 280))
    assert torch.equal(finite["value"][1], rows > 280) and torch.equal(finite["key"][1], rows > 280)


OF_THREE = ({"softcap": 50.0}, {"is_causal": True}, {"left_window_size": 40})


@pytest.mark.parametrize(
    ("head_dim", "options"), [(64, {}), (128, {}), (256, {}), *itertools.product((64, 128), OF_THREE)], ids=str
)
def test_tf32_is_one_product_only_where_every_row_sees_all(head_dim: int, options: dict) -> None:
    """Elsewhere, and above 128 columns, it is three, whatever the forward pass had: its log-sum-exp is mended."""
    query, key, value, d_output = (torch.randn(1, 2, 300, head_dim, device="cuda") for _ in range(4))

    def gradients(forward: str, backward: str) -> dict[str, torch.Tensor]:
        output, lse = faplugin.attention(query, key, value, return_lse=True, float32_precision=forward, **options)
        operands = (d_output, output, lse, query, key, value)
        arguments = {"kernel": "backward_sm80", "float32_precision": backward}
        return faplugin.attention_backward(*operands, **options, **arguments)

    three = gradients("tf32x3", "tf32x3")
    assert all(torch.equal(x, three[name]) for name, x in gradients("tf32x3", "").items())
    for forward in ("tf32", "tf32x3"):
        for name, gradient in gradients(forward, "tf32").items():
            distance = ((gradient - three[name]).norm() / three[name].norm()).item()
            assert distance < 1e-5 if options or head_dim > 128 else 1e-5 < distance < 2e-3


@pytest.mark.parametrize("precision", ("", "tf32", "tf32x3"))  # "": float16
@pytest.mark.parametrize("unaligned", ("query", "key", "value", "d_output", "all"))
def test_tensors_may_begin_at_any_element(unaligned: str, precision: str) -> None:
    """Tensors that can't be copied in 16 bytes, each alone, give the same numbers to every product."""
    dtype = torch.float32 if precision else torch.float16
    tensors = {
        name: torch.randn(2, 3, 170, 64, device="cuda", dtype=dtype) for name in ("query", "key", "value", "d_output")
    }
    arguments = {"is_causal": precision != "tf32", "float32_precision": precision}  # tf32: one product
    output, lse = faplugin.attention(
        *(tensors[name] for name in ("query", "key", "value")), return_lse=True, **arguments
    )
    moved = {}
    for name, tensor in tensors.items():
        moved[name] = tensor
        if unaligned in (name, "all"):
            memory = torch.full((tensor.numel() + 2,), float("nan"), device="cuda", dtype=dtype)
            moved[name] = memory[1:-1].view(tensor.shape).copy_(tensor)
    arguments |= {"output": output, "lse": lse, "kernel": "backward_sm80"}
    wanted, found = (faplugin.attention_backward(**operands, **arguments) for operands in (tensors, moved))
    assert torch.equal(found["value"], wanted["value"])
    for name in ("query", "key"):  # their D is added up in another order
        distance = (found[name].double() - wanted[name].double()).norm() / wanted[name].double().norm()
        assert distance < (1e-6 if precision == "tf32x3" else 1e-4)
