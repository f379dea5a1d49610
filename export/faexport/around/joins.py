# SPDX-License-Identifier: Apache-2.0
"""Joins what stands around attention into onnxruntime's own operators (Options.joins_rest). Called by pipeline.py.

onnxscript's rules find the places, behind normalizations.py, embeddings.py and skip_normalizations.py. That the shapes
of both sides are equal the rules read from what declare.py wrote. What they leave to chance is checked here: that sizes
are known, weights as long as a row, and types such that onnxruntime's operators take them everywhere. onnxruntime joins
much of it by itself, but not a residual whose sum is read again (in models that normalize first), and no
root-mean-square normalizations of newer exports.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from faexport.around import embeddings, normalizations, skip_normalizations
from faexport.fallback.formulas import FORMULAS
from faexport.graph.edits import Names, remove_dead
from faexport.graph.nodes import RUNTIME_DOMAIN, RUNTIME_FLOATS, attribute, op, operand, producer
from faexport.spec import DOMAIN
from faexport.understand.shapes.analysis import Analysis

if TYPE_CHECKING:  # slow to import
    from onnxscript.rewriter import pattern

NORMALIZATIONS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
JOINED = (*NORMALIZATIONS, "Gelu", "FastGelu", "BiasGelu")
TENSORS, WEIGHTS = ("x", "input", "skip"), ("bias", "scale", "gamma", "beta")  # as the rules call them


def join(model: ir.Model, a: Analysis, names: Names) -> None:
    """Changes the model in place, but for the operators' domain among its imports."""
    unread, types = _unread(model), _types_in_stand_ins(model)
    normalizations.join(model, a, names)
    embeddings.join(model, a, names)
    _leave_out_what_changes_nothing(model, a)
    skip_normalizations.join(model, a, names)
    turned = [*_put_biases_second(model), *_put_biased_second(model)]
    for rules in _rules():
        rules.apply_to_model(model)
    for node in turned:
        if node.graph is not None:  # it was of no use
            _turn(node)
    for node in model.graph.all_nodes():
        if node.domain == RUNTIME_DOMAIN and node.op_type in NORMALIZATIONS:
            _leave_out_unused(node)
    remove_dead(list(_unread(model) - unread))
    for value, kind, shape in types:  # the rules declare more in functions, too
        value.type, value.shape = kind, shape


def _types_in_stand_ins(model: ir.Model) -> list[tuple[ir.Value, ir.TypeProtocol | None, ir.Shape | None]]:
    """What the values of the operator's stand-in are declared as."""
    functions = [function for (domain, _, _), function in model.functions.items() if domain == DOMAIN]
    values = (value for function in functions for node in function for value in node.outputs)
    return [(value, value.type, value.shape) for value in values]


def _unread(model: ir.Model) -> set[ir.Node]:
    """Nodes whose outputs nothing reads."""
    nodes = model.graph.all_nodes()
    return {node for node in nodes if not any(value.uses() or value.is_graph_output() for value in node.outputs)}


def note(joined: Mapping[str, int]) -> str:
    """A sentence for the report."""
    names = ", ".join(f"{number} {name}" for name, number in joined.items())
    only = [name for name in joined if name in FORMULAS]
    on_gpus = f"; of {', '.join(only)} there are CUDA kernels alone, so it runs on GPUs" if only else ""
    return (
        f"joined around attention: {names}; these are operators of onnxruntime, and other runtimes don't run the file "
        f"(--target tensorrt, or --no-rest, leaves them out){on_gpus}"
    )


def counts(model: ir.Model) -> collections.Counter[str]:
    """onnxruntime's operators among those that join() and cuda_operators.py write, in all graphs of a model."""
    misplaced = normalizations.misplaced(model)
    return collections.Counter(
        node.op_type
        for node in model.graph.all_nodes()
        if (node.domain == RUNTIME_DOMAIN and node.op_type in (*JOINED, *FORMULAS)) or op(node) in misplaced
    )


def _rules() -> Iterator[pattern.RewriteRuleSet]:
    """onnxscript's, in the order in which they build on each other."""
    from onnxscript.rewriter import pattern
    from onnxscript.rewriter.ort_fusions import (  # slow to import
        bias_gelu,
        erfgelu,
        gelu,
        skip_normalization,
    )

    erf = (erfgelu.erf_gelu_pattern_1, erfgelu.erf_gelu_pattern_2)
    yield pattern.RewriteRuleSet(
        [pattern.RewriteRule(one, erfgelu.gelu, lambda context, **bound: _is_sure(bound)) for one in erf]
    )
    yield pattern.RewriteRuleSet([_sure(gelu.GeluTanhFusion), _sure(gelu.GeluErfFusion)])
    biased = [_sure(bias_gelu.BiasGeluFusion, f"{contrib}", contrib_op=contrib) for contrib in (False, True)]
    yield pattern.RewriteRuleSet([turned for rule in biased for turned in rule.commute()])
    for kind in (skip_normalization.SkipLayerNormFusion, skip_normalization.SkipRmsNormFusion):
        with_bias = [_sure(kind, f"bias {first}", has_bias=True, bias_pre_add=first) for first in (True, False)]
        yield pattern.RewriteRuleSet([*with_bias, _sure(kind, "no bias")])


