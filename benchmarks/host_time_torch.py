# SPDX-License-Identifier: Apache-2.0
"""The host's time of a training call in PyTorch: what each pass costs before its kernels are enqueued, ours and peers'.

Calls on small tensors follow one another without waiting for the GPU. FAPLUGIN_LIBRARY_DIR chooses the build.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import faplugin
import torch
from attention_backward import LAYOUTS
from faplugin.torch import flash_attn_func
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

CALLS = 50  # before the GPU is waited for, so that its queue never fills


def microseconds(call: Callable[[], object], rounds: int) -> float:
    """The host's time of a call: the median of means."""
    times = []
    for turn in range(rounds + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        if turn >= 3:
            times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


class Nothing(torch.autograd.Function):
    """What PyTorch itself needs for a function with three inputs, in Python."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx, d_output):
        return ctx.saved_tensors


def sdpa(backend: SDPBackend) -> Callable:
    def call(*operands: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*(t.transpose(1, 2) for t in operands), is_causal=True).transpose(1, 2)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    operands = [torch.randn(1, 64, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    leaves = [t.clone().requires_grad_() for t in operands]
    d_output = torch.randn_like(operands[0])
    functions = {
        "faplugin.torch.flash_attn_func": lambda *x: flash_attn_func(*x, causal=True),
        "an autograd.Function that does nothing": Nothing.apply,
        "SDPA, FA2": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA, cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    print("microseconds of the host: without gradients | forward | backward, autograd's engine included")
    for name, function in functions.items():
        output = function(*leaves)
        calls = (
            lambda function=function: function(*operands),
            lambda function=function: function(*leaves),
            lambda output=output: torch.autograd.grad(output, leaves, d_output, retain_graph=True),
        )
        print(" | ".join(f"{microseconds(call, rounds):6.1f}" for call in calls), name, flush=True)
    arguments = {"is_causal": True, "return_lse": True, **LAYOUTS}
    output, lse = faplugin.attention(*operands, **arguments)
    before = (d_output, output, lse, *operands)
    forward = microseconds(lambda: faplugin.attention(*operands, **arguments), rounds)
    backward = microseconds(lambda: faplugin.attention_backward(*before, is_causal=True, **LAYOUTS), rounds)
    print(f"{forward:6.1f} |        | {backward:6.1f} faplugin.attention and faplugin.attention_backward")


if __name__ == "__main__":
    main()
