# SPDX-License-Identifier: Apache-2.0
"""Decoding: few query rows, many keys, lengths on the device; in sizes and repetitions that tests/cases.py has not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from tests import cases, tolerances

torch = pytest.importorskip("torch")
from tests.gpu import arrays  # noqa: E402

pytestmark = pytest.mark.gpu
LIMIT = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # ||out - ref|| / ||ref||


def draw(
    batch: int, heads: int, key_heads: int, rows: int, keys: int, head_dim: int, dtype=torch.bfloat16, layout="BHSD"
) -> dict[str, torch.Tensor]:
    """Query, key and value as [B, H, S, D]; the cache lies in memory as `layout` says."""

    def normal(h: int, s: int) -> torch.Tensor:
        shape = (batch, h, s, head_dim) if layout == "BHSD" else (batch, s, h, head_dim)
        x = torch.randn(shape, device="cuda", dtype=dtype)
        return x if layout == "BHSD" else x.transpose(1, 2)

    return {"query": normal(heads, rows), "key": normal(key_heads, keys), "value": normal(key_heads, keys)}


def visible_keys(rows: int, keys: int, lengths: torch.Tensor, window: int = -1) -> torch.Tensor:
    """[B, 1, rows, keys]: causal, the last row at the last key in use."""
    position = lengths[:, None, None, None] - rows + torch.arange(rows, device="cuda")[:, None]
    key = torch.arange(keys, device="cuda")
    seen = (key <= position) & (key < lengths[:, None, None, None])
    return seen & (key >= position - window) if window >= 0 else seen


def expected(inputs: dict[str, torch.Tensor], seen: torch.Tensor) -> torch.Tensor:
    """float64, one batch entry at a time; 0 for a row without keys. Keys that nobody sees are left out."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    group, out = query.shape[1] // key.shape[1], []
    for b in range(query.shape[0]):
        used = seen[b].any(0).any(0)
        k, v = (x[b][:, used].double().repeat_interleave(group, 0) for x in (key, value))
        scores = query[b].double() @ k.transpose(-1, -2) * query.shape[3] ** -0.5
        scores.masked_fill_(~seen[b][..., used], -math.inf)
        out.append(scores.softmax(-1).nan_to_num(0.0) @ v)
    return torch.stack(out)


def check(output: torch.Tensor, want: torch.Tensor, what: object) -> None:
    error = (output.double() - want).norm() / want.norm()
    assert error <= LIMIT[output.dtype], f"{what}: relative error {error:.2g}"


def kernels(inputs: dict[str, torch.Tensor], attributes: dict) -> list[str]:
    found = arrays.kernels_for(inputs, attributes)
    if torch.cuda.get_device_capability() == (9, 0):
        assert found[0] == "decode_sm90"
    return found


CAUSAL = {"is_causal": True}  # with lengths the last row stands at the last key in use
SHAPES = (
    # batch, query heads, key heads, rows, capacity, head_dim
    (64, 32, 8, 1, 4096, 128),
    (3, 32, 8, 1, 9000, 128),
    (17, 8, 8, 1, 3000, 64),
    (5, 16, 1, 1, 5000, 256),
    (2, 64, 8, 8, 2500, 128),
    (9, 32, 8, 4, 3333, 80),
    (300, 4, 1, 2, 500, 96),
    (1, 71, 1, 2, 4000, 64),
    (8, 32, 8, 1, 4096, 128),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ("BHSD", "BSHD"))
@pytest.mark.parametrize("window", (-1, 300))
def test_lengths_of_every_size(shape: tuple[int, ...], layout: str, window: int) -> None:
    """One long sequence among many short ones, an empty one, and one that fills the cache; what is unused is NaN."""
    import faplugin

    torch.manual_seed(sum(shape))
    batch, _, _, rows, capacity, _ = shape
    inputs = draw(*shape, layout=layout)
    lengths = (capacity * torch.rand(batch, device="cuda") ** 3).long().clamp(min=rows)
    lengths[-1] = capacity
    lengths[0] = 0 if batch > 1 else capacity
    for name in ("key", "value"):
        for b in range(batch):
            inputs[name][b, :, lengths[b] :] = math.nan
    attributes = CAUSAL | ({"left_window_size": window} if window >= 0 else {})
    want = expected(inputs, visible_keys(rows, capacity, lengths, window))
    inputs["nonpad_kv_seqlen"] = lengths
    for kernel in kernels(inputs, attributes):
        output = faplugin.attention(**inputs, **attributes, kernel=kernel)
        check(output, want, kernel)
        assert arrays.same_bits(faplugin.attention(**inputs, **attributes, kernel=kernel), output), kernel


