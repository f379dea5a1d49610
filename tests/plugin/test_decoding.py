# SPDX-License-Identifier: Apache-2.0
"""Caches in every mode, rotary embedding, norms, quantized caches: random decoders, step by step, against float64.

RANDOM_DECODERS=10000 plays as many (`make nightly` does); 200 are the default.
"""

from __future__ import annotations

import faplugin
import numpy as np
import pytest

from tests import decoding


@pytest.mark.parametrize("chunk", range(decoding.CHUNKS))
def test_random_decoders(chunk: int) -> None:
    decoding.run_chunk(chunk, faplugin.attention)


def test_a_paged_cache_is_written_by_slots_alone_where_they_are_given() -> None:
    """Pages are changed in place; slot -1 stores nothing."""
    cache = np.zeros((3, 4, 1, 8), np.float32)
    key = np.ones((1, 2, 8), np.float32)
    given = {"cu_seqlens_q": np.array([0, 2], np.int32), "write_indices": np.array([0]), "block_table": np.array([[2]])}
    given |= {"slot_mapping": np.array([9, -1]), "past_key": cache, "past_value": cache.copy(), "cache": "paged"}
    faplugin.attention(key, key, key, q_num_heads=1, kv_num_heads=1, is_causal=True, **given)
    assert cache[2, 1].all() and cache.sum() == 8


def paged_step(past_key: np.ndarray, past_value: np.ndarray, **changes) -> np.ndarray:
    """Three rows at positions 2 to 4 of a sequence in the blocks 1 and 0, of four rows each."""
    rng = np.random.default_rng(1)
    new = [rng.standard_normal((1, heads, 3, 8), dtype=np.float32) for heads in (4, 2, 2)]
    given = {"cu_seqlens_q": np.array([0, 3], np.int32), "write_indices": np.array([2]), "is_causal": True}
    given |= {"block_table": np.array([[1, 0]]), "cache": "paged", "past_key": past_key, "past_value": past_value}
    return faplugin.attention(*new, **given | changes)


def interleaved(keys: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """Views of one buffer [blocks, 2, rows, heads, columns]."""
    buffer = np.stack([keys, values], axis=1)
    return [buffer[:, 0], buffer[:, 1]]


PLACES = {
    "keys and values of a block side by side": interleaved,
    "heads outside of rows": lambda *pages: [x.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3) for x in pages],
    "blocks backward": lambda *pages: [x[::-1].copy()[::-1] for x in pages],
}


@pytest.mark.parametrize("place", PLACES)
def test_pages_may_have_strides(place: str) -> None:
    rng = np.random.default_rng(0)
    pages = [rng.standard_normal((3, 4, 2, 8), dtype=np.float32) for _ in range(2)]
    views = PLACES[place](*pages)
    assert not any(x.flags.c_contiguous for x in views)
    np.testing.assert_array_equal(paged_step(*views), paged_step(*pages))
    np.testing.assert_array_equal(views, pages)


def shifted(axis: int) -> list[np.ndarray]:
    """Views of one buffer, the values one element of this axis behind the keys."""
    buffer = np.zeros((4, 5, 3, 8), np.float32)
    values = [slice(1, None) if i == axis else slice(n) for i, n in enumerate((3, 4, 2))]
    return [buffer[:3, :4, :2], buffer[tuple(values)]]


