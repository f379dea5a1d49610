# SPDX-License-Identifier: Apache-2.0
"""attention_backward(): the gradients of attention()'s arguments. Names and meanings are those of docs/operator.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from faplugin._attention import REQUIRED, bind, workspace
from faplugin._frameworks import empty, readable, shape_of, told

# Arguments that may have a gradient besides query, key and value, and how FaGradient calls it.
OTHERS = {"attn_bias": "d_bias", "attn_mask": "d_bias", "sinks": "d_sinks"}


def attention_backward(
    d_output: Any,
    output: Any,
    lse: Any,
    query: Any,
    key: Any,
    value: Any,
    *,
    d_lse: Any = None,
    wanted: Sequence[str] = (),
    out: Mapping[str, Any] | None = None,
    stream: int | None = None,
    kernel: str = "",
    num_threads: int = 0,
    **arguments: Any,
) -> dict[str, Any]:
    """Gradients of a loss for the arguments of `attention`, from its gradients for the output.

    Scores are computed anew from query, key and lse, so memory stays linear in the length of the sequence. Results are
    bitwise repeatable. Rows that attend no key, and rows beyond a length, get gradients of 0. On CUDA the work is
    enqueued and not waited for.

    Args:
        d_output: gradient of the output; shape, dtype and row-major layout as output.
        output: what `attention` has returned, row-major.
        lse: its log-sum-exp, float32 [B, H_q, S_q] (`return_lse`).
        query: as of `attention`, likewise the next two.
        key: [B, H_kv, S_kv, D] in its layout.
        value: [B, H_kv, S_kv, D_v] in its layout.
        d_lse: gradient of lse, float32 [B, H_q, S_q]; None: 0.
        wanted: of "attn_bias", "attn_mask" (where it is a float one) and "sinks", those whose gradient is wanted too.
        out: memory for gradients by the argument's name, each of that argument's shape ("attn_bias", "attn_mask" and
            "sinks" in float32); the last axis of query's, key's and value's is contiguous. They may be views of one
            packed array.
        stream: CUDA stream as an integer; None: the framework's current one.
        kernel: forces a backward kernel by its name: "backward_sm80" and the others of docs/backward.md.
        num_threads: threads on the CPU; 0: all.
        **arguments: the others of `attention`, as they were there. Caches, rotary embedding, norms and empty_row
            "mean" have no backward pass.

    Returns:
        Gradients by the argument's name: "query", "key", "value" in their shapes and dtypes, and what was wanted, in
        its shape, float32.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or value; the sentence names it.
        RuntimeError: there is no backward pass of this call, or on this device.
    """
    given = {"query": query, "key": key, "value": value, **arguments}
    out = {} if out is None else out
    if not isinstance(out, Mapping):
        raise TypeError(f"out is a {type(out).__name__}; expected a dict of arrays by name, as {{'query': array}}")
    if isinstance(wanted, str) or not isinstance(wanted, Collection) or getattr(wanted, "shape", None) == ():
        raise TypeError(f"wanted is {told(wanted)}; expected a list of names, as ['sinks']")
    for name in (*wanted, *out):
        if not isinstance(name, str) or name not in (*REQUIRED, *OTHERS):
            what = name if isinstance(name, str) else told(name)
            raise ValueError(f"there is no gradient of {what}; expected one of query, key, value, {', '.join(OTHERS)}")
        if given.get(name) is None:
            raise ValueError(f"the gradient of {name} is wanted, but the call has no {name}")
    if "attn_mask" in (*wanted, *out):
        if given.get("attn_bias") is not None:
            raise ValueError("the gradient of attn_mask is wanted beside an attn_bias; expected attn_bias alone")
        if "bool" in str(getattr(given["attn_mask"], "dtype", "")):
            raise ValueError("the gradient of a bool attn_mask is wanted; expected a float one")
    call = bind({**given, "return_lse": True}, stream)
    names = dict.fromkeys((*REQUIRED, *wanted, *out))
    dtype = next(dtype for name, _, dtype in call.outputs if name == "output")
    results = {
        name: out[name]
        if name in out
        else empty(query, shape_of(name, given[name]), "float32" if name in OTHERS else dtype, call.device, stream)
        for name in names
    }
    arrays = {"output": output, "lse": lse, "d_output": d_output, "d_lse": d_lse}
    arrays |= {OTHERS.get(name, f"d_{name}"): array for name, array in results.items()}
    num_bytes = call.prepare_backward({n: None if a is None else readable(n, a) for n, a in arrays.items()}, kernel)
    call.run(workspace(query, num_bytes, call.device, stream), num_bytes, num_threads)
    return results
