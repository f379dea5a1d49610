# SPDX-License-Identifier: Apache-2.0
"""The operator as PyTorch ops, faplugin::attention and faplugin::attention_backward, and attend(), differentiable.

Tensors are [B, S, H, D]. The ops have shapes for torch.compile; the autograd.Function stands outside of them, which
costs a third of what an autograd formula of a custom op does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from faplugin._frameworks import told
from faplugin.torch import _call
from faplugin.torch._call import ABSENT, EXTRAS, OPTIONAL, SETTINGS, Tensors, scale_of, unpacked
from faplugin.torch._refusals import FAILURES, refuse_flag, refuse_operands, refuse_settings

_INPUTS = ", ".join(
    [
        *(f"Tensor {name}" for name in ("query", "key", "value")),
        *(f"Tensor? {name}" for name in OPTIONAL),
        *(f"{kind} {name}" for name, kind in SETTINGS.items()),
    ]
)

_library = torch.library.Library("faplugin", "DEF")
_library.define(f"attention({_INPUTS}) -> (Tensor, Tensor)")
_library.define(f"attention_output({_INPUTS}) -> Tensor")  # what tracing for an export sees
_library.define(
    "attention_backward(Tensor d_output, Tensor? d_lse, Tensor output, Tensor lse, bool d_bias, bool d_sinks, "
    f"int packed, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _split(rest: tuple) -> tuple[Tensors, tuple]:
    """What follows query, key and value in the ops: by OPTIONAL, and by SETTINGS."""
    return rest[: len(OPTIONAL)], rest[len(OPTIONAL) :]


def _forward(query: Any, key: Any, value: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _call.forward((query, key, value), *_split(rest))


def _forward_output(query: Any, key: Any, value: Any, *rest: Any) -> torch.Tensor:
    return _call.forward_output((query, key, value), *_split(rest))


def _forward_shapes(query: Any, key: Any, value: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _call.results(query, value)


def _whole(gradients: Tensors, like: torch.Tensor) -> Tensors:
    """An op's results: none of them is absent."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _backward(
    d_output: Any, d_lse: Any, output: Any, lse: Any, d_bias: bool, d_sinks: bool, packed: int, *inputs: Any
) -> Tensors:
    optional, settings = _split(inputs[3:])
    gradients = _call.backward(
        d_output, d_lse, output, lse, d_bias, d_sinks, packed, inputs[:3], optional, settings
    )  # fmt: skip
    return _whole(gradients, d_output)


def _backward_shapes(
    d_output: Any, d_lse: Any, output: Any, lse: Any, d_bias: bool, d_sinks: bool, packed: int, *inputs: Any
) -> Tensors:
    operands, (bias, sinks) = inputs[:3], inputs[3:5]
    others = (bias if d_bias else None, sinks if d_sinks else None)
    d_others = (tensor if tensor is None else _call.empty_like(tensor, torch.float32) for tensor in others)
    return _whole((*_call.operand_gradients(operands, packed), *d_others), d_output)


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _forward, _device)
    _library.impl("attention_output", _forward_output, _device)
    _library.impl("attention_backward", _backward, _device)
torch.library.register_fake("faplugin::attention", _forward_shapes, lib=_library)
torch.library.register_fake("faplugin::attention_backward", _backward_shapes, lib=_library)

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_eager(*tensors: Any) -> bool:
    """Are these tensors with memory on which PyTorch runs nothing but the call itself? Then it needn't go through
    PyTorch's dispatcher, which takes longer than the call."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or not (tensor.is_cuda or tensor.is_cpu)):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def _wants_gradients(*tensors: Any) -> bool:
    for tensor in tensors:  # any() would take longer
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _gradients(ctx: Any, saved: Any, d_output: Any, d_lse: Any = None) -> tuple:
    """Of the arguments of forward(). `saved`: by save_for_backward()."""
    query, key, value, output, lse, *given = saved
    if d_output is None:
        d_output = torch.zeros_like(output)
    optional = given or ABSENT
    d_bias, d_sinks = ctx.needs_input_grad[_FIRST : _FIRST + 2] if given else (False, False)
    _, packed, settings, _ = ctx.how
    operands = unpacked((query, key, value), packed)
    arguments = (d_output, d_lse, output, lse, d_bias, d_sinks, packed)
    if is_eager(d_output, d_lse, query, key, value, *given):
        if not (torch._C._has_storage(d_output) and (d_lse is None or torch._C._has_storage(d_lse))):
            raise RuntimeError("the gradients of several outputs are wanted at once (is_grads_batched), which "
                               "faplugin.torch does not offer; expected one call for each")  # fmt: skip
        gradients = _call.backward(*arguments, operands, optional, settings)
    else:
        gradients = torch.ops.faplugin.attention_backward(*arguments, *operands, *optional, *settings)
    d_query, d_key, d_value, *d_others = gradients
    d_operands = (d_query, d_key if key is not None else None, d_value if value is not None else None)
    if not given:
        return None, *d_operands
    others = (d_others[0].to(given[0].dtype) if d_bias else None, d_others[1] if d_sinks else None)
    return None, *d_operands, *others, *[None] * len(EXTRAS)


class _Last(torch.autograd.Function):
    """Passes on the first `count` tensors, gradients, as results of the others too, so that whoever differentiates them
    gets an error. PyTorch's once_differentiable doesn't know the others: where the gradients of the output are
    constants, as those of a sum are, the second derivatives would be left out without a word."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> Tensors:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "the gradients of faplugin.torch's attention are differentiated, which its backward pass does not offer; "
            "expected attention in operators of PyTorch where second derivatives are needed"
        )


