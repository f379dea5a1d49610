# SPDX-License-Identifier: Apache-2.0
"""Has FlashAttention-4 compile what benchmarks/attention.py backward and training.py run of it, in parallel processes.

It takes half a minute for each kind of problem, and keeps what it has compiled only where
FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 is set, in the folder FLASH_ATTENTION_CUTE_DSL_CACHE_DIR. Set both for this
program and for the benchmark.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time

ENABLED = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
# head_dim, causal, window, query heads for each key head
KINDS = [
    *((head_dim, causal, -1, 1) for head_dim, causal in itertools.product((64, 128, 256), (False, True))),
    (128, True, 4095, 1),
    (128, True, 4095, 4),
]


def compile_kind(kind: tuple[int, bool, int, int]) -> None:
    import torch
    from flash_attn.cute import flash_attn_func

    head_dim, causal, window, heads = kind
    start = time.perf_counter()
    sizes = [(2, 512, 2 * heads, head_dim), *[(2, 512, 2, head_dim)] * 2]
    operands = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in sizes]
    options = {"window_size": (window, 0)} if window >= 0 else {}
    output = flash_attn_func(*operands, causal=causal, **options)
    output = output[0] if isinstance(output, tuple) else output
    torch.autograd.grad(output, operands, torch.randn_like(output))
    torch.cuda.synchronize()
    print(f"FlashAttention-4 {kind}: {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    if os.environ.get(ENABLED) != "1":
        raise SystemExit(f"set {ENABLED}=1, without which nothing of this is kept")
    with multiprocessing.get_context("spawn").Pool(len(KINDS)) as pool:
        pool.map(compile_kind, KINDS)


if __name__ == "__main__":
    main()