# Results of many rows, in 4 to 132 parts of a head, which the blocks of a head merge together.
LARGE = (
    # batch, query heads, key heads, rows, keys, head_dim
    (2, 16, 1, 1, 8192, 256),
    (1, 16, 1, 1, 20000, 256),
    (4, 16, 1, 1, 2048, 256),
    (8, 32, 2, 1, 3000, 192),
    (1, 16, 1, 4, 9000, 128),
    (1, 32, 1, 1, 8192, 128),
    (1, 32, 8, 4, 4096, 128),
    (3, 64, 2, 1, 12000, 64),
    (1, 9, 1, 3, 30000, 64),
)


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("lengths", ("on the host", "equal", "different"))
def test_large_results_are_merged_together(shape: tuple[int, ...], lengths: str) -> None:
    """Where lengths differ a block has pieces of several heads, doesn't wait, and others do its part of the merge."""
    import faplugin

    torch.manual_seed(sum(shape))
    batch, _, _, rows, keys, _ = shape
    inputs = draw(*shape)
    used = torch.full((batch,), keys, device="cuda")
    if lengths == "different":
        used = (keys * (torch.arange(batch, device="cuda") + 1.5) / (batch + 0.5)).long()
    want = expected(inputs, visible_keys(rows, keys, used))
    if lengths == "on the host":
        attributes = CAUSAL | {"alignment": "bottom_right"}
    else:
        attributes, inputs["nonpad_kv_seqlen"] = CAUSAL, used
    output = faplugin.attention(**inputs, **attributes, kernel=kernels(inputs, attributes)[0])
    check(output, want, lengths)
    for _ in range(20):
        assert arrays.same_bits(faplugin.attention(**inputs, **attributes), output), lengths


EQUAL = ((1, 512), (1, 32768), (16, 2048), (64, 2048), (8, 8192), (300, 64), (131, 700))


@pytest.mark.parametrize(("batch", "length"), EQUAL)
@pytest.mark.parametrize(("rows", "head_dim"), [(1, 128), (4, 64), (8, 256)])
def test_equal_lengths_on_the_device(batch: int, length: int, rows: int, head_dim: int) -> None:
    """Heads that are all equally long are cut alike, or drawn, though no host knows it."""
    import faplugin

    torch.manual_seed(batch)
    capacity = length + 40
    inputs = draw(batch, 16, 4, rows, capacity, head_dim)
    lengths = torch.full((batch,), length, device="cuda")
    for name in ("key", "value"):
        inputs[name][:, :, length:] = math.nan
    for window in (-1, 100):
        attributes = CAUSAL | ({"left_window_size": window} if window >= 0 else {})
        want = expected(inputs, visible_keys(rows, capacity, lengths, window))
        output = faplugin.attention(**inputs, nonpad_kv_seqlen=lengths, **attributes)
        check(output, want, window)
        for _ in range(3):
            again = faplugin.attention(**inputs, nonpad_kv_seqlen=lengths, **attributes)
            assert arrays.same_bits(again, output), window


@pytest.mark.parametrize(("batch", "rows", "head_dim"), [(1, 1, 128), (5, 1, 64), (3, 4, 128), (2, 8, 256)])
def test_a_mask_that_is_a_range_hides_what_lies_outside(batch: int, rows: int, head_dim: int) -> None:
    """Padding on both sides as a bool mask [B, 1, 1, S] or [B, 1, rows, S]; hidden keys and values are NaN."""
    import faplugin

    torch.manual_seed(batch)
    capacity = 6000
    for mask_rows, holes in itertools.product({1, rows}, (False, True)):
        inputs = draw(batch, 32, 8, rows, capacity, head_dim)
        begin = torch.randint(0, 3000, (batch, 1, 1, 1), device="cuda")
        end = begin + torch.randint(1, 3000, (batch, 1, 1, 1), device="cuda")
        key = torch.arange(capacity, device="cuda")
        mask = ((key >= begin) & (key < end)).expand(batch, 1, mask_rows, capacity).contiguous()
        if holes:
            mask &= torch.rand(mask.shape, device="cuda") < 0.9
        seen = mask.expand(batch, 1, rows, capacity)
        hidden = ~mask.any(2).expand(batch, 8, capacity)
        inputs["key"][hidden] = math.nan
        inputs["value"][hidden] = math.nan
        want = expected(inputs, seen)
        inputs["attn_mask"] = mask
        if not holes:
            assert kernels(inputs, {})
        output = faplugin.attention(**inputs)
        check(output, want, (mask_rows, holes))


