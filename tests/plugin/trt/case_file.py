# SPDX-License-Identifier: Apache-2.0
"""Cases (tests/cases.py) as the file that the conformance host reads, and the host's outputs read back.

A case has two bindings: its own shapes, and others with the same attributes, so that a range of shapes is asked for.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

import numpy as np

from tests.plugin import nodes
from tests.problems import Case, Problem, packed_rows

KINDS = {int: "INT", float: "FLOAT", str: "STRING", list: "INTS"}


def other_sizes(case: Case) -> Case:
    """The same node with a larger batch, more rows, keys and past."""
    more_keys = 3 if case.layout in ("QKV", "HQKV") else 5  # one tensor holds query, key and value
    past = case.past + 2 if case.past else 0
    return dataclasses.replace(
        case,
        batch_size=case.batch_size + 1,
        seqlen_q=case.seqlen_q + 3,
        seqlen_kv=case.seqlen_kv + more_keys,
        past=past,
    )


def output_shapes(case: Case, problem: Problem) -> list[tuple[int, ...]]:
    """Shapes of the node's outputs (docs/operator.md), from the description of the case alone but for packed rows."""
    batch, rows_q, rows_kv = case.batch_size, case.seqlen_q, case.seqlen_kv
    if case.packed:
        batch, rows_q, rows_kv = 1, *packed_rows(case, problem.inputs)
    layout = case.output_layout or ("BSH" if case.layout in ("QKV", "HQKV") else case.layout)
    heads, dim = case.num_q_heads, case.dim_v
    outputs = {
        "BHSD": (batch, heads, rows_q, dim),
        "BSHD": (batch, rows_q, heads, dim),
        "BSH": (batch, rows_q, heads * dim),
    }
    shapes = {
        "output": outputs[layout],
        "present_key": (batch, case.num_kv_heads, case.past + rows_kv, case.head_dim),
        "present_value": (batch, case.num_kv_heads, case.past + rows_kv, case.dim_v),
        "lse": (batch, heads, rows_q),
    }
    return [shapes[name] for name in problem.outputs]


def write(path: pathlib.Path, cases: Iterable[Case], data_path: pathlib.Path | None = None) -> None:
    """Writes the host's case file, and with `data_path` the inputs' values."""
    with path.open("w") as file, (data_path or pathlib.Path("/dev/null")).open("wb") as data:
        for case in cases:
            other = other_sizes(case)
            problems = [case.problem(), other.problem()]
            if problems[0].attributes != problems[1].attributes:
                raise ValueError(f"{case.id} has other attributes at other sizes")
            _write_case(
                file, case.id, problems, [output_shapes(case, problems[0]), output_shapes(other, problems[1])], data
            )


def _write_case(
    file: TextIO, name: str, problems: Sequence[Problem], shapes: Sequence[Sequence[tuple[int, ...]]], data
) -> None:
    file.write(f"case {quoted(name)}\n")
    for attribute, value in problems[0].attributes.items():
        file.write(f"{KINDS[type(value)]} {attribute} {attribute_text(value)}\n")
    for slot, values in enumerate(problems[0].inputs.values()):
        others = list(problems[1].inputs.values())[slot]
        file.write(f"input {values.dtype.name} {data.tell()} 2{list_text(values.shape)}{list_text(others.shape)}\n")
        data.write(np.ascontiguousarray(values).tobytes())
    for slot, output in enumerate(problems[0].outputs):
        kind = nodes.output_dtype(output, problems[0].inputs, problems[0].attributes).name
        file.write(f"output {kind} -1 2{list_text(shapes[0][slot])}{list_text(shapes[1][slot])}\n")
    file.write("end\n")


def attribute_text(value: int | float | str | list[int]) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return list_text(value).strip()
    return repr(float(np.float32(value))) if isinstance(value, float) else str(value)


def list_text(values: Iterable[int]) -> str:
    values = list(values)
    return "".join(f" {value}" for value in [len(values), *values])


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def read_outputs(path: pathlib.Path, cases: Iterable[Case]) -> Iterator[tuple[Case, dict[int, bytes]]]:
    """For each case, in the order in which the host wrote them, the outputs by tactic of those that ran.

    The last one is no tactic but an engine that was built on an A100.
    """
    with path.open("rb") as file:
        num_tactics = file.read(1)[0]
        for case in cases:
            outputs = {}
            for tactic in range(num_tactics):
                size = int.from_bytes(file.read(8), "little", signed=True)
                if size >= 0:
                    outputs[tactic] = file.read(size)
            yield case, outputs


def split_outputs(content: bytes, case: Case, problem: Problem) -> dict[str, np.ndarray]:
    """One result of the host as arrays by name."""
    arrays, offset = {}, 0
    for name, shape in zip(problem.outputs, output_shapes(case, problem), strict=True):
        dtype = nodes.output_dtype(name, problem.inputs, problem.attributes)
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(content, dtype, count, offset).reshape(shape)
        offset += count * dtype.itemsize
    return arrays
