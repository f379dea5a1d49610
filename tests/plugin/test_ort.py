# SPDX-License-Identifier: Apache-2.0
"""The operator inside onnxruntime: all features on the cases of tests/cases.py, shapes, threads, saving, unloading."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import textwrap

import faplugin
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests import cases, tolerances
from tests.plugin import nodes

VERSION = tuple(int(part) for part in ort.__version__.split(".")[:2])


@pytest.mark.parametrize("case", cases.quick(), ids=str)
def test_case(case: cases.Case) -> None:
    problem = case.problem()
    tolerances.check(nodes.run(problem), problem)


def normal(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def operands(**others: np.ndarray) -> dict[str, np.ndarray]:
    return {"query": normal(2, 4, 5, 8), "key": normal(2, 2, 7, 8), "value": normal(2, 2, 7, 6), **others}


def test_empty_tensors() -> None:
    for shape in ((0, 4, 5, 8), (2, 4, 0, 8)):
        inputs = operands(query=np.zeros(shape, np.float32))
        inputs |= {name: inputs[name][: shape[0]] for name in ("key", "value")}
        (output,) = nodes.session(nodes.make_model(inputs, {})).run(None, inputs)
        assert output.shape == (*shape[:3], 6)
    inputs = operands(key=np.zeros((2, 2, 0, 8), np.float32), value=np.zeros((2, 2, 0, 6), np.float32))
    (output,) = nodes.session(nodes.make_model(inputs, {})).run(None, inputs)
    assert output.shape == (2, 4, 5, 6) and not output.any()


def test_past_without_present_equals_joined_keys() -> None:
    past = {"past_key": normal(2, 2, 3, 8), "past_value": normal(2, 2, 3, 6)}
    inputs = operands(**past)
    with_past = {"optional_inputs": "past_key,past_value", "is_causal": 1}
    (output,) = nodes.session(nodes.make_model(inputs, with_past)).run(None, inputs)
    joined = operands(
        key=np.concatenate([past["past_key"], inputs["key"]], axis=2),
        value=np.concatenate([past["past_value"], inputs["value"]], axis=2),
        query_offset=np.array([3]),
    )
    attributes = {"optional_inputs": "query_offset", "is_causal": 1}
    (expected,) = nodes.session(nodes.make_model(joined, attributes)).run(None, joined)
    assert np.array_equal(output, expected)


def test_present_without_past_is_a_copy() -> None:
    inputs = {"query": normal(2, 5, 32), "key": normal(2, 7, 16), "value": normal(2, 7, 12)}
    attributes = {"q_num_heads": 4, "kv_num_heads": 2, "optional_outputs": "present_key,present_value"}
    made = nodes.session(nodes.make_model(inputs, attributes, ["output", "present_key", "present_value"]))
    _, present_key, present_value = made.run(None, inputs)
    assert np.array_equal(present_key, inputs["key"].reshape(2, 7, 2, 8).transpose(0, 2, 1, 3))
    assert np.array_equal(present_value, inputs["value"].reshape(2, 7, 2, 6).transpose(0, 2, 1, 3))


def test_one_session_takes_other_shapes_each_run() -> None:
    symbols = {"query": ["B", 4, "S", 8], "key": ["B", 2, "T", 8], "value": ["B", 2, "T", 6]}
    made = nodes.session(nodes.make_model(operands(), {}, shapes=symbols))
    for batch, rows, keys in ((1, 1, 1), (3, 17, 5), (2, 5, 300)):
        inputs = {
            "query": normal(batch, 4, rows, 8),
            "key": normal(batch, 2, keys, 8),
            "value": normal(batch, 2, keys, 6),
        }
        expected = faplugin.attention(**inputs)
        assert np.array_equal(made.run(None, inputs)[0], expected)


@pytest.mark.parametrize(
    ("shapes", "attributes", "expected"),
    [
        ({"query": ["B", 4, "S", 8], "key": ["B", 2, "T", 8], "value": ["B", 2, "T", 6]}, {}, ["B", 4, "S", 6]),
        ({"query": ["B", 4, "S", 8]}, {"output_layout": "BSH"}, ["B", "S", 24]),
        ({"query": ["B", 4, "S", 8]}, {"output_layout": "BSHD"}, ["B", "S", 4, 6]),
        ({"value": ["B", 2, "T", "D"]}, {}, [2, 4, 5, "D"]),
        ({"query": None}, {}, []),
    ],
)
def test_shapes_are_inferred(shapes: dict, attributes: dict, expected: list) -> None:
    made = nodes.session(nodes.make_model(operands(), attributes, shapes=shapes))
    assert made.get_outputs()[0].shape == expected


def test_shapes_of_optional_outputs_are_inferred() -> None:
    inputs = operands(past_key=normal(2, 2, 3, 8), past_value=normal(2, 2, 3, 6))
    attributes = {"optional_inputs": "past_key,past_value", "optional_outputs": "present_key,present_value,lse"}
    shapes = {"key": [2, 2, "T", 8], "past_key": [2, 2, "P", 8]}
    made = nodes.session(nodes.make_model(inputs, attributes, nodes.OUTPUTS, shapes))
    found = [output.shape for output in made.get_outputs()]
    # Before 1.28 a shape for an output that a node lacks ends the process, so none is told.
    told = [[2, 2, "P + T", 8], [2, 2, 10, 6], [2, 4, 5]] if VERSION >= (1, 28) else [[], [], []]
    assert found == [[2, 4, 5, 6], *told]


@pytest.mark.skipif(VERSION < (1, 28), reason="shapes of optional outputs can't be told before 1.28")
@pytest.mark.parametrize(("extent", "rows"), [(None, None), ("T", None), (7, 7)])
def test_a_size_that_nobody_knows_may_be_the_larger_one(extent: int | str | None, rows: int | None) -> None:
    """present_key has as many rows as kv_extent says, if that is more than the past has."""
    caches = {"past_key": normal(2, 2, 3, 8), "past_value": normal(2, 2, 3, 6)}
    new = {"key": normal(2, 2, 5, 8), "value": normal(2, 2, 5, 6)}
    inputs = operands(**new, **caches, write_indices=np.zeros(2, np.int64), kv_extent=np.zeros((2, 7), np.int64))
    attributes = {"optional_inputs": ",".join([*caches, "write_indices", "kv_extent"]), "cache": "write"}
    attributes |= {"optional_outputs": "present_key,present_value"}
    model = nodes.make_model(inputs, attributes, nodes.OUTPUTS[:3], {"kv_extent": [2, extent]})
    found = nodes.session(model).get_outputs()[1].shape
    assert found[:2] == [2, 2] and found[3] == 8
    assert found[2] == rows if rows else isinstance(found[2], str)


def test_concurrent_runs_of_one_session() -> None:
    made = nodes.session(nodes.make_model(operands(), {}), intra_op_num_threads=2)
    inputs = [operands(query=normal(2, 4, 5, 8) * (1 + i)) for i in range(8)]
    expected = [made.run(None, feed)[0] for feed in inputs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: made.run(None, inputs[i % 8])[0], range(200)))
    assert all(np.array_equal(result, expected[i % 8]) for i, result in enumerate(results))


def test_runs_are_bitwise_repeatable() -> None:
    inputs = {"query": normal(1, 4, 150, 64), "key": normal(1, 4, 700, 64), "value": normal(1, 4, 700, 64)}
    model = nodes.make_model(inputs, {"is_causal": 1})
    results = [nodes.session(model, intra_op_num_threads=threads).run(None, inputs)[0] for threads in (1, 2, 2)]
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[1], results[2])


def test_optimized_model_is_saved_and_loaded(tmp_path) -> None:
    model, path = nodes.make_model(operands(), {"is_causal": 1}), tmp_path / "optimized.onnx"
    (expected,) = nodes.session(model, optimized_model_filepath=str(path)).run(None, operands())
    (output,) = nodes.session(onnx.load(path)).run(None, operands())
    assert np.array_equal(output, expected)


def test_sessions_come_and_go() -> None:
    """The runtime closes the library with its last session and opens it again; also from threads that end before it."""
    script = """
        import gc, threading, numpy as np
        from tests.plugin import nodes, test_ort
        inputs, outputs = test_ort.operands(), []
        def once():
            session = nodes.session(nodes.make_model(inputs, {}))
            outputs.append(session.run(None, inputs)[0])
            del session
            gc.collect()
        for _ in range(3):
            once()
            thread = threading.Thread(target=once)
            thread.start()
            thread.join()
        assert all(np.array_equal(outputs[0], output) for output in outputs) and len(outputs) == 6
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unused_inputs_may_be_anything() -> None:
    inputs = operands(a=np.zeros((1, 1, 1, 1, 1, 3)), b=np.zeros(0, np.uint8), query_offset=np.array([2]))
    attributes = {"optional_inputs": "unused,unused,query_offset", "is_causal": 1}
    made = nodes.session(nodes.make_model(inputs, attributes))
    assert made.get_outputs()[0].shape == [2, 4, 5, 6]
    expected = faplugin.attention(**operands(query_offset=inputs["query_offset"]), is_causal=True)
    assert np.array_equal(made.run(None, inputs)[0], expected)
