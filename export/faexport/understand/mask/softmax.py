# SPDX-License-Identifier: Apache-2.0
"""What a chain of mask terms does to random scores, and what the operator would do with the proven mask, both in numpy.

Called by check.py. Arrays are [B, H, S, T]; the first follows the graph term by term in the scores' own precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from faexport import spec
from faexport.understand.mask.magnitudes import largest
from faexport.understand.mask.site import Site


class Skip(Exception):
    """These sizes can't be tried."""


Arrays = Mapping[ir.Value, np.ndarray]


def original(
    site: Site,
    terms: Sequence[spec.MaskTerm],
    arrays: Arrays,
    scores: np.ndarray,
    mask: spec.Mask,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Probabilities [B, H, S, T] as the graph computes them; a row of -inf gives 0 where the operator gives 0. `sinks`
    are [1, H, 1, 1]."""
    s = _masked(site, terms, arrays, scores)
    with np.errstate(all="ignore"):
        p = _softmax(s.astype(np.float64), sinks, _kept(terms, arrays, scores.shape))
    if mask.empty_row is spec.EmptyRow.ZERO:
        p = np.nan_to_num(p)
    for term in terms:
        if term.kind is spec.TermKind.ZERO:
            kept = arrays[term.value].astype(bool) == term.keep_when
            p = _merged(np.where(kept, _split(term, p, arrays), 0), term, scores.shape)
        if term.kind is spec.TermKind.EMPTY_ROW:
            kept = arrays[term.value].any(axis=-1, keepdims=True)
            p = _merged(np.where(kept, _split(term, p, arrays), 0), term, scores.shape)
    return p


def _masked(site: Site, terms: Sequence[spec.MaskTerm], arrays: Arrays, scores: np.ndarray) -> np.ndarray:
    s = scores.astype(site.scores.dtype.numpy())
    with np.errstate(all="ignore"):
        for term in terms:
            if term.kind.meets_scores:
                s = _merged(_apply(term, arrays, _split(term, s, arrays)), term, scores.shape)
    return s


def _kept(terms: Sequence[spec.MaskTerm], arrays: Arrays, shape: tuple[int, ...]) -> np.ndarray:
    """What the exponentials are multiplied by: 0 where a term hides them, else 1."""
    kept = np.ones(shape)
    for term in terms:
        if term.kind is spec.TermKind.HIDDEN:
            stays = arrays[term.value].astype(bool) == term.keep_when
            kept = _merged(np.where(stays, _split(term, kept, arrays), 0), term, shape)
    return kept


def highest(site: Site, terms: Sequence[spec.MaskTerm], arrays: Arrays, scores: np.ndarray) -> np.ndarray:
    """[B, H, S]: the highest score of each row after masking."""
    return _masked(site, terms, arrays, scores).astype(np.float64).max(axis=-1)


def _apply(term: spec.MaskTerm, arrays: Arrays, s: np.ndarray) -> np.ndarray:
    value = arrays[term.value]
    factor = np.asarray(term.factor).astype(s.dtype)
    if term.kind is spec.TermKind.ADD:
        return (((s / factor).astype(s.dtype) + value.astype(s.dtype)).astype(s.dtype) * factor).astype(s.dtype)
    if term.kind is spec.TermKind.CLAMP:
        above = np.maximum(s, (value * factor).astype(s.dtype))
        if term.node.op_type != "Clip":
            return above
        return np.minimum(above, np.asarray(largest(ir.DataType.from_numpy(s.dtype)) * factor, s.dtype))
    if term.kind is spec.TermKind.MIN:
        return np.minimum(s, (value * factor).astype(s.dtype))
    if term.kind is spec.TermKind.GATE:
        return s * value.astype(s.dtype)
    fill = np.asarray(-np.inf) if term.fill is None else arrays[term.fill] * factor
    return np.where(value.astype(bool) == term.keep_when, s, fill.astype(s.dtype))


def _split(term: spec.MaskTerm, s: np.ndarray, arrays: Arrays) -> np.ndarray:
    """Scores [B, H, S, T] with the axes that the term's value is broadcast against."""
    batch, heads, rows, columns = s.shape
    sizes = {"B": batch, "H": heads, "S": rows, "T": columns, "N": batch * heads}
    value = arrays[term.value]
    for outer, inner, whole in (("K", "G", heads), ("M", "W", batch)):
        if inner in term.axes:
            known = dict(zip(term.axes, term.dims, strict=False)).get(inner)
            at = term.axes.index(inner) - len(term.axes) + value.ndim
            size = known.const if known is not None else None
            size = size or (value.shape[at] if at >= 0 else 1)
            sizes[inner], sizes[outer] = size, whole // size
    order = _by_rank(term)
    try:
        split = s.reshape([sizes[letter] for letter in order])
    except (ValueError, KeyError):
        raise Skip from None
    return split.transpose([order.index(letter) for letter in term.axes])


def _by_rank(term: spec.MaskTerm) -> list[str]:
    """The term's axes in the order of [B, H, S, T]: batch and its parts, heads and theirs, rows, columns."""
    try:
        return sorted(term.axes, key="BMWNHKGST".index)
    except ValueError:
        raise Skip from None


def _merged(s: np.ndarray, term: spec.MaskTerm, shape: tuple[int, ...]) -> np.ndarray:
    s = s.transpose([term.axes.index(letter) for letter in _by_rank(term)])
    if s.size != np.prod(shape):
        raise Skip
    return s.reshape(shape)


def _softmax(s: np.ndarray, sinks: np.ndarray | None, kept: np.ndarray | float = 1.0) -> np.ndarray:
    highest = s.max(axis=-1, keepdims=True)
    highest = highest if sinks is None else np.maximum(highest, sinks)
    e = np.exp(s - highest) * kept
    return e / (e.sum(axis=-1, keepdims=True) + (0 if sinks is None else np.exp(sinks - highest)))


def proven(mask: spec.Mask, arrays: Arrays, scores: np.ndarray, sinks: np.ndarray | None = None) -> np.ndarray:
    """Probabilities [B, H, S, T] of the operator with this mask (docs/operator.md)."""
    batch, heads, rows, columns = scores.shape
    keys = np.arange(columns)
    positions = np.arange(rows)[None, :] + _offset(mask, arrays, rows, columns)  # [1 or B, S]
    distance = (positions[:, :, None] - keys)[:, None]  # [1 or B, 1, S, T]
    seen = np.ones_like(scores, bool)
    if mask.window_left >= 0:
        seen &= distance <= mask.window_left
    if mask.window_right >= 0:
        seen &= -distance <= mask.window_right
    if mask.kv_lengths is not None:
        seen &= keys < arrays[mask.kv_lengths].reshape(-1, 1, 1, 1)
    if mask.attn_mask is not None:
        seen &= arrays[mask.attn_mask]
    s = scores.astype(np.float32)  # as the kernels add
    with np.errstate(all="ignore"):
        if mask.attn_bias is not None:
            s = s + arrays[mask.attn_bias].astype(np.float32)
        if mask.alibi_slopes is not None:
            s = s - arrays[mask.alibi_slopes].reshape(-1, heads, 1, 1) * np.abs(distance).astype(np.float32)
    s = np.where(seen, s, -np.inf).astype(np.float64)
    with np.errstate(all="ignore"):
        p = np.nan_to_num(_softmax(s, sinks))
    if mask.empty_row is spec.EmptyRow.MEAN and sinks is None:
        p = np.where(seen.any(axis=-1, keepdims=True), p, 1 / columns)
    return p if mask.empty_rows is None else _mended(p, mask.empty_rows, arrays)


def _mended(p: np.ndarray, empty: spec.EmptyRows, arrays: Arrays) -> np.ndarray:
    """What the nodes behind the operator make of its probabilities in rows without a visible key."""
    sums = np.zeros_like(p)
    if empty.keys is not None:
        sums = sums + arrays[empty.keys]
    if empty.row_keys is not None and empty.row_kept is not None:
        rows, (batch, heads) = p.shape[-2], arrays[empty.row_kept].shape[:2]
        picked = np.arange(p.shape[-1]) == arrays[empty.row_keys].reshape(-1, 1)[:rows]
        kept = arrays[empty.row_kept].reshape(batch, heads, -1, 1)[:, :, :rows]
        sums = sums + np.cumsum(picked & kept, axis=-2)
    mended = arrays[empty.output_weight] * p + arrays[empty.value_weight] * sums
    return np.where(arrays[empty.rows], mended, p)


def _offset(mask: spec.Mask, arrays: Arrays, rows: int, columns: int) -> np.ndarray:
    if mask.query_offset is not None:
        return arrays[mask.query_offset].reshape(-1, 1)
    return np.full((1, 1), columns - rows if mask.alignment is spec.Alignment.BOTTOM_RIGHT else 0)
