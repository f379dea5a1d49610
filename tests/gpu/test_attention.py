# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel against float64 on all cases: right, written everywhere, and the same bits each time."""

from __future__ import annotations

import itertools

import pytest

from tests import cases, tolerances
from tests.problems import Problem

torch = pytest.importorskip("torch")
from tests.gpu import arrays  # noqa: E402

pytestmark = pytest.mark.gpu


def check(problem: Problem, expected: tolerances.Expectation) -> None:
    """All kernels that take the problem, each twice."""
    inputs = {name: arrays.to_cuda(array) for name, array in problem.inputs.items()}
    kernels = arrays.kernels_for(inputs, problem.attributes)
    if inputs["query"].dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("float8 needs compute capability 9.0")
    assert kernels, "no kernel takes the problem"
    for kernel in kernels:
        first = arrays.run(problem, inputs, kernel)
        try:
            tolerances.check({name: arrays.to_numpy(t) for name, t in first.items()}, expected)
        except AssertionError as error:
            raise AssertionError(f"{kernel}: {error}") from None
        second = arrays.run(problem, inputs, kernel)
        for name in first:
            assert arrays.same_bits(first[name], second[name]), f"{kernel}: {name} differs between two runs"


@pytest.mark.parametrize("case", [*cases.full(), *cases.empty()], ids=str)
def test_case(case: cases.Case, expected) -> None:
    check(case.problem(), expected(case))


# Rows, keys and head_dim of 132 heads: they fill a GPU of so many multiprocessors, and tiles of many rows are chosen,
# tall or long ones, of which none, one or two thirds are empty.
MANY_ROWS = (
    (250, 330, 64),
    (190, 330, 48),
    (400, 330, 64),
    (300, 650, 128),
    (120, 330, 128),
    (333, 330, 192),
    (250, 330, 256),
    (250, 330, 80),
    (250, 330, 512),
)
MANY_KEYS = (120, 1100, 128)  # tiles of few rows and many keys; 16-bit types alone
ON_ALL_SHAPES = {"causal", "packed_causal"}


