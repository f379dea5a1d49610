# SPDX-License-Identifier: Apache-2.0
"""Caches on CUDA: the random decoders of tests/decoding.py against float64, on every kernel that can run a step; large
ones against the CPU; CUDA graphs.

RANDOM_DECODERS=10000 plays as many; 200 are the default.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests import cases, decoding

torch = pytest.importorskip("torch")
from tests.gpu import arrays, decoders  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("chunk", range(decoding.CHUNKS))
def test_random_decoders(chunk: int) -> None:
    decoding.run_chunk(chunk, decoders.OnCuda())


@pytest.mark.parametrize("decoder", decoders.SAMPLE, ids=str)
def test_every_kernel_plays(decoder: decoding.Decoder) -> None:
    """Each kernel of the table plays the whole sequence, where it can."""
    used = set()
    for turn in range(4):
        on_cuda = decoders.OnCuda(turn)
        decoding.run(decoder, on_cuda, steps=8)
        used |= on_cuda.used
    assert "prefill_sm80" in used
    if decoder.mode != "paged":
        assert "decode_splitkv" in used


# ------------------------------------------------------------------------------------------ large ones, and the CPU

LARGE = {
    "write": {"cache": "write"},
    "write-bshd": {"cache": "write", "cache_layout": "BSHD"},
    "write-copied": {"cache": "write", "in_place": False},
    "write-window": {"cache": "write", "left_window_size": 200},
    "window": {"cache": "window", "left_window_size": 700, "capacity": 701},
    "window-slack": {"cache": "window", "left_window_size": 500, "capacity": 777},
    "append": {"cache": "append"},
    "paged": {"cache": "paged"},
    "int8": {"cache": "write", "quantized": "int8"},
    "int4-append": {"cache": "append", "quantized": "int4"},
    "float8-paged": {"cache": "paged", "quantized": "float8"},
    "int8-window": {"cache": "window", "left_window_size": 300, "capacity": 320, "quantized": "int8"},
}


class LargeDecoder:
    """A decoder of LARGE: what all its steps are given, and the caches that the CPU and CUDA have filled so far."""

    batch, heads, kv_heads, dim, page_rows = 2, 8, 2, 128, 16

    def __init__(self, kind: str, dtype: str):
        self.rng = np.random.default_rng(len(kind))
        self.options = {"capacity": 1300, "quantized": "", "in_place": True, **LARGE[kind]}
        names = ("capacity", "quantized", "in_place")
        self.capacity, self.quantized, self.in_place = (self.options.pop(name) for name in names)
        self.paged, self.append = (self.options["cache"] == cache for cache in ("paged", "append"))
        self.element = cases.DTYPES[dtype]
        self.pages = -(-self.capacity // self.page_rows)  # of a sequence
        self.given = self._given()
        stored = decoding.QUANTIZED.get(self.quantized, self.element)
        self.caches = {where: [np.zeros(self._cache_shape(), stored) for _ in range(2)] for where in ("cpu", "cuda")}
        self.length = 0

    def _cache_shape(self) -> tuple[int, ...]:
        columns = self.dim // 2 if self.quantized == "int4" else self.dim
        if self.paged:
            return (self.batch * self.pages, self.page_rows, self.kv_heads, columns)
        if self.options.get("cache_layout") == "BSHD":
            return (self.batch, self.capacity, self.kv_heads, columns)
        return (self.batch, self.kv_heads, 0 if self.append else self.capacity, columns)

    def _given(self) -> dict:
        half = self.dim // 2
        angles = np.arange(1400)[:, None] / 10000.0 ** (np.arange(half) / half)
        given = {
            "cos_cache": np.cos(angles).astype(self.element),
            "sin_cache": np.sin(angles).astype(self.element),
            "is_causal": True,
            "q_norm_weight": np.ones(self.dim, self.element),
            "k_norm_weight": np.ones(self.dim, self.element),
        }
        if self.quantized:
            scale = np.array([3.5 / decoding.LARGEST[self.quantized]], np.float32)
            given |= {"k_scale": scale, "v_scale": scale.copy()}
            given["kv_cache_bit_width"] = 4 if self.quantized == "int4" else 8
        if self.paged:
            given["block_table"] = self.rng.permutation(self.batch * self.pages).reshape(self.batch, self.pages)
        return given

    def step(self, rows: int, attentions: dict) -> dict[str, np.ndarray]:
        """The outputs of this many new rows, by where they were computed; the caches are filled on."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        shapes = [(self.batch, h, rows, self.dim) for h in heads]
        new = [self.rng.standard_normal(shape, np.float32).astype(self.element) for shape in shapes]
        step = {} if self.append else {"write_indices": np.full(self.batch, self.length)}
        if self.paged:
            new = [x.transpose(1, 0, 2, 3).reshape(1, x.shape[1], self.batch * rows, self.dim) for x in new]
            step["cu_seqlens_q"] = np.array([0, rows, 2 * rows], np.int32)
        self.length += rows
        return {where: self._attend(where, attention, new, step) for where, attention in attentions.items()}

    def _attend(self, where: str, attention, new: list[np.ndarray], step: dict) -> np.ndarray:
        past = {"past_key": self.caches[where][0], "past_value": self.caches[where][1]}
        if self.paged:
            return attention(*new, **past, **self.given, **step, **self.options)
        out = {"present_key": past["past_key"], "present_value": past["past_value"]}
        place = {"out": out} if self.in_place and not self.append else {}
        arguments = {**past, **self.given, **step, **self.options, **place}
        output, *self.caches[where] = attention(*new, return_present=True, **arguments)
        return output


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
@pytest.mark.parametrize("kind", LARGE)
def test_large_steps_as_on_the_cpu(kind: str, dtype: str) -> None:
    """A long prompt, a chunk and single steps: outputs and caches are those of the CPU kernel."""
    import faplugin

    decoder = LargeDecoder(kind, dtype)
    tolerance = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-4 if decoder.quantized else 2e-5}[dtype]
    for rows in (900, 300, 1, 1, 1):
        results = decoder.step(rows, {"cpu": faplugin.attention, "cuda": decoders.OnCuda()})
        difference = np.abs(results["cuda"].astype(np.float64) - results["cpu"].astype(np.float64)).max()
        assert difference <= tolerance, f"output after {decoder.length} rows: {difference:.3g}"
        for found, expected in zip(decoder.caches["cuda"], decoder.caches["cpu"], strict=True):
            check_stored(found, expected, dtype, decoder.quantized)


