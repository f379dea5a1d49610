# SPDX-License-Identifier: Apache-2.0
"""What encoders.py and models.py take from PyTorch on a GPU: a model compiled by torch.compile, as one more contestant,
and the share of a run's time that the operator's kernels take, by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable

import encoder_models
import numpy as np
import skeletons
import torch
from model_table import Model

KERNELS = "fa::"  # in the names of the operator's kernels


class Compiled:
    """A model of model_table.py with the weights of its files, through torch.compile and its SDPA."""

    def __init__(self, model: Model, weights: skeletons.Weights, layers: int, dtype: str):
        wrapped = encoder_models.built(model, "sdpa", layers)
        weights.fill(wrapped.model)
        self._dtype = getattr(torch, dtype)
        self._model = torch.compile(_in(wrapped, self._dtype))

    @torch.no_grad()
    def bound(
        self, tensors: dict[str, np.ndarray]
    ) -> tuple[Callable[[int], None], Callable[[], np.ndarray], Callable[[], None]]:
        """One run on inputs that lie on the GPU, which waits for nothing; the output of the last one in float32; and
        what gives back the memory that runs took."""
        inputs = [torch.from_numpy(array).to("cuda") for array in tensors.values()]
        inputs = [tensor.to(self._dtype) if tensor.is_floating_point() else tensor for tensor in inputs]
        last: list[torch.Tensor] = []

        @torch.no_grad()
        def call(_: int) -> None:
            last[:] = [self._model(*inputs)]

        def release() -> None:
            last.clear()
            torch.cuda.empty_cache()

        return call, lambda: last[0].float().cpu().numpy(), release


def _in(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The module on the GPU in this type, as loading a checkpoint in it would make it: what isn't in a checkpoint, such
    as the frequencies of rotary positions, stays float32."""
    kept = {
        (part, name): buffer
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name in part._non_persistent_buffers_set
    }
    module.to("cuda", dtype)
    for (part, name), buffer in kept.items():
        setattr(part, name, buffer.to("cuda"))
    return module


def share_of_operator(call: Callable[[int], None]) -> float | None:
    """Of the time that the GPU's kernels take in one run, the share of the operator's; None where none was seen."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call(0)
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total for event in profile.key_averages()}
    total = sum(times.values())
    return sum(time for key, time in times.items() if KERNELS in key) / total if total else None
