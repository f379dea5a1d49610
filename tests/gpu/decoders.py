# SPDX-License-Identifier: Apache-2.0
"""faplugin.attention on CUDA for the decoders of tests/decoding.py, which hold their caches in NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterator

import faplugin
import numpy as np
import torch

from tests import decoding
from tests.gpu import arrays

# Each mode with what changes the way of its rows: in place or not, layouts, rotary embedding, quantization, masks.
SAMPLE = [
    decoding.Decoder("write", "float16", rotary="half", head_dim=128, head_dim_v=128, num_q_heads=8),
    decoding.Decoder(
        "write",
        "bfloat16",
        layout="BHSD",
        cache_layout="BSHD",
        rotary="interleaved-partial",
        head_dim=64,
        head_dim_v=64,
        lengths="write_indices",
    ),
    decoding.Decoder("write", "bfloat16", rotary="half-partial", head_dim=40, head_dim_v=24, lengths="both"),
    decoding.Decoder(
        "write", "float16", layout="BSHD", head_dim=32, head_dim_v=256, window_left=4, index_dtype="int32"
    ),
    decoding.Decoder("write", "float16", rotary="half", norm=True, head_dim=64, head_dim_v=64),
    decoding.Decoder("write", "bfloat16", layout="BHSD", in_place=False, mask=True, sinks=True, head_dim=64),
    decoding.Decoder("write", "bfloat16", quantized="int8", cache_layout="BSHD", rotary="interleaved", head_dim_v=7),
    decoding.Decoder("write", "float16", quantized="int8", rotary="half", head_dim=128, head_dim_v=64, num_q_heads=8),
    decoding.Decoder("write", "bfloat16", quantized="float8", per_channel=True, head_dim=32, head_dim_v=256),
    decoding.Decoder(
        "write", "float32", quantized="int4", per_channel=True, in_place=False, head_dim=40, head_dim_v=40
    ),
    decoding.Decoder("append", "float16", in_place=False, rotary="interleaved-partial", alibi=True),
    decoding.Decoder("append", "float32", in_place=False, quantized="float8", cache_layout="BSH", norm=True),
    decoding.Decoder("window", "float16", capacity=9, window_left=5, rotary="half-partial", mask=True),
    decoding.Decoder("window", "float32", capacity=6, window_left=5, in_place=False, head_dim_v=24),
    decoding.Decoder("window", "bfloat16", capacity=8, window_left=7, quantized="int8", head_dim=8, head_dim_v=24),
    decoding.Decoder("paged", "float16", rotary="half-ids", slots=True, page_rows=4, num_q_heads=8, norm=True),
    decoding.Decoder(
        "paged", "float16", rotary="half", page_rows=16, capacity=64, num_q_heads=8, head_dim=128, slots=True
    ),
    decoding.Decoder(
        "paged", "bfloat16", rotary="interleaved-partial", page_rows=32, capacity=64, head_dim=40, batch_size=3
    ),
    decoding.Decoder(
        "paged", "bfloat16", quantized="float8", per_channel=True, rotary="half", page_rows=16, capacity=64, head_dim=64
    ),
    decoding.Decoder(
        "append", "float16", in_place=False, quantized="int8", per_channel=True, head_dim=64, window_left=5
    ),
    decoding.Decoder("paged", "bfloat16", quantized="int4", rotary="half-rows", page_rows=1, softcap=5.0, head_dim_v=7),
    decoding.Decoder("paged", "float32", quantized="float8", per_channel=True, window_left=3, index_dtype="int32"),
]


class OnCuda:
    """Computes a step, on the kernels that can in turns, and asserts that doing it again gives the same bits.

    Args:
        turn: which of the kernels is the first.
    """

    def __init__(self, turn: int = 0):
        self.turn, self.used = turn, set()

    def __call__(self, *operands: np.ndarray, out: dict | None = None, return_present: bool = False, **arguments):
        inputs = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
        attributes = {name: x for name, x in arguments.items() if name not in inputs}
        tensors = {name: arrays.to_cuda(x) for name, x in inputs.items()}
        tensors |= {name: arrays.to_cuda(x) for name, x in zip(("query", "key", "value"), operands, strict=True)}
        readable = {name: arrays.exported(x) for name, x in tensors.items()}
        able = arrays.kernels_for(readable, attributes)
        kernel = able[self.turn % len(able)]
        self.turn += 1
        self.used.add(kernel)
        runs = [
            self._run(tensors, attributes | {"kernel": kernel, "return_present": return_present}, bool(out), i == 0)
            for i in range(2)
        ]
        for first, second in zip(*runs, strict=True):
            assert arrays.same_bits(first, second), f"{kernel}: another result for the same step"
        output, key, value = runs[0]
        pasts = [arguments.get("past_key"), arguments.get("past_value")]
        in_place = bool(out) or attributes.get("cache") == "paged"
        for past, tensor, present in zip(
            pasts, (tensors.get("past_key"), tensors.get("past_value")), (key, value), strict=True
        ):
            if past is not None:  # what the step did to the memory of the past
                past[...] = arrays.to_numpy(present if in_place else tensor)
        if not return_present:
            return arrays.to_numpy(output)
        return (arrays.to_numpy(output), *(pasts if in_place else (arrays.to_numpy(key), arrays.to_numpy(value))))

    @staticmethod
    def _run(tensors: dict, attributes: dict, in_place: bool, keeps_past: bool) -> list[torch.Tensor]:
        """Output, keys and values; a cache that the step changes is a copy."""
        paged = attributes.get("cache") == "paged"
        given = dict(tensors)
        if in_place or paged:
            given |= {name: tensors[name].clone() for name in ("past_key", "past_value")}
        readable = {name: arrays.exported(x) for name, x in given.items()}
        plain = {name: x for name, x in attributes.items() if name != "return_present"}
        if not attributes["return_present"]:
            output = faplugin.attention(**readable, **plain)
            torch.cuda.synchronize()
            return [output, given.get("past_key", output), given.get("past_value", output)]
        if in_place:
            present = [given["past_key"], given["past_value"]]
        else:
            present = [_poisoned_present(tensors, attributes, name) for name in ("key", "value")]
        out = {f"present_{name}": arrays.exported(x) for name, x in zip(("key", "value"), present, strict=True)}
        if in_place:
            out = {name: readable[name.replace("present", "past")] for name in out}
        output = faplugin.attention(**readable, **plain, return_present=True, out=out)[0]
        torch.cuda.synchronize()
        return [output, *present]


def _poisoned_present(tensors: dict, attributes: dict, name: str) -> torch.Tensor:
    """Memory for present_key or present_value."""
    past, fresh = tensors[f"past_{name}"], tensors[name]
    shape = list(past.shape)
    if attributes["cache"] == "append":
        is_bhsd = fresh.ndim == 4 and attributes.get(f"{name}_layout", "BHSD") == "BHSD"
        rows = 2 if attributes.get("cache_layout", "BHSD") == "BHSD" else 1
        shape[rows] += fresh.shape[2 if is_bhsd else 1]
    return arrays.poisoned(shape, past.dtype)


def wild_steps() -> Iterator[None]:
    """Lengths, positions and blocks that point anywhere: the sanitizer sees any step outside. Yields after a call."""
    rng = np.random.default_rng(0)
    for i in range(24):
        mode, limit = ("write", "window", "paged")[i % 3], (2**62, 2**40, 60)[i // 3 % 3]
        new, given = decoding.wild_step(rng, mode, limit)
        decoding.assert_finite(OnCuda()(*new, **given))
        yield
