# SPDX-License-Identifier: Apache-2.0
"""Decoding from caches of int8 and float8 that the attention kernel reads where they are: every head size, layout and
mode, scales per tensor and per channel, against float64 on the numbers that the cache holds after the step."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

torch = pytest.importorskip("torch")
from tests.gpu import arrays, test_decode, test_pages  # noqa: E402

pytestmark = pytest.mark.gpu
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
STORED = list(LARGEST)
DTYPES = (torch.float16, torch.bfloat16)
HIDDEN = {torch.int8: -128, torch.float8_e4m3fn: math.nan}  # what rows hold that nobody sees


@dataclasses.dataclass
class Step:
    """One step of `batch` entries, each of which has its own number of rows of the cache, and `rows` new ones."""

    batch: int
    heads: tuple[int, int]
    rows: int
    capacity: int
    head_dim: int
    stored: torch.dtype
    dtype: torch.dtype = torch.bfloat16
    per_channel: bool = True
    cache_layout: str = "BHSD"
    window: int = -1

    def __post_init__(self) -> None:
        b, (h, kv), d = self.batch, self.heads, self.head_dim
        self.new = {
            name: torch.randn(b, n, self.rows, d, device="cuda", dtype=self.dtype)
            for name, n in (("query", h), ("key", kv), ("value", kv))
        }
        self.lengths = torch.randint(self.rows, self.capacity + 1, (b,), device="cuda")
        self.lengths[-1] = self.capacity
        shape = (1, kv, 1, d) if self.per_channel else (1,)
        largest = LARGEST[self.stored]
        spread = 4 if self.per_channel else 1.5
        self.scales = [4 / largest * spread ** torch.empty(shape, device="cuda").uniform_(-1, 1) for _ in range(2)]
        self.caches = [self._filled(scale) for scale in self.scales]

    def _filled(self, scale: torch.Tensor) -> torch.Tensor:
        b, kv, d = self.batch, self.heads[1], self.head_dim
        numbers = torch.randn(b, kv, self.capacity, d, device="cuda") / scale
        cache = store(numbers, self.stored)
        beyond = torch.arange(self.capacity, device="cuda") >= self.lengths[:, None]
        cache.view(torch.uint8)[beyond[:, None].expand(b, kv, -1)] = store(
            torch.tensor([float(HIDDEN[self.stored])], device="cuda"), self.stored
        ).view(torch.uint8)
        return cache if self.cache_layout == "BHSD" else cache.transpose(1, 2).contiguous()

    @property
    def given(self) -> dict:
        return {
            **self.new, "past_key": self.caches[0], "past_value": self.caches[1], "cache": "write", "is_causal": True,
            "nonpad_kv_seqlen": self.lengths, "cache_layout": self.cache_layout, "left_window_size": self.window,
            "k_scale": self.scales[0], "v_scale": self.scales[1], "kv_cache_bit_width": 8,
        }  # fmt: skip

    def held(self, which: int) -> torch.Tensor:
        """The cache's numbers in float64, [B, H_kv, capacity, D]."""
        cache = self.caches[which] if self.cache_layout == "BHSD" else self.caches[which].transpose(1, 2)
        return cache.double() * self.scales[which].double()

    def seen(self) -> torch.Tensor:
        return test_decode.visible_keys(self.rows, self.capacity, self.lengths, self.window)

    def run(self, **others: object) -> torch.Tensor:
        import faplugin

        given = exported(self.given)
        out = {"present_key": given["past_key"], "present_value": given["past_value"]}
        return faplugin.attention(**given, **others, return_present=True, out=out)[0]


