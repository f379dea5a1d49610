# SPDX-License-Identifier: Apache-2.0
"""Leaves out the additions of biases between the products that project queries, keys and values and the operator, for
onnxruntime, which makes a kernel of each such addition (Options.joins_rest). Called by pipeline.py.

- The queries' bias becomes the operator's input query_bias, which kernels add where they hold the queries anyway.
- The keys' bias is dropped: q · (k + b) is q · k plus a number that is the same for all keys of a row, and softmax does
  not see what is added to all scores of a row, unless a huge number is added to all of them too.
- The values' bias is moved behind the operator: the weights of a row sum to 1, so that bias is added to each row of the
  output; what follows there is a product with a stored weight and the addition of a stored bias, into which it goes as
  bias · weight. A row that attends no key and gives 0 now gives -bias (empty_row_value), so that 0 is projected again.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from faexport.fallback.functions import rows_see_a_key
from faexport.graph.edits import Names, insert_in_front, remove_dead
from faexport.graph.fused import optional_inputs, optional_outputs
from faexport.graph.nodes import attribute, given, op, producer
from faexport.graph.surgery import Builder
from faexport.spec import ZERO_ROWS, AttentionSpec, Candidate, EmptyRow, Fact, Layout
from faexport.understand.shapes.analysis import Analysis
from faexport.write.projections import sites_text

# Inputs of the operator with which a row's weights still sum to 1, and depend on its scores by their differences alone.
_HARMLESS = {"attn_mask", "attn_bias", "nonpad_kv_seqlen", "query_offset", "alibi_slopes"}
_WIDEST = 256  # columns of a head; the CUDA kernels for wider ones add no bias
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


_ROUNDS = "where a mask hides all keys of a row by adding to their scores, it decides what rounding leaves of them"


class _Stays(Exception):
    """Why biases stay where they are, as a sentence without its full stop."""


@dataclasses.dataclass(frozen=True)
class _Biased:
    """sum = product + bias, read by the operator alone."""

    sum: ir.Value  # [B, S, N]
    product: ir.Value  # [B, S, N]
    bias: np.ndarray  # [N]


@dataclasses.dataclass(frozen=True)
class _OutputProjection:
    """The operator's output @ weight + bias."""

    product: ir.Node
    addition: ir.Node
    weight: np.ndarray  # [H_q * D_v, E]
    bias: np.ndarray  # [E]


def move_biases(model: ir.Model, candidates: Sequence[Candidate], a: Analysis, names: Names) -> list[str]:
    """Changes the model in place, at each fused site where that computes the same. Returns a note for each reason why
    biases stayed."""
    stayed: dict[str, list[str]] = collections.defaultdict(list)
    for candidate in candidates:
        node, spec = candidate.fused_node, candidate.outcome
        if node is None or not isinstance(spec, AttentionSpec) or node.graph is not model.graph:
            continue
        biased = [_biased(node, n, a) for n in range(3)]
        if not any(biased):
            continue
        try:
            texts = _Site(node, spec, biased, a).move(names)
        except _Stays as why:
            stayed[str(why)].append(candidate.name)
            continue
        facts = [Fact(text, (node.name or "",)) for text in texts]
        candidate.outcome = dataclasses.replace(spec, facts=(*spec.facts, *facts))
    return [f"{sites_text(sites)}: biases of projections stay as they are: {why}" for why, sites in stayed.items()]


def _biased(node: ir.Node, n: int, a: Analysis) -> _Biased | None:
    """The addition of a stored bias behind a product, in front of input n of the operator."""
    value = given(node, n)
    last = producer(value)
    if last is None or op(last) != "Add" or not _is_read_by(value, node) or a.dtype(value) not in _FLOATS:
        return None
    for product, bias in (last.inputs, reversed(last.inputs)):
        stored = _stored(bias, a)
        if product is None or op(producer(product)) != "MatMul" or stored is None or not _is_read_by(product, last):
            continue
        sizes = a.shape(product)
        if sizes is not None and len(sizes) == 3 and stored.shape == (sizes[2].const,):
            return _Biased(value, product, stored)
    return None


def _is_read_by(value: ir.Value, node: ir.Node) -> bool:
    """… and by no other."""
    return not value.is_graph_output() and all(use.node is node for use in value.uses())