def test_continuous_batching_with_one_to_eight_rows_a_sequence() -> None:
    import faplugin

    torch.manual_seed(5)
    rows = torch.randint(1, 9, (40,), dtype=torch.int32)
    keys = torch.randint(8, 3000, (40,), dtype=torch.int32)
    keys[:3] = torch.tensor((8, 20000, 33))
    total_q, total_kv = int(rows.sum()), int(keys.sum())
    inputs = draw(1, 32, 8, total_q, 1, 128) | {
        name: x for name, x in draw(1, 32, 8, 1, total_kv, 128).items() if name != "query"
    }
    starts = {"cu_seqlens_q": rows, "cu_seqlens_kv": keys}
    zero = torch.zeros(1, dtype=torch.int32)
    starts = {name: torch.cat((zero, x.cumsum(0).int())).cuda() for name, x in starts.items()}
    attributes = CAUSAL | {"alignment": "bottom_right"}
    want = torch.empty(1, 32, total_q, 128, device="cuda", dtype=torch.float64)
    for i in range(40):
        q = slice(int(starts["cu_seqlens_q"][i]), int(starts["cu_seqlens_q"][i + 1]))
        kv = slice(int(starts["cu_seqlens_kv"][i]), int(starts["cu_seqlens_kv"][i + 1]))
        one = {"query": inputs["query"][:, :, q], "key": inputs["key"][:, :, kv], "value": inputs["value"][:, :, kv]}
        length = torch.tensor([int(keys[i])], device="cuda")
        want[:, :, q] = expected(one, visible_keys(int(rows[i]), int(keys[i]), length))
    for kernel in kernels(inputs | starts, attributes):
        check(faplugin.attention(**inputs, **starts, **attributes, kernel=kernel), want, kernel)


def test_a_graph_follows_lengths_on_the_device() -> None:
    """Captured once, replayed while lengths grow: the same bits as calls of their own, whose counters it shares."""
    import faplugin

    torch.manual_seed(1)
    inputs = draw(6, 32, 8, 1, 4096, 128)
    lengths = torch.tensor([1, 31, 32, 700, 2000, 4000], device="cuda")
    inputs["nonpad_kv_seqlen"] = lengths
    out = torch.empty_like(inputs["query"])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        faplugin.attention(**inputs, **CAUSAL, out={"output": out})
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with arrays.captured_by(graph, stream):
            faplugin.attention(**inputs, **CAUSAL, out={"output": out})
        for _ in range(90):
            graph.replay()
            stream.synchronize()
            replayed = out.clone()
            assert arrays.same_bits(faplugin.attention(**inputs, **CAUSAL), replayed)
            lengths += 1