def _differentiated_once(ctx: Any, saved: Any, *d_results: Any) -> tuple:
    with torch.no_grad():
        gradients = _gradients(ctx, saved, *d_results)
    return _Last.apply(len(gradients), *gradients, *d_results, *saved)


class _Attention(torch.autograd.Function):
    """The call as a node of autograd's graph.

    `how`: may it pass by the dispatcher; how the operands are packed, 3 where query, key and value are parts of the
    first tensor, 2 where key and value are parts of the second, else 0; the settings; is the log-sum-exp wanted. One
    argument, because each costs time, as each result does. `given`: the optional tensors, unless all are absent.
    """

    @staticmethod
    def forward(ctx: Any, how: tuple[bool, int, tuple, bool], query: Any, key: Any, value: Any, *given: Any) -> Any:
        eager, packed, settings, return_lse = how
        operands = unpacked((query, key, value), packed)
        if eager:
            output, lse = _call.forward(operands, given or ABSENT, settings)
        else:
            output, lse = torch.ops.faplugin.attention(*operands, *(given or ABSENT), *settings)
        ctx.save_for_backward(query, key, value, output, lse, *given)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return (output, lse) if return_lse else output

    @staticmethod
    def backward(ctx: Any, *d_results: Any) -> Any:
        # Where no graph of the gradients is wanted, what refuses to differentiate them is time lost.
        is_wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        # torch.utils.checkpoint lets the saved tensors be asked for only once.
        return (_differentiated_once if is_wanted else _gradients)(ctx, ctx.saved_tensors, *d_results)


_FIRST = 4  # of the optional tensors among the arguments of forward()
# What Function.apply does where no functorch transform is active; finding that out again takes it as long as the rest.
_apply_eagerly = super(torch.autograd.Function, _Attention).apply


def compute(
    query: Any, key: Any, value: Any, packed: int, optional: Tensors, settings: tuple, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """attend() without its checks: `optional` by OPTIONAL (ABSENT where all are None), `settings` by SETTINGS."""
    given: Sequence[Any] = () if optional is ABSENT else optional
    eager = is_eager(query, key, value, *given)
    if not eager or (packed < 3 and key is None) or (not packed and value is None):
        _refuse_others((query, key, value), packed, given)
        _refuse_transforms()
    if not eager or torch._C._is_any_autocast_enabled():
        query, key, value = _autocast(query, key, value)
    if not eager and torch.onnx.is_in_onnx_export():
        from faplugin.torch._export import exported

        if return_lse:
            raise RuntimeError("the log-sum-exp is wanted during an ONNX export; expected a call for the output alone")
        return exported(unpacked((query, key, value), packed), optional, settings)
    if eager:
        try:
            return _compute_eagerly((query, key, value), packed, optional, settings, return_lse)
        except FAILURES:
            _refuse_others((query, key, value), packed, given)
            raise
    if torch.compiler.is_compiling():
        query, key, value, *given = _apart(query, key, value, *given)
    return _Attention.apply((False, packed, settings, return_lse), query, key, value, *given)


def _compute_eagerly(operands: Tensors, packed: int, optional: Tensors, settings: tuple, return_lse: bool) -> Any:
    given: Sequence[Any] = () if optional is ABSENT else optional
    if torch.is_grad_enabled() and _wants_gradients(*operands, *given):
        return _apply_eagerly((True, packed, settings, return_lse), *operands, *given)
    forward = _call.forward if return_lse else _call.forward_output
    return forward(unpacked(operands, packed), optional, settings)


def _refuse_others(operands: Tensors, packed: int, given: Sequence[Any]) -> None:
    """refuse_operands() of a call; of packed tensors only the first ones are there."""
    there = operands[: 4 - packed] if packed else operands
    optional = {name: x for name, x in zip(_call.OPTIONAL, given, strict=False) if x is not None}
    refuse_operands(dict(zip(("query", "key", "value"), there, strict=False)) | optional)


def _refuse_transforms() -> None:
    """Raises RuntimeError under torch.func, in other words than those of PyTorch, which speak to us."""
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "faplugin.torch's attention is called under a transform of torch.func (grad, vmap, jvp …), which it does "
            "not offer; expected torch.autograd, and batches as an axis of the tensors"
        )