def _sure(kind: Any, *arguments: str, **settings: bool) -> pattern.RewriteRule:
    """A rule of onnxscript with our check after its own."""

    class Sure(kind):
        def check(self, context: Any, **bound: Any) -> Any:
            return super().check(context, **bound) and _is_sure(bound)

    make: Callable[..., pattern.RewriteRule] = Sure.rule
    return make(*arguments, **settings)


def _is_sure(bound: Mapping[str, Any]) -> bool:
    """Of what a rule found: one type; where there are weights or a residual, known sizes that fit each other."""
    tensors, weights = ([bound[name] for name in names if bound.get(name)] for names in (TENSORS, WEIGHTS))
    types = {value.dtype for value in (*tensors, *weights)}
    if len(types) != 1 or not types <= {*RUNTIME_FLOATS}:
        return False
    if not weights:
        return True
    shapes = [list(value.shape or [None]) for value in tensors]
    known = all(isinstance(size, int) or size.value is not None for shape in shapes[1:] and shapes for size in shape)
    return known and all(value.shape is not None and list(value.shape) == [shapes[0][-1]] for value in weights)


def _leave_out_what_changes_nothing(model: ir.Model, a: Analysis) -> None:
    """Casts to the type that a value has already, as T5's normalizations begin with, and divisions by 1, as diffusers'
    attention ends with: the rules look for none there."""
    for node in list(model.graph):
        value = operand(node, 0) if op(node) in ("Cast", "Div") else None
        if value is None or node.outputs[0].is_graph_output():
            continue
        if op(node) == "Div":
            by = node.inputs[1]
            changes = a.dtype(value) not in RUNTIME_FLOATS or a.rank(by) != 0 or a.scalar(by) != 1
        else:
            changes = value.dtype != attribute(node, "to")
        if not changes:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            model.graph.remove(node, safe=True)


def _put_biases_second(model: ir.Model) -> Iterator[ir.Node]:
    """onnxscript's rules look for a bias there; TorchScript's exporter writes it first. Gives the nodes that were
    turned."""
    for node in model.graph:
        if op(node) != "Add":
            continue
        first, second = map(_stored, node.inputs)
        if first is not None and second is None:
            _turn(node)
            yield node


def _put_biased_second(model: ir.Model) -> Iterator[ir.Node]:
    """Where both inputs of a residual are sums, as behind embeddings or a projection, the rules look for the bias in
    the second alone. Gives the nodes that were turned."""
    for node in model.graph:
        if op(node) != "Add" or op(producer(node.inputs[1])) != "Add":
            continue
        if _is_biased(node.inputs[0]) and not _is_biased(node.inputs[1]):
            _turn(node)
            yield node


def _is_biased(value: ir.Value | None) -> bool:
    """Is it a sum of a tensor and a stored vector, which nothing else reads?"""
    made_by = producer(value)
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return False
    bias = made_by.inputs[1] if made_by is not None and op(made_by) == "Add" else None
    # projection_biases.py writes a Constant.
    stored = bias if op(producer(bias)) == "Constant" else _stored(bias)
    return stored is not None and stored.shape is not None and len(stored.shape) == 1


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The tensor of the file that it is, perhaps by another name: TorchScript's exporter writes equal weights once."""
    made_by = producer(value)
    if made_by is not None and op(made_by) == "Identity":
        value = made_by.inputs[0]
    return value if value is not None and value.const_value is not None else None


def _turn(node: ir.Node) -> None:
    first, second = node.inputs
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


def _leave_out_unused(node: ir.Node) -> None:
    """Outputs that nothing reads: the kernels for GPUs don't compute them. The first one has to have a name."""
    used = [bool(value.uses()) or value.is_graph_output() for value in node.outputs]
    if not any(used):  # the node is dead, and was so in the model that was given
        return
    node.resize_outputs(max((index for index, wanted in enumerate(used) if wanted), default=0) + 1)
    for value, wanted in zip(node.outputs[1:], used[1:], strict=False):
        if not wanted:
            value.name = ""
