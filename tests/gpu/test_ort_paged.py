# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's PagedAttention and what faexport makes of it, both in onnxruntime's CUDA provider: the same results and
the same pages, step by step, and both as float64 says."""

from __future__ import annotations

import dataclasses

import faexport
import numpy as np
import onnxruntime as ort
import pytest

from tests import decoding
from tests.export import paged

CUDA = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="onnxruntime has no CUDA provider"),
]
PLAIN = decoding.Decoder(
    "paged", "float16", layout="BSH", lengths="write_indices", index_dtype="int32", page_rows=16, head_dim=64,
    head_dim_v=64, capacity=64,
)  # fmt: skip
DECODERS = {
    "rotary": dataclasses.replace(PLAIN, rotary="half"),
    "interleaved rotary, slots": dataclasses.replace(PLAIN, rotary="interleaved", slots=True, seed=2),
    "window, softcap": dataclasses.replace(PLAIN, window_left=3, softcap=5.0, rotary="half", seed=3),
    "window of 1": dataclasses.replace(PLAIN, window_left=0, seed=4),
    # In pages of 16 rows PagedAttention has no sinks.
    "sinks, norm": dataclasses.replace(PLAIN, sinks=True, norm=True, rotary="half", page_rows=256, seed=5),
    "large pages, one key head": dataclasses.replace(PLAIN, page_rows=256, num_kv_heads=1, rotary="half", seed=6),
    "int8": dataclasses.replace(PLAIN, quantized="int8", rotary="half", seed=7),
}


class Both:
    """A step by both models on copies of the same pages."""

    def __init__(self, decoder: decoding.Decoder):
        self.decoder = decoder

    def __call__(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, **given) -> np.ndarray:
        ours = paged.arguments_of(self.decoder, query, key, value, given)
        # Rows that nothing was written to are NaN, which PagedAttention may multiply by weights of 0.
        theirs = dict(ours) | {name: _numbers(ours[name]) for name in ("past_key", "past_value")}
        epsilon = {"qk_norm_epsilon": 1e-6} if self.decoder.norm else {}
        model = paged.model_of(self.decoder, ours, **epsilon)
        fused, report = faexport.fuse(model)
        assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
        found = paged.run(fused, ours, providers=[CUDA])
        expected = paged.run(model, theirs, providers=[CUDA])
        np.testing.assert_allclose(found.astype(float), expected.astype(float), atol=6e-3)
        for name in ("past_key", "past_value"):
            if self.decoder.quantized:
                assert (np.abs(ours[name].astype(int) - theirs[name]) <= 1).all(), name
            else:
                np.testing.assert_allclose(_numbers(ours[name]), theirs[name].astype(float), atol=4e-3)
        return found[None]


def _numbers(pages: np.ndarray) -> np.ndarray:
    return np.nan_to_num(pages) if pages.dtype.kind == "f" else pages.copy()


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())
def test_as_paged_attention(decoder: decoding.Decoder) -> None:
    both = Both(decoder)
    if decoder.norm:  # PagedAttention has one epsilon for both norms, tests/decoding.py has two
        with pytest.raises(StopIteration):
            decoding.run(decoder, _Once(both))
        return
    decoding.run(decoder, both, steps=12)


class _Once:
    """One call, whose result float64 does not measure."""

    def __init__(self, step: Both):
        self.step = step

    def __call__(self, *rows: np.ndarray, **given) -> None:
        self.step(*rows, **given)
        raise StopIteration
