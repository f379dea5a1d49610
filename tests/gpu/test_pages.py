# SPDX-License-Identifier: Apache-2.0
"""Decoding in pages that the attention kernel reads where they are: random block tables, NaN wherever nothing in use
lies, and entries of the table beyond a sequence's pages that point anywhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest

torch = pytest.importorskip("torch")
from tests.gpu import arrays  # noqa: E402

pytestmark = pytest.mark.gpu
LIMIT = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # ||out - ref|| / ||ref||
PAGE_ROWS = (16, 32, 48, 64, 128, 256)
SPARE_PAGES = 3  # of the pool, which no sequence has, and of each sequence's row of the table


class Problem:
    """One step of packed sequences, which have `before` rows in their pages and get `rows` new ones.

    `given` are the arguments of faplugin.attention, `history` the keys and values of each sequence after the step,
    [H_kv, length, D].
    """

    def __init__(
        self,
        page_rows: int,
        before: Sequence[int],
        rows: Sequence[int],
        heads: tuple[int, int] = (32, 8),
        head_dim: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        index: torch.dtype = torch.int32,
        slots: bool = False,
        poison: float = math.nan,
        side_by_side: bool = False,
    ):
        self.before, self.rows, self.page_rows = before, rows, page_rows
        lengths = [a + b for a, b in zip(before, rows, strict=True)]
        counts = [-(-n // page_rows) for n in lengths]
        pages = torch.randperm(sum(counts) + SPARE_PAGES).tolist()
        wild = torch.tensor([-1, 0, 2**31 - 1, -(2**31)])
        table = wild[torch.randint(0, 4, (len(lengths), max(counts) + SPARE_PAGES))]
        shape = (len(pages), page_rows, heads[1], head_dim)
        self.pools = [torch.full(shape, poison, device="cuda", dtype=dtype) for _ in range(2)]
        if side_by_side:  # views of one buffer [pages, 2, rows of a page, heads, columns]
            self.pools = list(torch.stack(self.pools, 1).unbind(1))
        self.history, self.pages = [], []
        for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            own = torch.tensor([pages.pop() for _ in range(count)], dtype=torch.long)
            table[b, :count] = own
            self.pages.append(own.cuda())
            self.history.append([torch.randn(heads[1], length, head_dim, device="cuda", dtype=dtype) for _ in range(2)])
            for pool, known in zip(self.pools, self.history[b], strict=True):
                page, row = self.places(b, before[b])
                pool[page, row] = known[:, : before[b]].transpose(0, 1)
        new = [
            torch.cat([h[which][:, n:] for h, n in zip(self.history, before, strict=True)], 1)[None] for which in (0, 1)
        ]
        starts = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
        self.query = torch.randn(1, heads[0], sum(rows), head_dim, device="cuda", dtype=dtype)
        self.given = {
            "query": self.query, "key": new[0], "value": new[1], "past_key": self.pools[0], "past_value": self.pools[1],
            "cache": "paged", "is_causal": True, "cu_seqlens_q": starts.cuda(), "block_table": table.to(index).cuda(),
            "write_indices": torch.tensor(before, dtype=index, device="cuda"),
        }  # fmt: skip
        if slots:
            found = []
            for b, length in enumerate(lengths):
                page, row = self.places(b, length)
                found.append((page * page_rows + row)[before[b] :])
            self.given["slot_mapping"] = torch.cat(found).to(index)

    def places(self, b: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and row in it of the first `length` rows of sequence b."""
        position = torch.arange(length, device="cuda")
        return self.pages[b][position // self.page_rows], position % self.page_rows

    def expected(self, window: int = -1) -> torch.Tensor:
        """float64 [1, H_q, rows of all, D]."""
        found, first = [], 0
        for (key, value), before, rows in zip(self.history, self.before, self.rows, strict=True):
            query = self.query[0, :, first : first + rows].double()
            first += rows
            group = query.shape[0] // key.shape[0]
            key, value = (x.double().repeat_interleave(group, 0) for x in (key, value))
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            distance = before + torch.arange(rows, device="cuda")[:, None] - torch.arange(key.shape[1], device="cuda")
            hidden = distance < 0
            if window >= 0:
                hidden |= distance > window
            found.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ value)
        return torch.cat(found, 1)[None]

    def check_pools(self) -> None:
        """New rows are where they belong, and everything else is as it was."""
        for which, pool in enumerate(self.pools):
            seen = torch.zeros(pool.shape[:2], dtype=torch.bool, device="cuda")
            for b, known in enumerate(self.history):
                page, row = self.places(b, known[which].shape[1])
                assert torch.equal(pool[page, row], known[which].transpose(0, 1)), (b, which)
                seen[page, row] = True
            assert pool[~seen].isnan().all()


def attention(problem: Problem, **others: object) -> torch.Tensor:
    import faplugin

    return faplugin.attention(**problem.given, **others)


def check(problem: Problem, window: int = -1) -> None:
    others = {"left_window_size": window} if window >= 0 else {}
    kernels = arrays.kernels_for(problem.given, others)
    if torch.cuda.get_device_capability() == (9, 0):
        assert kernels[0] == "decode_sm90"
    output, want = attention(problem, **others), problem.expected(window)
    error = ((output.double() - want).norm() / want.norm()).item()
    assert error <= LIMIT[output.dtype], f"relative error {error:.2g}"
    assert arrays.same_bits(attention(problem, **others), output)
    problem.check_pools()


