# SPDX-License-Identifier: Apache-2.0
"""Which tensors share memory, against NumPy, which solves the same question exactly; and what a launch refuses then."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided


def random_view(rng: np.random.Generator, memory: np.ndarray) -> np.ndarray:
    """Some elements of the memory: nested axes, or any strides, backward and 0 too."""
    dtype = rng.choice([np.float32, np.float16, np.int8])
    array = memory.view(dtype)
    rank, first = rng.integers(1, 5), rng.integers(len(array))
    shape = rng.integers(1, 5, rank)
    if rng.random() < 0.5:
        gaps = rng.integers(0, 3, rank)
        strides = np.cumprod([rng.integers(1, 4), *(shape[1:] + gaps[1:])])[::-1]
        strides = strides[rng.permutation(rank)]
    else:
        strides = rng.integers(-9, 10, rank)
    reach = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    low, high = first + sum(min(x, 0) for x in reach), first + sum(max(x, 0) for x in reach)
    if low < 0 or high >= len(array):
        return random_view(rng, memory)
    return as_strided(array[first:], shape, strides * array.itemsize)


def places(array: np.ndarray) -> np.ndarray:
    """The address of each byte of each element, with those of an axis of stride 0 once."""
    array = array[tuple(slice(1) if stride == 0 else slice(None) for stride in array.strides)]
    begin = array.__array_interface__["data"][0]
    for size, stride in zip(array.shape, array.strides, strict=True):
        begin = np.add.outer(begin, np.arange(size) * stride)
    return np.add.outer(begin, np.arange(array.itemsize)).ravel()


def test_views_share_memory_as_numpy_says(fa_csrc):
    rng, memory = np.random.default_rng(0), np.zeros(4096, np.int8)
    found = {True: 0, False: 0}
    for _ in range(20_000):
        a, b = (random_view(rng, memory[: rng.choice([64, 128, 256])]) for _ in range(2))
        expected = np.shares_memory(a, b)
        assert fa_csrc.overlap(a, b) == expected, (a.shape, a.strides, b.shape, b.strides)
        found[expected] += 1
    assert min(found.values()) > 2000


def test_elements_share_memory_where_their_bytes_do(fa_csrc):
    rng, memory = np.random.default_rng(0), np.zeros(4096, np.int8)
    found = {True: 0, False: 0}
    for _ in range(20_000):
        array = random_view(rng, memory)
        bytes_of_all = places(array)
        expected = len(np.unique(bytes_of_all)) < len(bytes_of_all)
        assert fa_csrc.overlaps_itself(array) == expected, (array.shape, array.strides)
        found[expected] += 1
    assert min(found.values()) > 2000


def test_views_of_large_arrays_are_told_apart(fa_csrc):
    """Of sizes that models have: the search doesn't end before it knows."""
    packed = np.empty((8, 4096, 3, 32, 128), np.int8)
    views = [packed[:, :, i].swapaxes(1, 2) for i in range(3)]
    for a, b in itertools.combinations(views, 2):
        assert not fa_csrc.overlap(a, b)
    heads = np.empty((8, 4096, 48, 128), np.int8)
    query, key, value = (heads[:, :, part].swapaxes(1, 2) for part in np.s_[:32, 32:40, 40:])
    assert not any(fa_csrc.overlap(a, b) for a, b in [(query, key), (query, value), (key, value)])
    assert fa_csrc.overlap(query, heads[:, :, 31:39].swapaxes(1, 2))
    assert fa_csrc.overlap(key, heads[:, 1:, 32:40].swapaxes(1, 2)[:, :, ::-1])
    assert not any(fa_csrc.overlaps_itself(x) for x in (*views, query, key[::-1]))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def step(query: np.ndarray, key: np.ndarray, value: np.ndarray, out: np.ndarray) -> dict:
    return {"query": query, "key": key, "value": value, "out": out, "softmax_scale": 1.0}


def test_an_output_may_lie_between_the_rows_of_an_input(fa_csrc):
    memory, key = normal(2, 2, 10, 8), normal(2, 2, 7, 8)
    query, out = memory[:, :, ::2], memory[:, :, 1::2]
    expected = np.empty(out.shape, np.float32)
    assert fa_csrc.attention(step(query.copy(), key, key, expected)) == (0, "")
    assert fa_csrc.attention(step(query, key, key, out)) == (0, "")
    assert np.array_equal(out, expected)
    sentence = "output shares memory with query; give it memory of its own"
    assert fa_csrc.attention(step(query, key, key, memory[:, :, 2:7])) == (1, sentence)


def test_an_output_whose_elements_share_memory_is_refused(fa_csrc):
    rows = as_strided(np.zeros(400, np.float32), (2, 2, 5, 8), (4 * 96, 4 * 48, 4 * 4, 4))
    code, sentence = fa_csrc.attention(step(normal(2, 2, 5, 8), normal(2, 2, 7, 8), normal(2, 2, 7, 8), rows))
    assert code == 1
    assert sentence.startswith("out has strides [96, 48, 4, 1] and shape [2, 2, 5, 8], so that its elements share")


@pytest.mark.parametrize("shift", [0, 1])
def test_gradients_share_memory_with_nothing(fa_csrc, shift):
    """Views of one array side by side, and shifted against each other by a row."""
    query, d_out = normal(2, 4, 5, 8), normal(2, 4, 5, 8)
    problem = step(query, normal(2, 4, 5, 8), normal(2, 4, 5, 8), np.empty((2, 4, 5, 8), np.float32))
    problem["lse"] = np.empty((2, 4, 5), np.float32)
    assert fa_csrc.attention(problem) == (0, "")
    memory = np.empty((2, 6, 3, 4, 8), np.float32)
    d_query, d_key, d_value = (memory[:, :5, i].swapaxes(1, 2) for i in range(3))
    if shift:
        d_value = as_strided(memory[:, 1:, 0], (2, 4, 5, 8), d_query.strides)
    given = {"d_out": d_out, "d_query": d_query, "d_key": d_key, "d_value": d_value}
    refused = (1, "d_value shares memory with d_query; give it memory of its own")
    assert fa_csrc.attention_backward(problem, given) == (refused if shift else (0, ""))
    refused = (1, "d_key shares memory with query; give it memory of its own")
    assert fa_csrc.attention_backward(problem, {**given, "d_key": query[:, ::-1]}) == refused