def many_rows() -> list[cases.Case]:
    chosen = []
    for i, (kind, fields) in enumerate(cases.MASKS.items()):
        shapes = MANY_ROWS if kind in ON_ALL_SHAPES else (MANY_ROWS[i % len(MANY_ROWS)],)
        for j, (rows, keys, head_dim) in enumerate((*shapes, MANY_KEYS)):
            dtype, layout = ("float16", "bfloat16")[(i + j) % 2], ("BHSD", "BSHD")[(i + j) // 2 % 2]
            key_heads = 1 if (i + j) % 3 == 0 else 11
            shape = (12, 11, key_heads, rows, keys, head_dim, 0, layout)
            chosen.append(cases.Case(dtype, *shape, **fields))
            if (i + j) % 2 == 0 and head_dim <= 256 and keys != MANY_KEYS[1]:
                precision = ("tf32", "tf32x3")[(i + j) // 2 % 2]
                chosen.append(cases.Case("float32", *shape, **fields, float32_precision=precision))
    return chosen


@pytest.mark.parametrize("case", many_rows(), ids=str)
def test_many_rows(case: cases.Case, expected) -> None:
    check(case.problem(), expected(case))


def biased_rows() -> list[cases.Case]:
    """A query_bias where tiles of many rows are chosen, for scores as they are and for those that are added to."""
    chosen = []
    for i, ((rows, keys, head_dim), kind) in enumerate(
        itertools.product(MANY_ROWS, ("causal", "mask_padding", "bias"))
    ):
        shape = (12, 11, 1 if i % 3 == 0 else 11, rows, keys, head_dim, 0, ("BHSD", "BSHD")[i % 2])
        chosen.append(cases.Case(("float16", "bfloat16")[i // 2 % 2], *shape, **cases.MASKS[kind], query_bias=True))
        if i % 2 == 0 and head_dim <= 256:
            options = {"float32_precision": ("tf32", "tf32x3")[i // 2 % 2], "query_bias": True}
            chosen.append(cases.Case("float32", *shape, **cases.MASKS[kind], **options))
    return chosen


@pytest.mark.parametrize("case", biased_rows(), ids=str)
def test_biased_queries_in_many_rows(case: cases.Case, expected) -> None:
    check(case.problem(), expected(case))


# Keys in multiples of 16, as sequences mostly are: rows of a mask that are read 16 bytes at a time.
ALIGNED = (
    (250, 336, 64),
    (190, 144, 48),
    (120, 128, 32),
    (300, 656, 128),
    (120, 336, 128),
    (333, 336, 192),
    (250, 288, 256),
)


def wide_rows() -> list[cases.Case]:
    chosen = []
    for mask, shape in itertools.product(("B11K", "1H1K", "B1QK", "BHQK"), ALIGNED):
        dtype = "float16" if shape[2] % 64 else "bfloat16"
        options = {"mask": mask, "is_causal": mask == "1H1K", "empty": mask == "B1QK"}
        chosen.append(cases.Case(dtype, 12, 11, 11, *shape, **options))
        if shape[2] % 64 == 0:
            chosen.append(cases.Case("float32", 12, 11, 11, *shape, **options, float32_precision="tf32"))
    return chosen


@pytest.mark.parametrize("case", wide_rows(), ids=str)
def test_mask_in_wide_rows(case: cases.Case, expected) -> None:
    check(case.problem(), expected(case))


FEW_KEYS = ((77, 77, 64), (128, 128, 128), (120, 72, 32), (129, 129, 64), (200, 128, 256))
CAUSAL = {"mask": "B11K", "is_causal": True}
WINDOWS_OF_MASKED = (CAUSAL, CAUSAL | {"empty": True}, CAUSAL | {"sinks": True}, {"mask": "B11K", "window_left": 3})


def hidden_entries() -> list[cases.Case]:
    """Whole batch entries without a key to see, whose rows become the mean of their values or a given value; and rows
    in front of the first key that a mask of keys shows: with up to 128 keys a kernel writes them itself."""
    return [
        *(
            cases.Case(("float16", "bfloat16")[i % 2], 4, 11, (11, 1)[i // 2 % 2], *shape, **options, empty_row=word)
            for i, shape in enumerate((*ALIGNED, *MANY_ROWS))
            for options, word in itertools.product([{"mask": "B11K", "empty": True}], ("mean", "value"))
        ),
        *(
            cases.Case(("float16", "bfloat16")[i % 2], 4, 12, (12, 4)[i % 2], *shape, **options, empty_row=word)
            for i, shape in enumerate(FEW_KEYS)
            for options, word in itertools.product(WINDOWS_OF_MASKED, ("mean", "value"))
        ),
    ]


@pytest.mark.parametrize("case", hidden_entries(), ids=str)
def test_hidden_entries(case: cases.Case, expected) -> None:
    check(case.problem(), expected(case))


TYPES = ((torch.float16, ""), (torch.float32, "tf32"), (torch.float32, "tf32x3"))
HEADS = [(dim, *kind) for dim in (32, 64, 96, 128, 192, 256, 512) for kind in TYPES[: 3 if dim <= 256 else 1]]


@pytest.mark.parametrize(("head_dim", "dtype", "precision"), HEADS, ids=str)
@pytest.mark.parametrize("seqlen", (100, 700))
def test_many_launches_give_the_same_bits(head_dim: int, dtype: torch.dtype, precision: str, seqlen: int) -> None:
    """A buffer that is written too early is seen now and then only."""
    import faplugin

    torch.manual_seed(head_dim)
    inputs = {
        name: torch.randn(8, 33, seqlen, head_dim, device="cuda", dtype=dtype) for name in ("query", "key", "value")
    }
    for attributes in ({"float32_precision": precision}, {"is_causal": True, "left_window_size": 40}):
        for kernel in arrays.kernels_for(inputs, attributes):
            first = faplugin.attention(**inputs, **attributes, kernel=kernel)
            for _ in range(40):
                assert arrays.same_bits(faplugin.attention(**inputs, **attributes, kernel=kernel), first), kernel


@pytest.mark.parametrize(
    ("head_dim", "dtype", "precision", "lengths"),
    [*((*head, (400, 400)) for head in HEADS), (128, torch.float16, "", MANY_KEYS[:2])],
    ids=str,
)
@pytest.mark.parametrize("rows", ("mask for all rows", "mask for each row", "causal"))
def test_values_of_hidden_keys_in_many_tiles(
    head_dim: int, dtype: torch.dtype, precision: str, lengths: tuple[int, int], rows: str
) -> None:
    """Every tile of every block has rows to be mended: they come out as if the values were 0."""
    import faplugin

    torch.manual_seed(head_dim)
    seqlen_q, seqlen_kv = lengths
    query, key, value = (
        torch.randn(12, 11, length, head_dim, device="cuda", dtype=dtype) for length in (seqlen_q, seqlen_kv, seqlen_kv)
    )
    attributes = {"float32_precision": precision}
    seen = 3 * seqlen_q // 4 if rows == "causal" else seqlen_q
    hidden = torch.zeros(seqlen_kv, device="cuda", dtype=torch.bool)
    if rows == "causal":
        hidden[seen:] = True
        attributes["is_causal"] = True
    else:
        hidden[5::97] = True
        mask = ~hidden.expand(12, 1, 1 if rows == "mask for all rows" else seqlen_q, seqlen_kv)
        attributes["attn_mask"] = mask.contiguous()
    spoilt = value.clone()
    spoilt[:, :, hidden] = torch.tensor((float("nan"), float("inf")), device="cuda", dtype=dtype).repeat(head_dim // 2)
    value[:, :, hidden] = 0
    for kernel in arrays.kernels_for({"query": query, "key": key, "value": value}, attributes):
        expected = faplugin.attention(query, key, value, **attributes, kernel=kernel)[:, :, :seen]
        output = faplugin.attention(query, key, spoilt, **attributes, kernel=kernel)
        assert (output[:, :, :seen] - expected).abs().max() <= 4e-3 * expected.abs().max(), kernel
        assert not output[:, :, seen:].isfinite().any(), kernel


def test_kernels_wait_for_each_other() -> None:
    """Each launch reads what the one before it wrote; blocks may come early, but nothing may be read early."""
    import faplugin

    torch.manual_seed(0)
    start = torch.randn(4, 16, 512, 64, device="cuda", dtype=torch.float16)
    for kernel in arrays.kernels_for({"query": start, "key": start, "value": start}, {}):
        ends = []
        for synchronize in (True, False):
            x, lengths = start, torch.full((4,), 512, device="cuda")
            for i in range(60):
                y = faplugin.attention(x, x, x, nonpad_kv_seqlen=lengths, kernel=kernel)
                x = y if i % 3 else y * 8  # now and then a kernel of PyTorch's between them
                lengths = lengths - 3
                if synchronize:
                    torch.cuda.synchronize()
            ends.append(x)
        assert arrays.same_bits(*ends), kernel


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("head_dim", (64, 80, 128, 33))
@pytest.mark.parametrize("seqlen", (1, 200))
def test_strides_of_axes_of_size_1_are_not_read(dtype: str, head_dim: int, seqlen: int) -> None:
    case = cases.Case(dtype, 1, 1, 1, seqlen, 1, head_dim, mask="B1QK", bias="1HQK")
    for problem in (case.problem(), cases.Case(dtype, 1, 1, 1, seqlen, seqlen, head_dim, mask="BHQK").problem()):
        inputs = {name: arrays.to_cuda(array) for name, array in problem.inputs.items()}
        corrupted = {name: t if name == "query" else arrays.CorruptedStrides(t) for name, t in inputs.items()}
        expectation = tolerances.expectation(problem)
        for kernel in arrays.kernels_for(inputs, problem.attributes):
            out = arrays.run(problem, corrupted, kernel)
            tolerances.check({name: arrays.to_numpy(t) for name, t in out.items()}, expectation)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("shape", ((2, 4, 2048, 64), (1, 2, 8192, 128), (1, 2, 1500, 256), (1, 1, 4096, 512)))
def test_error_is_at_most_twice_pytorchs(dtype: str, is_causal: bool, shape: tuple[int, ...]) -> None:
    """FlashAttention's rule on sizes that the cases don't reach; float64 and the unfused result both by PyTorch."""
    import faplugin

    torch.manual_seed(shape[2] + is_causal)
    query, key, value = (torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for _ in range(3))

    def unfused(q, k, v):
        scores = q @ k.transpose(-1, -2) * shape[3] ** -0.5
        if is_causal:
            scores.masked_fill_(torch.ones(scores.shape[-2:], device="cuda", dtype=torch.bool).triu(1), float("-inf"))
        return scores.softmax(-1) @ v

    expected = unfused(query.double(), key.double(), value.double())
    allowed = 2 * (unfused(query, key, value) - expected).abs().max() + 1e-5
    inputs = {"query": query, "key": key, "value": value}
    for kernel in arrays.kernels_for(inputs, {"is_causal": is_causal}):
        output = faplugin.attention(**inputs, is_causal=is_causal, kernel=kernel)
        assert (output - expected).abs().max() <= allowed, kernel


@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("shape", ((8, 12, 128, 64), (2, 4, 2048, 64), (1, 2, 4096, 128), (1, 2, 1500, 256)))
def test_float32_errors_are_of_the_class_that_was_asked_for(shape: tuple[int, ...], is_causal: bool) -> None:
    """In three TF32 products below 1e-6; in one that of an unfused graph with TF32 products, but for chance."""
    import faplugin

    torch.manual_seed(shape[2])
    query, key, value = (torch.randn(shape, device="cuda") for _ in range(3))
    hidden = torch.ones(shape[2], shape[2], device="cuda", dtype=torch.bool).triu(1)

    def unfused(q, k, v):
        scores = q * shape[3] ** -0.5 @ k.transpose(-1, -2)
        return (scores.masked_fill_(hidden, float("-inf")) if is_causal else scores).softmax(-1) @ v

    expected = unfused(query.double(), key.double(), value.double())

    def error(output: torch.Tensor) -> float:
        return float((output - expected).norm() / expected.norm())

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        of_tf32 = error(unfused(query, key, value))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    inputs = {"query": query, "key": key, "value": value}
    for kernel in arrays.kernels_for(inputs, {}):
        for precision, limit in (("tf32x3", 1e-6), ("tf32", 1.01 * of_tf32)):
            arguments = {"is_causal": is_causal, "float32_precision": precision, "kernel": kernel}
            assert error(faplugin.attention(**inputs, **arguments)) <= limit, (kernel, precision)


def test_sequence_beyond_2_to_31_elements() -> None:
    """Offsets are 64-bit: the last head lies beyond 4 GB."""
    import faplugin

    seqlen, heads = 1 << 20, 17
    memory = torch.zeros(heads, seqlen, 128, device="cuda", dtype=torch.float16)
    memory[-1].normal_()
    key = value = memory[None]
    query = torch.randn(1, heads, 1, 128, device="cuda", dtype=torch.float16)
    weights = (query[0, -1].double() @ memory[-1].double().T * 128**-0.5).softmax(-1)
    expected = weights @ memory[-1].double()
    for kernel in arrays.kernels_for({"query": query, "key": key, "value": value}, {}):
        output = faplugin.attention(query, key, value, kernel=kernel)[0, -1]
        assert (output - expected).norm() <= 2e-3 * expected.norm(), kernel