def test_pages_are_memory_that_may_change() -> None:
    pages = [np.zeros((3, 4, 2, 8), np.float32) for _ in range(2)]
    fixed = pages[0].copy()
    fixed.flags.writeable = False
    for views, changes, sentence in (
        ([fixed, pages[1]], {}, "past_key is read-only, but a paged cache is changed in place"),
        ([pages[0], pages[0]], {}, "past_key shares memory with past_value; a paged cache is changed in place"),
        *((shifted(axis), {}, "past_key shares memory with past_value") for axis in range(3)),
        (pages, {"sinks": pages[1][0, 0, 0, :4]}, "past_value shares memory with sinks"),
        (
            [np.lib.stride_tricks.as_strided(x, x.shape, (x.strides[1], *x.strides[1:])) for x in pages],
            {},
            "so that its elements share memory, but it is written",
        ),
        (
            [np.lib.stride_tricks.as_strided(x, x.shape, (0, *x.strides[1:])) for x in pages],
            {},
            "has stride 0 on axis 0",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            paged_step(*views, **changes)
    assert not np.any(pages) and not fixed.any()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["attn_mask", "attn_bias"])
def test_one_column_of_a_mask_is_for_all_positions_of_a_window(name: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    new = [rng.standard_normal((2, 1, rows, 8), dtype=np.float32) for _ in range(3)]
    past = {x: rng.standard_normal((2, 1, 5, 8), dtype=np.float32) for x in ("past_key", "past_value")}
    given = {"cache": "window", "left_window_size": 3, "is_causal": True, "write_indices": np.array([9, 0])} | past
    column = np.array([True, False]) if name == "attn_mask" else np.array([1, -np.inf], np.float32)
    column = column.reshape(2, 1, 1, 1)
    found = faplugin.attention(*new, **given, **{name: column})
    expected = faplugin.attention(*new, **given, **{name: np.repeat(column, 12, axis=3)})
    np.testing.assert_array_equal(found, expected)
    assert found[0].all() and not found[1].any()


def test_packed_sequences_are_rotated_each_by_itself() -> None:
    """Without a cache: the new keys stay in the places that they have."""
    rng = np.random.default_rng(0)
    starts = np.array([0, 3, 3, 8, 10], np.int32)
    new = [rng.standard_normal((1, heads, 11, 16), dtype=np.float32) for heads in (4, 2, 2)]
    angles = np.arange(20)[:, None] * np.ones(8) * 0.3
    given = {"cos_cache": np.cos(angles).astype(np.float32), "sin_cache": np.sin(angles).astype(np.float32)}
    given |= {"k_norm_weight": np.full(16, 1.1, np.float32), "is_causal": True}
    found = faplugin.attention(*new, cu_seqlens_q=starts, cu_seqlens_kv=starts, **given)
    for begin, end in zip(starts, starts[1:], strict=False):
        expected = faplugin.attention(*[np.ascontiguousarray(x[:, :, begin:end]) for x in new], **given)
        np.testing.assert_allclose(found[:, :, begin:end], expected, rtol=0, atol=1e-6)
    assert not found[:, :, 10:].any()


def test_present_has_as_many_rows_as_the_longest_entry() -> None:
    cache, new = np.full((2, 1, 3, 8), 2, np.float32), np.ones((2, 1, 2, 8), np.float32)
    given = {
        "past_key": cache,
        "past_value": cache,
        "write_indices": np.array([3, 1]),
        "cache": "write",
        "is_causal": True,
    }
    given |= {"return_present": True, "kv_extent": np.zeros((2, 5), bool)}
    _, key, _ = faplugin.attention(new, new, new, **given)
    assert key[..., 0].tolist() == [[[2, 2, 2, 1, 1]], [[2, 1, 1, 0, 0]]]


def test_one_buffer_for_keys_and_another_for_values_is_a_mix() -> None:
    cache, new = np.zeros((1, 1, 4, 8), np.float32), np.ones((1, 1, 1, 8), np.float32)
    given = {"past_key": cache, "past_value": cache.copy(), "write_indices": np.array([0]), "cache": "write"}
    with pytest.raises(
        ValueError, match="present_key is the memory of its past and present_value is not; expected both"
    ):
        faplugin.attention(new, new, new, **given, return_present=True, out={"present_key": cache})
    assert not cache.any()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"cache": "ring"}, "cache is 'ring'; expected one of 'append', 'write', 'window', 'paged'"),
        ({"cache": "write"}, "cache = write needs past_key and past_value"),
        ({"cache": "write", "past": 4}, "cache = write needs nonpad_kv_seqlen or write_indices"),
        ({"cache": "window", "past": 4, "write_indices": np.zeros(1, int)}, "needs left_window_size and is_causal"),
        ({"cache": "paged", "past": 4, "write_indices": np.zeros(1, int)}, "cache = paged needs block_table"),
        ({"past": 4, "write_indices": np.zeros(1, int)}, "write_indices goes with cache = write, window or paged"),
        ({"past": 4, "block_table": np.zeros((1, 1), int)}, "block_table goes with cache = paged"),
        ({"kv_extent": np.zeros(3)}, "kv_extent goes with cache = write"),
        ({"cos_cache": np.ones((9, 4), np.float32)}, "cos_cache needs sin_cache beside it"),
        ({"rotary": 5}, r"cos_cache covers 10 columns of a head, expected 2 to the 8 of query"),
        ({"rotary": 3, "rotary_dim": 8}, r"cos_cache has shape \[9, 3\]; expected \[positions, rotary_dim / 2\]"),
        ({"rotary": 2, "rotary_dim": 3}, "rotary_dim is 3; expected an even number"),
        ({"q_norm_weight": np.ones(7, np.float32)}, r"q_norm_weight has shape \[7\]; expected \[head_dim 8\]"),
        ({"past": 4, "kv_cache_bit_width": 4}, "past_key is float32 and kv_cache_bit_width 4; expected uint8 with 4"),
        (
            {"past": 4, "k_scale": np.ones(3, np.float32)},
            r"k_scale has shape \[3\]; expected \[1\] or \[kv heads 1, head_dim 8",
        ),
        ({"past": 4, "k_scale": np.ones(1, np.float32)}, "key has dtype float32, expected int8, uint8"),
        (
            {
                "past_key": np.zeros((1, 1, 4, 8), np.int8),
                "past_value": np.zeros((1, 1, 4, 8), np.int8),
                "k_scale": np.ones(1, np.float32),
            },
            "past_value has dtype int8, expected float32 as query, or v_scale beside it",
        ),
        (
            {"cache": "window", "past": 4, "write_indices": np.zeros(1, int), "left_window_size": 4, "is_causal": True},
            "past_key has 4 rows, expected at least the 5 of the window",
        ),
        (
            {"cache": "window", "past": 4, "write_indices": np.zeros(1, int), "left_window_size": 3, "is_causal": True}
            | {"attn_mask": np.ones((3, 1, 1), bool)},
            r"attn_mask has shape \[3, 1, 1\]; expected .*query rows 1, any number of positions\], rank 1 to 4",
        ),
    ],
)
def test_errors(arguments: dict, sentence: str) -> None:
    new, arguments = np.ones((1, 1, 1, 8), np.float32), dict(arguments)
    if "past" in arguments:
        past = np.zeros((1, 1, arguments.pop("past"), 8), np.float32)
        arguments |= {"past_key": past, "past_value": past.copy()}
    if "rotary" in arguments:
        angles = np.ones((9, arguments.pop("rotary")), np.float32)
        arguments |= {"cos_cache": angles, "sin_cache": angles}
    with pytest.raises(ValueError, match=sentence):
        faplugin.attention(new, new, new, **arguments)