def store(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that scales have divided, rounded as a cache holds them."""
    numbers = numbers.nan_to_num(math.nan) if dtype.is_floating_point else numbers.round()
    largest = LARGEST[dtype]
    return numbers.clamp(-largest - (dtype == torch.int8), largest).to(dtype)


def exported(given: dict) -> dict:
    """What faplugin.attention takes, of tensors among other arguments."""
    return {n: arrays.exported(x) if isinstance(x, torch.Tensor) else x for n, x in given.items()}


def kernels_of(given: dict, **attributes: object) -> list[str]:
    tensors = {n: x for n, x in given.items() if isinstance(x, torch.Tensor)}
    return arrays.kernels_for(exported(tensors), {n: x for n, x in given.items() if n not in tensors} | attributes)


def check(step: Step) -> None:
    if torch.cuda.get_device_capability() == (9, 0):
        assert kernels_of(step.given)[0] == "decode_sm90"
    before = [step.held(which) for which in range(2)]
    output = step.run()
    inputs = {"query": step.new["query"], "key": step.held(0), "value": step.held(1)}
    test_decode.check(output, test_decode.expected(inputs, step.seen()), step.stored)
    assert arrays.same_bits(step.run(), output)
    row = torch.arange(step.capacity, device="cuda")
    fresh = (row < step.lengths[:, None]) & (row >= step.lengths[:, None] - step.rows)
    for which, name in enumerate(("key", "value")):
        held, new = step.held(which).transpose(1, 2), step.new[name].double().transpose(1, 2)
        assert torch.equal(held[~fresh].nan_to_num(7.0), before[which].transpose(1, 2)[~fresh].nan_to_num(7.0)), name
        unit = step.scales[which].double().squeeze(0).squeeze(1) if step.per_channel else step.scales[which].double()
        near = 0.501 * unit.expand_as(new[0, 0])
        if step.stored.is_floating_point:
            near = torch.maximum(near * 2**-9 * 2, new.abs() * 2**-4 * 1.01)
        inside = new.abs() <= LARGEST[step.stored] * unit
        error = (held[fresh].view_as(new) - new).abs()
        assert (error <= near)[inside.expand_as(error)].all(), name


@pytest.mark.parametrize("head_dim", (16, 32, 64, 80, 96, 128, 160, 192, 256))
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_every_head_size(head_dim: int, stored: torch.dtype) -> None:
    torch.manual_seed(head_dim)
    for dtype, per_channel, layout in zip(DTYPES, (True, False), ("BHSD", "BSHD"), strict=True):
        check(Step(3, (8, 2), 1, 3000, head_dim, stored, dtype, per_channel, layout))
        check(Step(5, (4, 4), 2, 77, head_dim, stored, dtype, not per_channel, layout))


SHAPES = (
    # batch, heads, rows, capacity
    (1, (32, 8), 1, 512),
    (1, (32, 8), 1, 20000),
    (64, (32, 8), 1, 1000),
    (16, (32, 8), 1, 2048),
    (2, (64, 8), 8, 2500),
    (9, (32, 8), 4, 3333),
    (300, (4, 1), 2, 300),
    (1, (71, 1), 2, 4000),
    (4, (32, 8), 1, 16384),
)


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_windows(shape: tuple, stored: torch.dtype) -> None:
    torch.manual_seed(shape[0])
    for head_dim, window in ((128, -1), (64, 200)):
        check(Step(*shape, head_dim, stored, window=window))


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("equal", (False, True))
def test_equal_lengths(stored: torch.dtype, equal: bool) -> None:
    """Heads that are cut alike, shared by a cluster or drawn."""
    torch.manual_seed(1)
    for batch, capacity in ((1, 511), (5, 130), (131, 999), (64, 1200)):
        step = Step(batch, (32, 8), 1, capacity, 128, stored, torch.float16)
        if equal:
            step.lengths.fill_(capacity)
            step.caches = [step._filled(scale) for scale in step.scales]
        check(step)


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("power", (-60, -20, 20, 60))
def test_scales_far_from_one(stored: torch.dtype, power: int) -> None:
    """Queries times scales are operands of float16, whatever their size; those of values only multiply the output."""
    torch.manual_seed(0)
    step = Step(3, (8, 2), 1, 500, 128, stored, torch.bfloat16)
    step.new["query"] *= 2.0**-power
    step.new["key"] *= 2.0**power
    step.scales[0] *= 2.0**power
    step.new["value"] *= 2.0**-power
    step.scales[1] *= 2.0**-power
    check(step)


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("rows", (1, 8))
def test_queries_that_are_not_finite(rows: int, stored: torch.dtype) -> None:
    """What float arithmetic makes of them, and nothing of it in another row."""
    torch.manual_seed(3)
    step = Step(2, (8, 2), rows, 700, 128, stored)
    step.lengths.fill_(700)
    step.caches = [step._filled(scale) for scale in step.scales]
    clean = step.run()
    query = step.new["query"]
    query[0, 1, 0, 5] = math.nan
    query[0, 2, 0, 7] = math.inf  # times keys of both signs
    query[1, 6, 0, 9] = math.inf  # times keys below 0: every score is -inf, as if no key were seen
    step.caches[0].view(torch.uint8)[1, 1, :, 9] = store(torch.tensor([-5.0], device="cuda"), stored).view(torch.uint8)
    step.new["key"][1, 1, :, 9] = -1
    output = step.run()
    assert output[0, 1:3, 0].isnan().all()
    assert (output[1, 6, 0] == 0).all()
    others = torch.ones(output.shape[:3], dtype=torch.bool, device="cuda")
    others[0, 1:3, 0] = others[1, 4:] = False  # heads 4 to 7 have the keys that were changed
    test_decode.check(output[others], clean[others].double(), rows)
    assert output.isfinite()[others].all()


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("page_rows", (16, 48, 64))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_in_pages(page_rows: int, head_dim: int, stored: torch.dtype) -> None:
    torch.manual_seed(page_rows)
    import faplugin

    before, rows = [5000, 0, page_rows - 1, 3, 0, 777], [1, 1, 2, 0, 0, 8]
    problem = test_pages.Problem(page_rows, before, rows, (8, 2), head_dim, torch.float16, poison=0.0)
    scales = [torch.rand(1, 2, 1, head_dim, device="cuda") / 64 + 1 / 64 for _ in range(2)]
    by_row = [scale.transpose(1, 2) for scale in scales]  # [1, 1, H_kv, D]
    pools = [store(pool.float() / scale, stored) for pool, scale in zip(problem.pools, by_row, strict=True)]
    given = problem.given | {"past_key": pools[0], "past_value": pools[1], "kv_cache_bit_width": 8}
    given |= {"k_scale": scales[0], "v_scale": scales[1]}
    if torch.cuda.get_device_capability() == (9, 0):
        assert kernels_of(given)[0] == "decode_sm90"
    output = faplugin.attention(**exported(given))
    for which, (pool, scale) in enumerate(zip(pools, by_row, strict=True)):
        held = pool.double() * scale.double()
        for b, known in enumerate(problem.history):
            page, row = problem.places(b, known[which].shape[1])
            known[which] = held[page, row].transpose(0, 1)
    test_decode.check(output, problem.expected(), page_rows)
    assert arrays.same_bits(faplugin.attention(**exported(given)), output)


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("mode", ("append", "window"))
def test_other_modes(mode: str, stored: torch.dtype) -> None:
    """A past that is joined with new rows elsewhere, and a window that moves in place."""
    import faplugin

    torch.manual_seed(2)
    rows = 1 if mode == "window" else 3
    for head_dim, dtype in itertools.product((64, 128), DTYPES):
        step = Step(4, (8, 2), rows, 900, head_dim, stored, dtype)
        step.lengths.fill_(900)
        step.caches = [step._filled(scale) for scale in step.scales]
        old = [step.held(which) for which in range(2)]
        given = step.given | {"cache": mode}
        if mode == "append":
            del given["nonpad_kv_seqlen"]
            present = [torch.empty_like(x[:, :, :1]).repeat(1, 1, 900 + rows, 1) for x in step.caches]
        else:
            given |= {"left_window_size": 899, "nonpad_kv_seqlen": torch.full((4,), 1234, device="cuda")}
            present = step.caches
        readable = exported(given)
        if torch.cuda.get_device_capability() == (9, 0):
            assert kernels_of(given)[0] == "decode_sm90"
        out = {f"present_{n}": arrays.exported(x) for n, x in zip(("key", "value"), present, strict=True)}
        if mode == "window":
            out = {f"present_{n}": readable[f"past_{n}"] for n in ("key", "value")}
        output = faplugin.attention(**readable, return_present=True, out=out)[0]
        held = [x.double() * scale.double() for x, scale in zip(present, step.scales, strict=True)]
        for which in range(2):
            kept = old[which] if mode == "append" else old[which][:, :, 1:]
            assert torch.equal(held[which][:, :, : kept.shape[2]], kept)
        total = held[0].shape[2]
        seen = test_decode.visible_keys(rows, total, torch.full((4,), total, device="cuda"))
        want = test_decode.expected({"query": step.new["query"], "key": held[0], "value": held[1]}, seen)
        test_decode.check(output, want, mode)


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_caches_are_not_copied(stored: torch.dtype) -> None:
    step = Step(4, (32, 8), 1, 4000, 128, stored)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only decode_sm90 reads quantized caches")
    step.run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run()
    assert torch.cuda.max_memory_allocated() - before < step.caches[0].nbytes / 2
