# SPDX-License-Identifier: Apache-2.0
"""What a parsed model must be before it is analysed: its nodes can be put in order, its weights' files are there.
Called by model_io.py after proto_checks.py; also mends what runtimes accept and our analysis does not expect.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Iterator

import onnx_ir as ir

from faexport.errors import ModelError
from faexport.files.head_counts import contradiction
from faexport.graph.nodes import name_of, outermost_graphs, subgraphs

AGAIN = "export or copy the model again"


def check_model(model: ir.Model, name: str, path: pathlib.Path) -> None:
    """Raises ModelError, which begins with `name`, where the model of the file `path` can't be used. Nodes that are out
    of order are put in order, as runtimes do it, and negative sizes become unknown ones."""
    _check_external_data(model, name, path)
    for graph in outermost_graphs(model):
        _check_values(graph, name)
        try:
            put_in_order(graph)
        except ValueError as error:
            raise ModelError(
                f"{name}: malformed model: its nodes form a cycle: a value depends on itself; {AGAIN}"
            ) from error


def put_in_order(graph: ir.Graph | ir.Function) -> None:
    """Puts nodes behind those that make what they read, where they are not. Raises ValueError if there is a cycle."""
    if not _in_order(graph, set()):
        graph.sort()


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """The weights that lie in files of their own, those of subgraphs and functions included."""
    return (tensor for tensor, _ in _external_places(model))


def _external_places(model: ir.Model) -> Iterator[tuple[ir.ExternalTensor, Callable[[ir.ExternalTensor], None]]]:
    """Each of these weights, and what puts another in its place."""
    for graph in (*model.graphs(), *model.functions.values()):
        if isinstance(graph, ir.Graph):
            for value in graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    yield value.const_value, functools.partial(setattr, value, "const_value")
        for node in graph:
            for attribute in tuple(node.attributes.values()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value, functools.partial(_set_tensor, node, attribute.name)


def _set_tensor(node: ir.Node, name: str, tensor: ir.ExternalTensor) -> None:
    node.attributes[name] = ir.AttrTensor(name, tensor)


def _check_external_data(model: ir.Model, name: str, path: pathlib.Path) -> None:
    """Each file exists in the model's folder and is long enough."""
    # A model cache (huggingface_hub's) may keep symbolic links to files of another folder: the folder that the model
    # really lies in counts too.
    folder, real_folder = path.parent.resolve(), path.resolve().parent
    for tensor, replace in _external_places(model):
        what = f"{name}: weight '{tensor.name}' lies in the external file '{tensor.location}'"
        try:
            file = pathlib.Path(tensor.path).resolve()
            inside = file.is_relative_to(folder) or file.is_relative_to(real_folder)
            there, status = file.exists(), file.stat() if file.is_file() else None
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name that is too long
            raise ModelError(f"{what}, whose name can't be used: {error}; {AGAIN}") from error
        if os.path.isabs(tensor.location) or not inside:
            raise ModelError(
                f"{what}, outside the model's folder; move the file beside the model and save its location as relative"
            )
        if status is None:
            wrong = "is no file; copy the file" if there else "does not exist; copy it"
            raise ModelError(f"{what}, which {wrong} beside the model")
        if status.st_nlink > 1:
            raise ModelError(
                f"{what}, which has {status.st_nlink} names (hard links), and ONNX's libraries don't read such files; "
                "copy it to a file of its own"
            )
        if tensor.length is not None and tensor.length != tensor.nbytes:
            raise ModelError(
                f"{what}: it has {tensor.length} bytes there, and its shape {list(tensor.shape)} needs "
                f"{tensor.nbytes}; {AGAIN}"
            )
        end = (tensor.offset or 0) + tensor.nbytes
        if status.st_size < end:
            raise ModelError(
                f"{what}, which is truncated ({status.st_size} bytes instead of {end} or more); copy it again"
            )
        if not file.is_relative_to(folder):
            replace(_without_links(tensor, file.relative_to(real_folder), real_folder))


def _without_links(tensor: ir.ExternalTensor, location: pathlib.Path, folder: pathlib.Path) -> ir.ExternalTensor:
    """The same tensor by the name that its file really has: neither onnx-ir nor onnxruntime follows links out of the
    folder that they are given."""
    return ir.ExternalTensor(
        os.fspath(location),
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
        base_dir=folder,
    )


def _check_values(graph: ir.Graph | ir.Function, name: str) -> None:
    """Each value that a node reads, and each output, is made by something; head counts of attention operators fit
    their tensors."""
    for value in (*graph.inputs, *graph.outputs):
        _forget_negative_sizes(value)
    for node in ir.traversal.RecursiveGraphIterator(graph):
        where = f"node '{name_of(node)}' ({node.op_type})"
        for value in node.outputs:
            _forget_negative_sizes(value)
        if wrong := contradiction(node):
            raise ModelError(f"{name}: {where}: {wrong}; export the model again")
        for read in node.inputs:
            if read is not None and not _is_made(read):
                raise ModelError(f"{name}: {where} reads '{read.name}', which nothing produces; export the model again")
    for value in graph.outputs:
        if not _is_made(value):
            raise ModelError(f"{name}: its output '{value.name}' is produced by nothing; export the model again")


def _is_made(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def _forget_negative_sizes(value: ir.Value) -> None:
    """Some old exporters write -1 for a size that is open."""
    if value.shape is not None and any(isinstance(size, int) and size < 0 for size in value.shape):
        value.shape = ir.Shape([None if isinstance(size, int) and size < 0 else size for size in value.shape])


def _in_order(graph: ir.Graph | ir.Function, made: set[ir.Value]) -> bool:
    """Does each node stand behind those that make what it reads? `made`: the values made so far. Calls itself as deep
    as subgraphs are nested, which protobuf limits to less than a hundred."""
    for node in graph:
        if any(v is not None and v.producer() is not None and v not in made for v in node.inputs):
            return False
        if not all(_in_order(body, made) for body in subgraphs(node)):
            return False
        made.update(node.outputs)
    return True