@pytest.mark.parametrize(("batch", "capacity"), [(8, 4096), (4, 2000), (1, 512), (1, 4096), (40, 600)])
def test_a_graph_whose_heads_are_cut_alike_or_not(batch: int, capacity: int) -> None:
    """One capture: clusters share the heads while these are equally long, else each block has a range of its own."""
    import faplugin

    torch.manual_seed(batch)
    inputs = draw(batch, 32, 8, 1, capacity, 128)
    lengths = torch.full((batch,), capacity, device="cuda")
    given = inputs | {"nonpad_kv_seqlen": lengths}
    out = torch.empty_like(inputs["query"])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        faplugin.attention(**given, **CAUSAL, out={"output": out})
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with arrays.captured_by(graph, stream):
            faplugin.attention(**given, **CAUSAL, out={"output": out})
        alike = [torch.full_like(lengths, n) for n in (capacity, capacity // 3, 40, 1)]
        for now in (*alike, torch.randint_like(lengths, 1, capacity + 1), alike[0]):
            lengths.copy_(now)
            out.fill_(math.nan)
            graph.replay()
            stream.synchronize()
            replayed = out.clone()
            check(replayed, expected(inputs, visible_keys(1, capacity, now)), now)
            assert arrays.same_bits(faplugin.attention(**given, **CAUSAL), replayed)


def test_many_launches_in_a_row_and_side_by_side() -> None:
    """Blocks may come while those of the launch before still merge; launches of other streams run beside them."""
    import faplugin

    torch.manual_seed(2)
    problems = [draw(b, h, k, s, keys, d) for b, h, k, s, keys, d in SHAPES[1:6]]
    first = [faplugin.attention(**inputs) for inputs in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results = []
    for _ in range(100):
        for stream, inputs in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(faplugin.attention(**inputs))
    torch.cuda.synchronize()
    for i, output in enumerate(results):
        assert arrays.same_bits(output, first[i % len(first)]), i


def test_long_caches_replayed_and_side_by_side() -> None:
    """So many copies under way that they end in another order than they began; a gigabyte of keys and values."""
    import faplugin

    torch.manual_seed(4)
    problems = [draw(8, 32, 8, 1, 32768, 128, layout="BSHD"), *(draw(2, 32, 8, 1, 8192, 128) for _ in range(3))]
    first = [faplugin.attention(**inputs) for inputs in problems]
    queries = [torch.randn_like(problems[0]["query"]) for _ in range(4)]
    wanted = [faplugin.attention(**problems[0] | {"query": query}) for query in queries]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.stream(streams[0]), arrays.captured_by(graph, streams[0]):
        outputs += [faplugin.attention(**problems[0]) for _ in range(4)]
    for i in range(40):
        results = []
        for stream, inputs in zip(streams[1:], problems[1:], strict=True):
            with torch.cuda.stream(stream):
                results += [faplugin.attention(**inputs) for _ in range(20)]
        with torch.cuda.stream(streams[0]):
            problems[0]["query"].copy_(queries[i % 4])
            graph.replay()
            eager = [faplugin.attention(**problems[0]) for _ in range(4)]
        torch.cuda.synchronize()
        for output in outputs + eager:
            assert arrays.same_bits(output, wanted[i % 4]), i
        for j, output in enumerate(results):
            assert arrays.same_bits(output, first[1 + j // 20]), (i, j)


def test_each_launch_sees_what_the_ones_before_it_wrote() -> None:
    """A chain in which each result is the next one's query, against the same chain with a pause after each link.

    Launches that come early, of this kernel and of others, stand between kernels that don't.
    """
    import faplugin

    torch.manual_seed(6)
    inputs = draw(2, 32, 8, 1, 8192, 128)
    many = draw(2, 32, 8, 512, 512, 128)

    def chain(after_each: Callable[[], None]) -> torch.Tensor:
        x = inputs["query"]
        for i in range(12):
            x = faplugin.attention(**inputs | {"query": x})
            after_each()
            if i % 3 == 1:
                rows = faplugin.attention(**many | {"query": x + many["query"]})
                after_each()
                x = rows[:, :, -1:].contiguous()
            if i % 4 == 2:
                x = x * 2.0
            after_each()
        return x

    arrays.check_chain(chain, times=50)


def test_more_workspaces_than_there_are_counters() -> None:
    """Each address of a workspace has counters of its own, while there are any; then each launch zeroes them."""
    import faplugin

    torch.manual_seed(3)
    inputs = draw(1, 8, 2, 1, 3000, 64)
    first = faplugin.attention(**inputs)
    size = faplugin.attention(**inputs).nbytes
    held = []
    for _ in range(400):
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        assert arrays.same_bits(faplugin.attention(**inputs), first)
        taken = torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before - size
        held.append(torch.empty(max(taken, 1), dtype=torch.uint8, device="cuda"))  # takes the place of that workspace


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("kind", cases.MASKS)
def test_every_kind_of_mask_on_split_keys(kind: str, dtype: str) -> None:
    """With so many keys that each head is shared by several blocks."""
    for rows, heads, head_dim in ((1, (8, 2), 128), (4, (6, 1), 64), (8, (4, 2), 256)):
        case = cases.Case(dtype, 2, *heads, rows, 2100, head_dim, **cases.MASKS[kind])
        problem = case.problem()
        inputs = {name: arrays.to_cuda(array) for name, array in problem.inputs.items()}
        kernel = arrays.kernels_for(inputs, problem.attributes)[0]
        out = arrays.run(problem, inputs, kernel)
        tolerances.check({name: arrays.to_numpy(t) for name, t in out.items()}, problem)