@pytest.mark.parametrize("limit", [2**62, 2**40, 60])
@pytest.mark.parametrize("mode", ["write", "window", "paged"])
def test_wild_lengths_positions_and_blocks_stay_in_their_arrays(mode: str, limit: int) -> None:
    """The sanitizer sees any step outside; here the results must be finite."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        new, given = decoding.wild_step(rng, mode, limit)
        decoding.assert_finite(faplugin.attention(*new, **given))


CHANGES = {
    "softcap": lambda x: x * 1.1,
    "left_window_size": lambda x: x + 1,
    "rotary_interleaved": lambda x: not x,
    "q_norm_weight": lambda x: x * np.float32(1.01),
    "k_norm_epsilon": lambda x: 0.1,
    "sinks": lambda x: x + np.float32(0.1),
    "alibi_slopes": lambda x: x * np.float32(1.1),
    "attn_mask": lambda x: ~x,
    "nonpad_kv_seqlen": lambda x: x - 1,
    "v_scale": lambda x: x * np.float32(1.05),
    "query_lengths": lambda x: x - 1,
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_check_notices(name: str) -> None:
    """A step with one argument changed is found wrong."""
    decoder = decoding.Decoder(
        window_left=4, rotary="half", norm=True, quantized="int8", softcap=5.0, sinks=True, alibi=True, mask=True
    )
    decoding.run(decoder, faplugin.attention, steps=12)

    def changed(*operands: np.ndarray, **arguments):
        return faplugin.attention(*operands, **arguments | {name: CHANGES[name](arguments[name])})

    with pytest.raises(AssertionError):
        decoding.run(decoder, changed, steps=12)