def _autocast(query: Any, *others: Any) -> Tensors:
    """The tensors in the dtype of torch.autocast, where it is on for their device."""
    kind = query.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return query, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (query, *others))


def _apart(*tensors: Any) -> list[Any]:
    """The tensors, a view in the place of one that is there already: torch.compile takes none twice into a Function."""
    found: list[Any] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if again else tensor)
    return found


def attend(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    *,
    packed: int = 0,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    query_lengths: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_kv: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    alignment: str = "bottom_right",
    return_lse: bool = False,
) -> Any:
    """Attention with gradients for query, key, value, bias and sinks.

    Args:
        query: float32, float16 or bfloat16 [B, S_q, H_q, D]; with `packed` 3: [B, S, 3, H, D], query, key and value.
        key: [B, S_kv, H_kv, D]; with `packed` 2: [B, S_kv, 2, H_kv, D], key and value; with 3: None.
        value: [B, S_kv, H_kv, D_v]; None with `packed`.
        packed: 0, 2 or 3. Gradients have the form of what is packed; nothing is copied.
        bias: float, broadcastable to [B, H_q, S_q, S_kv], added after softcap.
        sinks: [H_q], a logit without a value in each row's softmax; computed in float32.
        mask: bool, True = attend, broadcastable to [B, H_q, S_q, S_kv].
        alibi_slopes: float32 [H_q] or [B, H_q]; they get no gradient.
        query_lengths: int32 or int64 [B], rows in use; the others' outputs are 0.
        kv_lengths: int32 or int64 [B], keys in use.
        cu_seqlens_q: int32 [sequences + 1], packed sequences in a batch of 1.
        cu_seqlens_kv: int32 [sequences + 1].
        scale: multiplies Q Kᵀ; None: 1/√D.
        softcap: scores become softcap · tanh(score / softcap); 0 is none.
        causal: key j is visible to position p when j <= p.
        window: keys visible before and after the own position, -1 unbounded.
        alignment: position of the first query: "bottom_right" or "top_left".
        return_lse: return (output, lse), lse being the natural log-sum-exp, float32 [B, H_q, S_q]. Not in an export.

    Returns:
        The output [B, S_q, H_q, D_v], dtype of query.

    Raises:
        ValueError, RuntimeError: as faplugin.attention and faplugin.attention_backward.
    """
    if not isinstance(packed, int) or packed not in (0, 2, 3):
        raise ValueError(f"packed is {told(packed)}; expected 0, 2 or 3")
    if not isinstance(alignment, str):
        raise TypeError(f"alignment is {told(alignment)}; expected a string")
    refuse_flag("return_lse", return_lse)
    if sinks is not None and not isinstance(sinks, torch.Tensor):
        raise TypeError(f"sinks is a {type(sinks).__name__}; expected a torch.Tensor")
    try:
        settings = (scale_of(query, scale), float(softcap), bool(causal), *window, alignment)
    except FAILURES:
        refuse_operands({"query": query})
        refuse_settings(scale, causal, softcap, window, "scale", "window")
        raise
    if scale == 0 or len(settings) != len(SETTINGS):
        refuse_settings(scale, causal, softcap, window, "scale", "window")
    sinks = None if sinks is None else sinks.float()
    given = (bias, sinks, mask, alibi_slopes, query_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv)
    optional: Tensors = ABSENT if all(tensor is None for tensor in given) else given
    return compute(query, key, value, packed, optional, settings, return_lse)