def _stored(value: ir.Value | None, a: Analysis) -> np.ndarray | None:
    """A tensor of the file that no caller can replace, perhaps under another name or transposed."""
    node, tensor = producer(value), a.tensor(value)
    if tensor is not None:
        return tensor.numpy() if tensor.dtype in _FLOATS else None
    if node is None or op(node) not in ("Identity", "Transpose"):
        return None
    array = _stored(given(node, 0), a)
    if array is None or op(node) == "Identity":
        return array
    return array.transpose(attribute(node, "perm"))


def _forget(stored: ir.Value | None) -> None:
    """Removes a tensor of the file that nothing reads any more."""
    if stored is None or stored.uses() or stored.is_graph_input() or stored.is_graph_output():
        return
    if stored.producer() is not None:
        remove_dead([stored.producer()])
    elif isinstance(stored.graph, ir.Graph) and stored.name is not None:
        stored.graph.initializers.pop(stored.name)


class _Site:
    """One operator with biases in front of it."""

    def __init__(self, node: ir.Node, spec: AttentionSpec, biased: Sequence[_Biased | None], a: Analysis):
        self.node, self.spec, self.biased, self.a = node, spec, list(biased), a
        self.inputs = optional_inputs(node)
        self.q_heads, self.kv_heads = (node.attributes.get_int(f"{kind}_num_heads", 0) for kind in ("q", "kv"))

    def move(self, names: Names) -> list[str]:
        """Sentences about what is done then. Raises _Stays, and changes nothing then."""
        self._check()
        texts = []
        if self.biased[1] is not None and self._loses_scores():
            texts.append(f"the keys' bias stays: {_ROUNDS}")
            self.biased[1] = None
        query, key, value = (self._by_head(n) for n in range(3))
        behind = self._output_projection() if value is not None else None
        old = [one.sum.producer() for one in self.biased if one is not None]
        for n, one in enumerate(self.biased):
            if one is not None:
                self.node.replace_input_with(n, one.product)
        if query is not None:
            self._add_input("query_bias", query, names)
            texts.append("the queries' bias is added by the operator")
        if key is not None:
            texts.append("the keys' bias is left out: it adds the same to all scores of a row")
        if value is not None and behind is not None:
            value, output = np.repeat(value, self.q_heads // self.kv_heads, axis=0), self.node.outputs[0].name
            self._add_behind(value, behind, names)
            if self._may_give_zero():
                self._add_input("empty_row_value", -value, names)
                self.node.metadata_props[ZERO_ROWS] = json.dumps([output])
            texts.append("the values' bias is part of the output projection's: the weights of a row sum to 1")
        remove_dead(old)
        return texts

    def _check(self) -> None:
        """Is the algebra right for this operator? Raises _Stays."""
        node, mask = self.node, self.spec.mask
        if others := sorted({*self.inputs} - _HARMLESS):
            raise _Stays(f"the operator has the input {others[0]}")
        if outputs := optional_outputs(node):
            raise _Stays(f"the operator has the output {outputs[0]}")
        if node.attributes.get_float("softcap", 0.0):
            raise _Stays("softcap sees what is added to all scores of a row")
        if not self.q_heads or not self.kv_heads:
            which = "keys and values" if self.q_heads else "queries"
            raise _Stays(f"{which} come to the operator with an axis for heads, and not as a product leaves them")
        if mask.empty_rows is not None:
            raise _Stays("rows that see no key give something else than 0 or the mean of all values")
        if mask.empty_row is EmptyRow.MEAN and not self._has_keys():
            raise _Stays("there may be no keys, whose values have no mean")

    def _loses_scores(self) -> bool:
        """May a row have nothing but keys to whose scores so much is added that only their first bits count? What is
        added to all scores of a row decides which bits these are then. Raises _Stays where the bias of keys is one with
        that of queries or values."""
        if "attn_bias" not in self.inputs or self.spec.mask.bias_keeps_scores:
            return False
        if self.node.attributes.get_ints("packed_columns", ()):
            raise _Stays(_ROUNDS)
        return True

    def _may_give_zero(self) -> bool:
        """May a row attend no key, and give 0 then?"""
        node, mask = self.node, self.spec.mask
        left, right = (node.attributes.get_int(f"{side}_window_size", -1) for side in ("left", "right"))
        windows = left >= 0 or right >= 0 or node.attributes.get_int("is_causal", 0) == 1
        alignment = node.attributes.get_string("alignment", "onnx")
        sees_a_key = mask.rows_see_a_key or rows_see_a_key(self.inputs, windows, left, alignment)
        return mask.empty_row is EmptyRow.ZERO and not (sees_a_key and self._has_keys())

    def _has_keys(self) -> bool:
        """Is there a key wherever there is a query?"""
        queries, keys = (self.a.shape(given(self.node, n)) for n in (0, 1))
        if queries is None or keys is None or len(queries) != 3 or len(keys) != 3:
            return False
        return queries[1] == keys[1] or keys[1].is_at_least(1)

    def _by_head(self, n: int) -> np.ndarray | None:
        """The bias of queries, keys or values, [heads, columns of a head]; None where there is none. Raises _Stays."""
        one, heads = self.biased[n], self.kv_heads if n else self.q_heads
        if one is None:
            return None
        columns = self.node.attributes.get_ints("packed_columns", ())
        start, stride = columns[2 * n : 2 * n + 2] if columns else (0, len(one.bias) // heads)
        width = stride
        if columns:
            width = self.node.attributes.get_int("head_dim", 0)
            width = (self.node.attributes.get_int("head_dim_v", 0) or width) if n == 2 else width
        if (not columns and len(one.bias) % heads) or width > _WIDEST:
            raise _Stays(f"a head has {width} columns, for which the operator adds no bias on a GPU")
        return one.bias[start + np.arange(heads)[:, None] * stride + np.arange(width)]

    def _output_projection(self) -> _OutputProjection:
        """What reads the operator's output. Raises _Stays."""
        node, value = self.node, self.node.outputs[0]
        if self.spec.output_layout is not Layout.BSH:
            raise _Stays("the output goes elsewhere than into one product and the addition of a bias")
        found = []
        for wanted in ("MatMul", "Add"):
            users = {use.node for use in value.uses()}
            user = users.pop() if len(users) == 1 else None
            if user is None or op(user) != wanted or value.is_graph_output() or user.graph is not node.graph:
                raise _Stays("the output goes elsewhere than into one product and the addition of a bias")
            found.append((user, user.inputs[1] if user.inputs[0] is value else user.inputs[0]))
            value = user.outputs[0]
        (product, weight), (addition, bias) = found
        stored, added = _stored(weight, self.a), _stored(bias, self.a)
        if product.inputs[0] is not node.outputs[0] or stored is None or stored.ndim != 2:
            raise _Stays("the weight behind the output is quantized, given by the caller or computed")
        if added is None or added.shape != stored.shape[1:]:
            raise _Stays("the bias behind the output is given by the caller or computed")
        return _OutputProjection(product, addition, stored, added)

    def _add_input(self, name: str, array: np.ndarray, names: Names) -> None:
        """`array`: [H_q, columns of a head]."""
        node = self.node
        self.inputs.append(name)
        node.resize_inputs(len(node.inputs) + 1)
        node.replace_input_with(len(node.inputs) - 1, self._constant(array, node, names))
        node.attributes["optional_inputs"] = ir.AttrString("optional_inputs", ",".join(self.inputs))

    def _add_behind(self, bias: np.ndarray, behind: _OutputProjection, names: Names) -> None:
        """(output + bias) @ weight + own = output @ weight + (own + bias @ weight). `bias`: [H_q, D_v]."""
        own = behind.bias
        total = own.astype(np.float64) + bias.reshape(-1).astype(np.float64) @ behind.weight.astype(np.float64)
        constant = self._constant(total.astype(own.dtype), behind.addition, names)
        product = behind.product.outputs[0]
        replaced = next(value for value in behind.addition.inputs if value is not product)
        for n, value in enumerate((product, constant)):  # a bias behind the product, as around/joins.py looks for it
            behind.addition.replace_input_with(n, value)
        _forget(replaced)
        for value in (self.node.outputs[0], product):  # they are others now
            value.name = names.fresh(f"{value.name}_unbiased")

    def _constant(self, array: np.ndarray, before: ir.Node, names: Names) -> ir.Value:
        build = Builder(self.a.opset)
        value = build.constant(array)
        value.shape = ir.Shape(array.shape)
        insert_in_front(before, build.nodes, f"{self.node.name}_bias", names)
        return value