@pytest.mark.parametrize("page_rows", PAGE_ROWS)
@pytest.mark.parametrize("head_dim", (64, 80, 128, 256))
def test_ragged_lengths(page_rows: int, head_dim: int) -> None:
    """One long sequence among short ones, empty ones, and ones that end where a page does."""
    torch.manual_seed(page_rows + head_dim)
    before = [5000, 0, page_rows - 1, page_rows, 3, 0, 777, 31, 2 * page_rows - 1]
    rows = [1, 1, 1, 1, 0, 0, 1, 1, 1]
    for dtype, index, slots in ((torch.bfloat16, torch.int32, False), (torch.float16, torch.int64, True)):
        check(Problem(page_rows, before, rows, head_dim=head_dim, dtype=dtype, index=index, slots=slots))


@pytest.mark.parametrize("page_rows", PAGE_ROWS)
@pytest.mark.parametrize("window", (-1, 0, 300))
def test_one_to_eight_rows_a_sequence(page_rows: int, window: int) -> None:
    torch.manual_seed(page_rows)
    rows = torch.randint(1, 9, (40,)).tolist()
    before = (3000 * torch.rand(40) ** 3).long().tolist()
    check(Problem(page_rows, before, rows, heads=(16, 4)), window)


@pytest.mark.parametrize(
    ("batch", "length"), [(1, 511), (1, 32767), (16, 2047), (64, 2047), (8, 8191), (300, 63), (5, 0), (131, 999)]
)
@pytest.mark.parametrize("page_rows", (16, 64))
def test_equal_lengths(batch: int, length: int, page_rows: int) -> None:
    """Heads that are all equally long are cut alike, or drawn, though no host knows it."""
    torch.manual_seed(batch)
    check(Problem(page_rows, [length] * batch, [1] * batch))


@pytest.mark.parametrize("page_rows", (16, 48, 256))
def test_keys_and_values_side_by_side(page_rows: int) -> None:
    torch.manual_seed(page_rows)
    check(Problem(page_rows, [5000, 0, 777], [1, 2, 1], side_by_side=True))


def test_pages_that_do_not_exist_are_zeros() -> None:
    """As for the kernels that gather pages."""
    torch.manual_seed(0)
    for page_rows, index in itertools.product((16, 64), (torch.int32, torch.int64)):
        problem = Problem(page_rows, [1000, 700], [1, 2], poison=0.0, index=index)
        problem.given["block_table"][0, 3] = -1
        if index == torch.int64:
            problem.given["block_table"][0, 5] = 2**32 + 1  # its lower half would be a page
        problem.given["block_table"][1, 5] = len(problem.pools[0])
        kernels = arrays.kernels_for(problem.given, {})
        outputs = [attention(problem, kernel=kernel).double() for kernel in kernels]
        assert len(outputs) > 1
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], rtol=0, atol=2e-2)


@pytest.mark.parametrize("page_rows", (16, 128))
def test_pages_are_not_copied(page_rows: int) -> None:
    problem = Problem(page_rows, [4000] * 4, [1] * 4)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only decode_sm90 reads pages")
    attention(problem)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(problem)
    assert torch.cuda.max_memory_allocated() - before < problem.pools[0].nbytes / 2


@pytest.mark.parametrize("page_rows", (16, 32))
def test_a_graph_follows_lengths_and_tables_on_the_device(page_rows: int) -> None:
    """Captured once; replayed while sequences grow into pages that the table gets meanwhile."""
    torch.manual_seed(1)
    problem = Problem(page_rows, [1, 40, 100, 40], [1] * 4, heads=(8, 2), head_dim=64, dtype=torch.float16)
    pools = [torch.zeros(4 * 20, page_rows, 2, 64, device="cuda", dtype=torch.float16) for _ in range(4)]
    order = torch.randperm(4 * 20, device="cuda").view(4, 20)
    problem.given |= {"past_key": pools[0], "past_value": pools[1], "block_table": torch.full_like(order, -1)}
    angles = torch.rand(400, 32, device="cuda")
    rotary = {"cos_cache": angles.cos().half(), "sin_cache": angles.sin().half()}
    outputs = [torch.empty_like(problem.query) for _ in range(2)]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        attention(problem, **rotary, out={"output": outputs[0]})
        for pool in pools:
            pool.zero_()
        torch.cuda.synchronize()
        with arrays.captured_by(graph, stream):
            attention(problem, **rotary, out={"output": outputs[0]})
        problem.given |= {"past_key": pools[2], "past_value": pools[3]}
        for i in range(60):
            used = (problem.given["write_indices"] // page_rows + 1)[:, None]
            table = problem.given["block_table"]
            table.copy_(torch.where(torch.arange(20, device="cuda") < used, order, table))
            for name in ("query", "key", "value"):
                problem.given[name].normal_()
            graph.replay()
            attention(problem, **rotary, out={"output": outputs[1]})
            torch.cuda.synchronize()
            assert arrays.same_bits(*outputs), i
            assert all(arrays.same_bits(a, b) for a, b in zip(pools[:2], pools[2:], strict=True)), i
            problem.given["write_indices"] += 1
