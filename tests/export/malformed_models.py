# SPDX-License-Identifier: Apache-2.0
"""Files that protobuf reads and that are no models: each kind with words that its error must have. Used by test_io.py
and test_cli.py, beside bad_models.py, whose table it fills."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tests.export.bad_models import bad

Change = Callable[[onnx.ModelProto], None]


def attention(opset: int = 17) -> onnx.ModelProto:
    """softmax(q k^T * c + m) v, each step a node, named after its output."""
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["s"]),
        helper.make_node("Mul", ["s", "c"], ["s2"]),
        helper.make_node("Add", ["s2", "m"], ["s3"]),
        helper.make_node("Softmax", ["s3"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    shapes = {"q": ["B", 2, "S", 4], "k": ["B", 2, "T", 4], "v": ["B", 2, "T", 4], "m": ["B", 1, "S", "T"]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 2, "S", 4])
    weights = [numpy_helper.from_array(np.float32(0.5), "c")]
    graph = helper.make_graph(nodes, "g", inputs, [output], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def node(model: onnx.ModelProto, output: str) -> NodeProto:
    return next(n for n in model.graph.node if output in n.output)


def _changed(*words: str) -> Callable[[Change], Change]:
    """Registers the attention model with a change as a kind of bad input."""

    def add(change: Change) -> Change:
        def write(path: pathlib.Path) -> None:
            model = attention()
            change(model)
            path.write_bytes(model.SerializeToString())

        write.__name__ = change.__name__
        bad(*words)(write)
        return change

    return add


@_changed("cycle")
def self_loop(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", ["z"], ["z"]))


@_changed("cycle")
def cycle(model: onnx.ModelProto) -> None:
    node(model, "kt").input[0] = "y"


@_changed("cycle")
def cycle_through_a_branch(model: onnx.ModelProto) -> None:
    """A branch of an If reads what the If makes."""
    branch = helper.make_graph(
        [helper.make_node("Identity", ["z"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch))


@_changed("perm")
def wrong_perm(model: onnx.ModelProto) -> None:
    node(model, "kt").attribute[0].ints[:] = [0, 1, 9, -7]


@_changed("perm")
def wrong_rank(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        del value.type.tensor_type.shape.dim[2:]


@_changed("Softmax", "has no output")
def no_output_of_a_node(model: onnx.ModelProto) -> None:
    node(model, "p").output[0] = ""


@_changed("'nothing'", "produced by nothing")
def output_of_nothing(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "nothing"


@_changed("'y'", "there twice")
def output_twice(model: onnx.ModelProto) -> None:
    model.graph.output.append(model.graph.output[0])


@_changed("'q'", "there twice")
def input_twice(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


@_changed("'s2'", "produced twice")
def value_twice(model: onnx.ModelProto) -> None:
    node(model, "s3").output[0] = "s2"


@_changed("'c'", "produced twice")
def a_weight_that_is_made(model: onnx.ModelProto) -> None:
    node(model, "s").output[0] = "c"


@_changed("has no name")
def input_without_name(model: onnx.ModelProto) -> None:
    model.graph.input[3].name = ""


@_changed("'c'", "1 bytes", "needs 4")
def short_data(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"\1"


@_changed("'c'", "needs 4835703278458516698824704")
def huge_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [1 << 40, 1 << 40]


@_changed("'c'", "[-4]")
def negative_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [-4]


@_changed("'c'", "unknown type 99")
def unknown_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


@_changed("'c'", "2 numbers", "needs 3")
def short_numbers(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(
        TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[3], float_data=[1.0, 2.0])
    )


def _external(model: onnx.ModelProto, **entries: str) -> None:
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer[0].CopyFrom(tensor)


@_changed("'c'", "no proper name")
def external_nul(model: onnx.ModelProto) -> None:
    _external(model, location="w\0.bin", offset="0", length="4")


@_changed("'c'", "no proper name")
def external_nowhere(model: onnx.ModelProto) -> None:
    _external(model, offset="0")


@_changed("'c'", "name can't be used")
def external_long_name(model: onnx.ModelProto) -> None:
    _external(model, location="w" * 5000)


@_changed("'c'", "offset", "'-8'")
def external_negative(model: onnx.ModelProto) -> None:
    _external(model, location="w.bin", offset="-8")


@_changed("'c'", "which is no file")
def external_folder(model: onnx.ModelProto) -> None:
    _external(model, location=".")


@_changed("no opset -5")
def negative_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = -5


@_changed("imports two versions")
def two_opsets(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("ai.onnx", 13))


@_changed("no opset is imported")
def no_opset_of_onnx(model: onnx.ModelProto) -> None:
    model.opset_import[0].domain = "com.microsoft"


@_changed("Softmax", "3 inputs")
def too_many_inputs(model: onnx.ModelProto) -> None:
    node(model, "p").input.extend(["c", "m"])


@_changed("MatMul", "lacks an input")
def missing_input(model: onnx.ModelProto) -> None:
    node(model, "y").input[0] = ""


@_changed("Softmax", "2 outputs")
def too_many_outputs(model: onnx.ModelProto) -> None:
    node(model, "p").output.append("p2")


@_changed("Cast", "lacks the attribute 'to'")
def missing_attribute(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["y"], ["z"]))


@_changed("Softmax", "'axis' of another type")
def attribute_of_another_type(model: onnx.ModelProto) -> None:
    node(model, "p").attribute[0].CopyFrom(helper.make_attribute("axis", 1.5))


@_changed("Softmax", "'axis' without a type")
def attribute_without_type(model: onnx.ModelProto) -> None:
    node(model, "p").attribute[0].ClearField("type")


@_changed("Softmax", "'axis' twice")
def attribute_twice(model: onnx.ModelProto) -> None:
    softmax = node(model, "p")
    softmax.attribute.append(softmax.attribute[0])


@_changed("no operator")
def no_operator(model: onnx.ModelProto) -> None:
    node(model, "p").op_type = ""


def _function(name: str, called: str) -> onnx.FunctionProto:
    body = [helper.make_node(called, ["a"], ["b"], domain="local")]
    return helper.make_function(
        "local", name, ["a"], ["b"], body, [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    )


@_changed("calls itself")
def recursive_functions(model: onnx.ModelProto) -> None:
    model.functions.extend([_function("F", "G"), _function("G", "F")])
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("F", ["q"], ["z"], domain="local"))


@_changed("have the same name")
def function_twice(model: onnx.ModelProto) -> None:
    model.functions.extend([_function("F", "H"), _function("F", "H")])


@_changed("more inputs or outputs than the function")
def call_with_too_much(model: onnx.ModelProto) -> None:
    model.functions.append(_function("F", "H"))
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("F", ["q", "k"], ["z"], domain="local"))


def _misspelt(what: str, word: str) -> None:
    """Registers: where `word` first stands in the file, its last letter becomes a byte that UTF-8 lacks."""

    def write(path: pathlib.Path) -> None:
        data = attention().SerializeToString()
        assert word.encode() in data
        path.write_bytes(data.replace(word.encode(), word.encode()[:-1] + b"\xff", 1))

    write.__name__ = what
    bad("not UTF-8")(write)


for _what, _word in {"operator_not_utf8": "Softmax", "value_not_utf8": "kt", "attribute_not_utf8": "perm"}.items():
    _misspelt(_what, _word)