def check_stored(found: np.ndarray, expected: np.ndarray, dtype: str, quantized: str) -> None:
    """The same but for roundings that went the other way; those are few."""
    if quantized in ("int8", "int4"):
        numbers = [np.stack([x & 15, x >> 4]) if quantized == "int4" else x for x in (found, expected)]
        step = np.abs(numbers[0].astype(int) - numbers[1].astype(int))
        assert step.max() <= 1 and (step != 0).mean() < 1e-3
        return
    epsilon = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2e-6}[dtype] if not quantized else 2**-3
    a, b = found.astype(np.float64), expected.astype(np.float64)
    smallest = 1 if dtype == "float32" and not quantized else 2**-6  # a rotation of numbers around 1 ends near 0
    assert (np.abs(a - b) <= epsilon * np.maximum(np.abs(b), smallest)).all()
    assert dtype == "float32" or (a != b).mean() < 1e-2


# ------------------------------------------------------------------------------------------ no cache, and a past

TRANSFORMS = {
    "rows": {"angles": "rows"},
    "positions": {"angles": "ids", "head_dim": 64},
    "own positions": {"angles": "own", "head_dim": 256},
    "pairs": {"interleaved": True, "dtype": "bfloat16"},
    "pairs, a part of 80 columns": {"interleaved": True, "pairs": 20, "head_dim": 80},
    "a part of 96 columns": {"pairs": 24, "head_dim": 96, "angles": "own"},
    "pairs that are no multiple of four": {"pairs": 5, "head_dim": 40},
    "norm": {"norm": True, "angles": "none", "dtype": "bfloat16"},
    "norm and rotation": {"norm": True},
    "norm and rotation in float32": {"norm": True, "dtype": "float32", "head_dim": 64},
    "angles and weights in float32": {"norm": True, "table": "float32"},
    "heads behind rows": {"layout": "BHSD", "norm": True},
    "one batch entry's angles": {"shared": True},
    "packed": {"angles": "ids", "packed": True},
    "packed, own positions": {"angles": "own", "packed": True},
    "a past": {"past": 37, "norm": True},
    "a past, own positions": {"past": 5, "angles": "own", "head_dim": 64},
    "a past, heads behind rows": {"past": 130, "layout": "BHSD", "head_dim": 96, "angles": "ids"},
}


