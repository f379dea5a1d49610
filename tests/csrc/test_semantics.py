# SPDX-License-Identifier: Apache-2.0
"""Properties of csrc/semantics: tile ranges against the element rule, partial softmaxes against the whole, spans."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
small = st.integers(0, 24)
window = st.integers(-1, 12)
rules = st.tuples(small, st.integers(-30, 30), window, window)
score = st.floats(-80, 80, width=32)
FIXTURE = settings(deadline=None, max_examples=200)


@FIXTURE
@given(rule=rules, first=small, count=st.integers(1, 9))
def test_key_range_holds_exactly_what_some_row_sees(fa_csrc, rule, first, count):
    mask = fa_csrc.MaskRule(*rule)
    rows = range(first, first + count)
    begin, end = mask.key_range(rows[0], rows[-1])
    seen = {j for j in range(-40, 80) for i in rows if mask.visible(i, j)}
    assert seen <= set(range(begin, end))
    assert not seen or (min(seen), max(seen) + 1) == (begin, end), "the smallest such span"
    if count == 1:
        assert seen == set(range(begin, end)), "of one row exactly the visible keys"


@FIXTURE
@given(rule=rules, first=small, count=st.integers(1, 9))
def test_full_range_holds_exactly_what_every_row_sees(fa_csrc, rule, first, count):
    mask = fa_csrc.MaskRule(*rule)
    rows = range(first, first + count)
    begin, end = mask.full_range(rows[0], rows[-1])
    assert set(range(begin, end)) == {j for j in range(-40, 80) if all(mask.visible(i, j) for i in rows)}


@FIXTURE
@given(rule=rules, i=small, j=st.integers(-5, 40))
def test_visible_is_the_documented_rule(fa_csrc, rule, i, j):
    kv_length, offset, left, right = rule
    p = i + offset
    expected = 0 <= j < kv_length and (left < 0 or j >= p - left) and (right < 0 or j <= p + right)
    assert fa_csrc.MaskRule(*rule).visible(i, j) == expected


# Offsets and windows up to where a kernel's 32-bit positions end and beyond: clamping must not change what is hidden.
far = st.one_of(st.integers(-30, 30), st.integers(-(1 << 29), 1 << 29), st.integers(-(1 << 40), 1 << 40))
far_window = st.one_of(window, st.integers(0, 1 << 29), st.just(1 << 62))


@FIXTURE
@given(kv_length=small, offset=far, left=far_window, right=far_window, i=st.one_of(small, st.integers(0, 1 << 29)))
def test_a_band_is_the_rule_in_32_bits(fa_csrc, kv_length, offset, left, right, i):
    mask = fa_csrc.MaskRule(kv_length, offset, left, right)
    band = mask.band()
    begin, end = band.first(i, 0), band.end(i, kv_length)
    assert {j for j in range(-2, kv_length + 2) if mask.visible(i, j)} == set(range(begin, end))


def state(scores: list[float]) -> tuple[float, float]:
    """(max, sum of exp(score - max)), as float32."""
    if not scores:
        return -math.inf, 0.0
    top = max(scores)
    return top, float(np.float32(sum(math.exp(s - top) for s in scores)))


def close(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] == b[0] and math.isclose(a[1], b[1], rel_tol=1e-5)


@FIXTURE
@given(parts=st.lists(st.lists(score, max_size=6), min_size=2, max_size=5))
def test_merged_partials_are_the_whole(fa_csrc, parts):
    total = state([])
    for part in parts:
        total = fa_csrc.merge(*total, *state(part))
    assert close(total, state(sum(parts, [])))
    backwards = state([])
    for part in reversed(parts):
        backwards = fa_csrc.merge(*state(part), *backwards)
    assert close(total, backwards)


@FIXTURE
@given(scores=st.lists(score, max_size=6), sink=score)
def test_a_sink_is_one_more_score(fa_csrc, scores, sink):
    assert close(fa_csrc.add_sink(*state(scores), sink), state([*scores, sink]))
    assert fa_csrc.add_sink(*state(scores), -math.inf) == state(scores)


@FIXTURE
@given(scores=st.lists(score, max_size=6))
def test_lse_and_normalizer(fa_csrc, scores):
    top, total = state(scores)
    if not scores:
        assert fa_csrc.lse(top, total) == -math.inf and fa_csrc.normalizer(top, total) == 0
        return
    expected = math.log(sum(math.exp(s) for s in scores))
    assert math.isclose(fa_csrc.lse(top, total), expected, rel_tol=1e-6, abs_tol=1e-5)
    assert math.isclose(fa_csrc.normalizer(top, total), 1 / total, rel_tol=1e-6)


def test_nothing_of_empty_rows_is_nan(fa_csrc):
    assert fa_csrc.merge(-math.inf, 0, -math.inf, 0) == (-math.inf, 0)
    assert fa_csrc.rescale_factor(-math.inf, -math.inf) == 0
    assert fa_csrc.rescale_factor(-math.inf, 3.0) == 0


@FIXTURE
@given(
    dot=st.floats(-1e3, 1e3, width=32),
    scale=st.floats(0.015625, 2, width=32),
    softcap=st.sampled_from([0.0, 15.0, 50.0]),
)
def test_capped(fa_csrc, dot, scale, softcap):
    s = dot * scale
    expected = softcap * math.tanh(s / softcap) if softcap else s
    assert math.isclose(fa_csrc.capped(dot, scale, softcap), expected, rel_tol=1e-6, abs_tol=1e-30)


@FIXTURE
@given(slope=st.floats(0, 1, width=32), position=st.integers(-9, 1 << 20), key=st.integers(0, 1 << 20))
def test_alibi(fa_csrc, slope, position, key):
    assert math.isclose(fa_csrc.alibi_bias(slope, position, key), -slope * abs(position - key), rel_tol=1e-6, abs_tol=0)


any_length = st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 40)


@FIXTURE
@given(lengths=st.lists(st.integers(0, 9), max_size=5), first=st.integers(0, 5), behind=st.integers(0, 5))
def test_packed_sequences_and_what_is_outside_of_them_are_all_rows(fa_csrc, lengths, first, behind):
    cu = np.cumsum([first, *lengths]).astype(np.int32)
    rows, count = int(cu[-1]) + behind, len(lengths)
    indices = {"cu_seqlens_q": cu, "cu_seqlens_kv": cu}
    spans = [fa_csrc.sequence_at(b, rows, rows, indices, 0, False) for b in range(count + 2)]
    covered = [row for s in spans for row in range(s["first_row"], s["first_row"] + s["num_rows"])]
    assert sorted(covered) == list(range(rows)), "each row once"
    for s in spans[count:]:
        assert s["query_length"] == s["num_keys"] == s["kv_length"] == 0
    assert [s["num_rows"] for s in spans[count:]] == [first, behind]


@FIXTURE
@given(
    q=any_length,
    kv=any_length,
    cu=st.lists(any_length, min_size=4, max_size=4),
    packed=st.booleans(),
    wide=st.booleans(),
    bottom_right=st.booleans(),
    rows=small,
    keys=small,
)
def test_no_length_leaves_its_tensor(fa_csrc, q, kv, cu, packed, wide, bottom_right, rows, keys):
    dtype = np.int64 if wide else np.int32
    if packed:
        indices = {"cu_seqlens_q": np.array(cu[:2], np.int32), "cu_seqlens_kv": np.array(cu[2:], np.int32)}
    else:
        indices = {"query_lengths": np.array([q], dtype), "kv_lengths": np.array([kv], dtype)}
    s = fa_csrc.sequence_at(0, rows, keys, indices, 0, bottom_right)
    assert 0 <= s["first_row"] <= s["first_row"] + s["query_length"] <= s["first_row"] + s["num_rows"] <= rows
    assert 0 <= s["first_key"] <= s["first_key"] + s["kv_length"] <= s["first_key"] + s["num_keys"] <= keys
    assert s["offset"] == (s["kv_length"] - s["query_length"] if bottom_right else 0)


@FIXTURE
@given(lengths=st.lists(st.tuples(small, small), min_size=1, max_size=5))
def test_packed_sequences_follow_one_another(fa_csrc, lengths):
    cu_q = np.cumsum([0] + [q for q, _ in lengths]).astype(np.int32)
    cu_kv = np.cumsum([0] + [kv for _, kv in lengths]).astype(np.int32)
    assume(cu_q[-1] > 0)
    for b, (q, kv) in enumerate(lengths):
        indices = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv}
        s = fa_csrc.sequence_at(b, int(cu_q[-1]), int(cu_kv[-1]), indices, 0, False)
        assert (s["batch_idx"], s["first_row"], s["num_rows"]) == (0, cu_q[b], q)
        assert (s["first_key"], s["num_keys"]) == (cu_kv[b], kv)


def found_tiles(fa_csrc, starts: list[int], keys: int, tile_rows: int) -> list[list[int]]:
    """Of each sequence the tiles of its keys that are found."""
    found: list[list[int]] = [[] for _ in starts[1:]]
    for sequence, tile in fa_csrc.key_tile_places(starts, keys, tile_rows):
        if sequence >= 0:
            found[sequence].append(tile)
    return found


def lengths_of(starts: list[int], keys: int) -> list[int]:
    inside = [min(max(start, 0), keys) for start in starts]
    return [max(end - begin, 0) for begin, end in zip(inside, inside[1:], strict=False)]


@FIXTURE
@given(front=small, lengths=st.lists(small, max_size=5), behind=small, tile_rows=st.integers(1, 8))
def test_each_tile_of_keys_of_packed_sequences_is_found_once(fa_csrc, front, lengths, behind, tile_rows):
    starts = [front + sum(lengths[:b]) for b in range(len(lengths) + 1)]
    found = found_tiles(fa_csrc, starts, starts[-1] + behind, tile_rows)
    assert found == [list(range(-(-length // tile_rows))) for length in lengths]


@FIXTURE
@given(starts=st.lists(st.integers(-9, 40), min_size=1, max_size=6), keys=small, tile_rows=st.integers(1, 8))
def test_of_sequences_that_overlap_all_tiles_of_keys_are_found_or_none(fa_csrc, starts, keys, tile_rows):
    found = found_tiles(fa_csrc, starts, keys, tile_rows)
    for tiles, length in zip(found, lengths_of(starts, keys), strict=True):
        assert tiles in ([], list(range(-(-length // tile_rows))))
