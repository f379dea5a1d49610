# SPDX-License-Identifier: Apache-2.0
"""Calls on the tensors of a framework that has DLPack's C exchange API, PyTorch's: the compiled library reads them and
allocates workspace without a line of Python, which saves most of what a call costs the host.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

from faplugin._native import Node, check, exchange_api, library


@functools.cache
def _packer(count: int) -> Callable[..., bytes]:
    """What writes so many addresses and sizes one behind the other."""
    return struct.Struct(f"{count}P").pack


_NONE = id(None)


def run(
    kind: type, node: Node, inputs: Sequence[Any], others: Sequence[Any], is_backward: bool, num_threads: int
) -> None:
    """Runs a call. On CUDA it is enqueued on the framework's current stream and not waited for.

    Args:
        kind: the type of all arrays, which may be of classes beneath it.
        node: names the inputs and outputs.
        inputs: the node's, in the order of its slots.
        others: the node's outputs, row-major; for a backward pass the arrays of GRADIENTS, None where one is absent.
        is_backward: is it one?
        num_threads: on the CPU; 0: all.

    Raises:
        ValueError, TypeError, RuntimeError: as faplugin.attention and faplugin.attention_backward.
    """
    api = exchange_api(kind)
    if api is None:
        raise ImportError(f"{kind.__name__} has no DLPack exchange API; expected that of PyTorch 2.10 or later")
    num_inputs, num_others = len(inputs), len(others)
    call = _packer(6 + num_inputs + num_others)(  # FaObjectCall
        node.address, api, _NONE, num_inputs, num_others, is_backward, *map(id, inputs), *map(id, others)
    )
    compiled = library()
    remaining = compiled.fa_python_exchange_begin(call)
    if remaining < 0:
        check(-remaining)
    elif remaining:  # on the CPU
        check(compiled.fa_python_exchange_run(remaining, num_threads))