@pytest.mark.parametrize("rows", (1, 75))
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_rows_are_transformed_as_on_the_cpu(kind: str, rows: int) -> None:
    """Norms and rotary embeddings of rows that join no cache or are appended, of which columns a kernel takes eight at
    a time: attention to them, and the present, are those of the CPU kernel."""
    import faplugin

    form = {"angles": "rows", "head_dim": 128, "interleaved": False, "dtype": "float16", "norm": False, "past": 0}
    form |= {"layout": "BSHD", "shared": False, "packed": False, "table": "", **TRANSFORMS[kind]}
    rng = np.random.default_rng(len(kind))
    batch, heads, dim = 1 if form["packed"] else 3, (6, 2, 2), form["head_dim"]
    element, table = cases.DTYPES[form["dtype"]], cases.DTYPES[form["table"] or form["dtype"]]

    def normal(count: int, length: int, layout: str) -> np.ndarray:
        shape = (batch, count, length, dim) if layout == "BHSD" else (batch, length, count, dim)
        return rng.standard_normal(shape, np.float32).astype(element)

    operands = [normal(count, rows, form["layout"]) for count in heads]
    given: dict = {
        "cache": "append",
        "is_causal": True,
        "rotary_interleaved": form["interleaved"],
        "return_present": form["past"] > 0,
    }
    given |= {f"{name}_layout": form["layout"] for name in ("query", "key", "value")}
    if form["angles"] != "none":
        shape = (1 if form["shared"] else batch, rows) if form["angles"] == "rows" else (200,)
        angles = rng.uniform(0, 6, (*shape, form.get("pairs", dim // 2)))
        given |= {"cos_cache": np.cos(angles).astype(table), "sin_cache": np.sin(angles).astype(table)}
    if form["angles"] == "ids":
        given["position_ids"] = rng.integers(0, 200, (batch, rows))
    if form["norm"]:
        given |= {f"{x}_norm_weight": rng.uniform(0.5, 2, dim).astype(table) for x in "qk"}
    if form["packed"]:
        given |= {f"cu_seqlens_{x}": np.array([0, rows // 3, rows], np.int32) for x in ("q", "kv")}
    if form["past"]:
        given |= {f"past_{x}": normal(2, form["past"], "BHSD") for x in ("key", "value")}
    found = [attention(*operands, **given) for attention in (faplugin.attention, decoders.OnCuda())]
    outputs = [x if form["past"] else (x,) for x in found]
    tolerance = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5}[form["dtype"]]
    difference = np.abs(outputs[0][0].astype(np.float64) - outputs[1][0].astype(np.float64)).max()
    assert difference <= tolerance, f"{difference:.3g}"
    for expected, present in zip(outputs[0][1:], outputs[1][1:], strict=True):
        check_stored(present, expected, form["dtype"], "")


# ------------------------------------------------------------------------------------------ CUDA graphs


class DecoderOnDevice:
    """A decoder of single steps, whose lengths and new rows lie on the device, where they change between steps."""

    batch, heads, kv_heads, dim = 3, 8, 2, 64

    def __init__(self, mode: str, quantized: str):
        torch.manual_seed(0)
        self.paged = mode == "paged"
        self.stored = torch.int8 if quantized else torch.float16
        self.new = [self._normal(heads) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        self.lengths = torch.tensor([1, 9, 30], device="cuda")
        half = self.dim // 2
        angles = torch.arange(128, device="cuda")[:, None] / torch.pow(100.0, torch.arange(half, device="cuda") / 32)
        self.given: dict = {"cos_cache": angles.cos().half(), "sin_cache": angles.sin().half()}
        self.given |= {"cache": mode, "is_causal": True, "write_indices": self.lengths}
        if quantized:
            self.given |= {name: torch.tensor([0.03], device="cuda") for name in ("k_scale", "v_scale")}
        if mode == "window":
            self.given["left_window_size"] = 40
        if self.paged:
            self.given["cu_seqlens_q"] = torch.arange(self.batch + 1, dtype=torch.int32, device="cuda")
            self.given["block_table"] = torch.randperm(self.batch * 8, device="cuda").reshape(self.batch, 8)

    def _normal(self, heads: int) -> torch.Tensor:
        shape = (1, heads, self.batch, self.dim) if self.paged else (self.batch, heads, 1, self.dim)
        return torch.randn(shape, device="cuda", dtype=torch.float16)

    def caches(self) -> list[torch.Tensor]:
        rows = (self.batch * 8, 8, self.kv_heads) if self.paged else (self.batch, self.kv_heads, 64)
        return [torch.zeros((*rows, self.dim), dtype=self.stored, device="cuda") for _ in range(2)]

    def step(self, caches: list[torch.Tensor], output: torch.Tensor) -> None:
        import faplugin

        out = {"output": output}
        present = {}
        if not self.paged:
            out |= {"present_key": caches[0], "present_value": caches[1]}
            present["return_present"] = True
        faplugin.attention(*self.new, past_key=caches[0], past_value=caches[1], **self.given, **present, out=out)


@pytest.mark.parametrize("mode", ("write", "window", "paged"))
@pytest.mark.parametrize("quantized", ("", "int8"))
def test_a_graph_decodes_with_lengths_on_the_device(mode: str, quantized: str) -> None:
    """Captured once and replayed while positions advance on the device: the same bits as calls of their own."""
    decoder = DecoderOnDevice(mode, quantized)
    recorded, plain, warm = (decoder.caches() for _ in range(3))
    outputs = [torch.empty_like(decoder.new[0]) for _ in range(2)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decoder.step(warm, outputs[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with arrays.captured_by(graph, stream):
            decoder.step(recorded, outputs[0])
        for replay in range(40 if mode == "window" else 30):
            for x in decoder.new:
                x.normal_()
            graph.replay()
            decoder.step(plain, outputs[1])
            torch.cuda.synchronize()
            assert arrays.same_bits(*outputs), replay
            assert all(arrays.same_bits(a, b) for a, b in zip(recorded, plain, strict=True)), replay
            decoder.lengths += 1


@pytest.mark.parametrize("name", ("write_indices", "nonpad_kv_seqlen"))
@pytest.mark.parametrize("apart", (0, 50))
def test_many_steps_in_a_row(apart: int, name: str) -> None:
    """Each launch may come while the one before still ends: the result is that of waiting for each.

    A kernel right in front of each step changes the lengths.
    """
    import faplugin

    torch.manual_seed(3)
    results = []
    for waits in (True, False):
        torch.manual_seed(4)
        caches = [torch.zeros(8, 4, 700, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        angles = torch.rand(700, 64, device="cuda")
        lengths = torch.arange(8, device="cuda") * apart + (name == "nonpad_kv_seqlen")
        query = torch.randn(8, 16, 1, 128, device="cuda", dtype=torch.bfloat16)
        for _ in range(200):
            query = faplugin.attention(
                query, query[:, :4].contiguous(), query[:, 4:8].contiguous(), past_key=caches[0], past_value=caches[1],
                cache="write", **{name: lengths}, is_causal=True, cos_cache=angles.cos(), sin_cache=angles.sin(),
                return_present=True, out={"present_key": caches[0], "present_value": caches[1]},
            )[0]  # fmt: skip
            query = query / query.float().std().to(query.dtype)
            lengths += 1
            if waits:
                torch.cuda.synchronize()
        results.append([query, *caches])
    torch.cuda.synchronize()
    assert all(arrays.same_bits(a, b) for a, b in zip(*results, strict=True))
    assert torch.isfinite(results[0][0]).all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_what_memory_held_before_changes_no_bit(dtype: torch.dtype) -> None:
    """Rotated queries stand in the workspace. Those not in use share warps with others, and with them the decision
    whether a maximum is moved."""
    torch.manual_seed(5)
    heads, rows, capacity, dim = 16, 256, 1024, 128
    new = [torch.randn(2, heads, rows, dim, device="cuda", dtype=dtype) for _ in range(3)]
    caches = [torch.randn(2, heads, capacity, dim, device="cuda", dtype=dtype) for _ in range(2)]
    angles = torch.rand(capacity, dim // 2, device="cuda")
    given = {
        **dict(zip(("query", "key", "value"), new, strict=True)), "past_key": caches[0], "past_value": caches[1],
        "write_indices": torch.tensor([700, 600], device="cuda"),
        "query_lengths": torch.tensor([rows, rows - 7], device="cuda"),
        "cos_cache": angles.cos().to(dtype), "sin_cache": angles.sin().to(dtype),
    }  # fmt: skip
    attributes = {"cache": "write", "is_causal": True}
    for kernel in arrays.kernels_for(given, attributes):
        outputs = [_attention_in_memory_of(number, given, attributes, caches, kernel) for number in (0.0, 100.0)]
        assert outputs[0].isfinite().all()
        assert arrays.same_bits(*outputs), kernel


def _attention_in_memory_of(
    number: float, given: dict, attributes: dict, caches: list[torch.Tensor], kernel: str
) -> torch.Tensor:
    """The output of a step that writes its cache in place, in a workspace that held `number` before."""
    import faplugin

    call = faplugin._attention.bind({**given, **attributes, "return_present": True}, None)
    output = torch.empty_like(given["query"])
    num_bytes = call.prepare([output, *caches], kernel)
    dtype = output.dtype
    call.run(torch.full((num_bytes // dtype.itemsize + 1,), number, device="cuda", dtype=dtype), num_bytes, 0)
    return output


def test_means_of_rows_without_keys_are_those_of_the_keys_in_use() -> None:
    import faplugin

    rng = np.random.default_rng(1)
    caches = [rng.standard_normal((2, 2, 40, 32), np.float32).astype(ml_dtypes.bfloat16) for _ in range(2)]
    new = [rng.standard_normal((2, h, 3, 32), np.float32).astype(ml_dtypes.bfloat16) for h in (4, 2, 2)]
    given = {"cache": "write", "write_indices": np.array([9, 20]), "attn_mask": np.zeros((2, 1, 3, 40), bool),
             "empty_row": "mean", "return_present": True}  # fmt: skip
    expected = faplugin.attention(*new, past_key=caches[0], past_value=caches[1], **given)
    found = decoders.OnCuda()(*new, past_key=caches[0], past_value=caches[1], **given)
    np.testing.assert_allclose(found[0].astype(float), expected[0].astype(float), rtol=0, atol=4e-3)
