# SPDX-License-Identifier: Apache-2.0
"""python -m tests.gpu.sanitizer_sample PART: small cases of every kernel, for compute-sanitizer. Prints how many ran.

In parts, since a sanitizer keeps a processor busy for minutes, and processes of their own run side by side.
"""

from __future__ import annotations

import sys

from tests import cases, decoding
from tests.gpu import arrays, decoders, gradients


def sample() -> list[cases.Case]:
    """Each kind of mask once and head sizes that are padded, unaligned or whole, in turns of dtype and layout; NaN."""
    chosen = []
    dims = (64, 128, 33, 80, 256, 96, 1, 192)
    for i, fields in enumerate(cases.MASKS.values()):
        dtype, layout = list(cases.DTYPES)[i % 3], ("BHSD", "BSHD", "BSH")[i // 3 % 3]
        chosen.append(
            cases.Case(dtype, 2, 2, 1, (130, 7, 65)[i % 3], (129, 70, 200)[i % 3], dims[i % 8], 0, layout, **fields)
        )
    for i, fields in enumerate([*cases.MASKS.values()][::4]):  # float32 in both precisions, none of its heads unaligned
        precision, head_dim = ("tf32", "tf32x3")[i % 2], (64, 128, 40, 256, 96)[i % 5]
        shape = (2, 2, 1, (130, 7, 65)[i % 3], (129, 70, 200)[i % 3], head_dim)
        chosen.append(cases.Case("float32", *shape, **fields, float32_precision=precision))
    # Rows that see no key, among them the first of a bias, in front of which nothing may be read.
    band = {"is_causal": True, "window_left": 60, "alignment": "bottom_right", "bias": "1HQK"}
    for seed in range(2):
        chosen.append(
            cases.Case("bfloat16", 3, 2, 2, 130, 70, 64, **band, kv_lengths=True, query_lengths=True, seed=seed)
        )
    # Tiles of early rows and late ones (place_rows), of two, three, two, three and four times 64 rows.
    folded = {"is_causal": True, "alignment": "bottom_right"}
    chosen.append(cases.Case("float16", 1, 100, 50, 65, 65, 128, **folded))
    chosen.append(cases.Case("bfloat16", 1, 100, 50, 130, 130, 96, **folded))
    chosen.append(cases.Case("bfloat16", 1, 2, 1, 450, 450, 256, **folded))
    chosen.append(cases.Case("float32", 1, 2, 1, 450, 450, 64, **folded))
    chosen.append(cases.Case("float32", 1, 2, 1, 450, 450, 64, **folded, float32_precision="tf32"))
    hidden = [case for case in cases.systematic() if case.nan in ("value", "hidden")]
    return chosen + cases.wide()[::9] + hidden[::23]


def in_circles() -> list[cases.Case]:
    """So many tiles of rows, and once so many of keys, that backward_sm90's buffers are used again.

    For the backward pass alone: in prefill_sm90 one lane of a warp, after __syncwarp, says for all of them that a tile
    has been read. racecheck does not know that order, and reports the others' reads where the place is used again.
    """
    band = {"is_causal": True, "window_left": 150}
    return [
        cases.Case("bfloat16", 1, 4, 2, 450, 450, 64, **band),
        cases.Case("float16", 1, 4, 2, 450, 450, 128, **band),
        cases.Case("bfloat16", 1, 4, 2, 450, 450, 256, **band),
        cases.Case("bfloat16", 70, 4, 4, 70, 260, 64, kv_lengths=True),
        cases.Case("bfloat16", 35, 4, 4, 70, 130, 128),
        cases.Case("bfloat16", 1, 2, 1, 2060, 260, 128),
        cases.Case("float16", 35, 2, 2, 70, 130, 192),
        cases.Case("bfloat16", 35, 4, 4, 70, 136, 64, bias="1HQK"),
        cases.Case("float16", 2, 4, 2, 450, 456, 128, bias="BHQK", **band),
        cases.Case("float16", 4, 4, 2, 450, 450, 64, packed=True, outside=True, **band),
        cases.Case("bfloat16", 3, 4, 2, 450, 450, 128, packed=True, outside=True, **band),
        cases.Case("bfloat16", 40, 4, 4, 130, 260, 64, packed=True),
        cases.Case("float16", 40, 4, 4, 130, 260, 128, packed=True),
    ]


def play_caches() -> int:
    for decoder in decoders.SAMPLE:
        decoding.run(decoder, decoders.OnCuda(), steps=3)
    return len(decoders.SAMPLE) + sum(1 for _ in decoders.wild_steps())


def play_gradients(case: cases.Case, problem, inputs: dict, forward_kernel: str = "") -> int:
    """The kernels of the backward pass that take the case."""
    if not cases.has_gradients(case):
        return 0
    _, arguments = gradients.arguments_of(problem)
    given = gradients.given_for(case, problem, inputs, arguments, forward_kernel)
    found = [gradients.takes(kernel, problem, inputs, arguments, given) for kernel in gradients.KERNELS]
    return sum(x is not None for x in found)


def play_forward() -> int:
    count = 0
    for case in sample():
        problem = case.problem()
        inputs = {name: arrays.to_cuda(array) for name, array in problem.inputs.items()}
        for kernel in arrays.kernels_for(inputs, problem.attributes):
            arrays.run(problem, inputs, kernel)
            count += 1
    return count


def play_backward(chosen: list[cases.Case], forward_kernel: str = "") -> int:
    count = 0
    for case in chosen:
        problem = case.problem()
        inputs = {name: arrays.to_cuda(array) for name, array in problem.inputs.items()}
        count += play_gradients(case, problem, inputs, forward_kernel)
    return count


PARTS = {
    "caches": play_caches,
    "forward": play_forward,
    "backward": lambda: play_backward(sample()),
    "backward-in-circles": lambda: play_backward(in_circles(), "prefill_sm80"),
}


if __name__ == "__main__":
    print(f"{PARTS[sys.argv[1]]()} runs")
