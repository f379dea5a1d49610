# SPDX-License-Identifier: Apache-2.0
"""The functions that stand in for the operator: the rewritten file runs in onnxruntime without our library, and
equally with it."""

from __future__ import annotations

import itertools
import json

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from faexport import pipeline
from faexport.fallback import functions
from faexport.runtimes import ort_session
from faexport.spec import DOMAIN
from onnx import TensorProto, helper

from tests.export import mask_feeds
from tests.export import mask_grammar as grammar
from tests.export.compared import built, run
from tests.export.mask_grammar import Recipe

RECIPES = {
    "plain": Recipe(()),
    "causal": Recipe(("j <= i",)),
    "causal with a cache": Recipe(("j <= i",), cache=True),
    "sliding window": Recipe(("j <= i", "j > i - w"), window=3),
    "window on both sides": Recipe(("abs(i - j) <= w",), window=2),
    "padding, minimum": Recipe(("unsqueeze",)),
    "padding, -inf": Recipe(("unsqueeze",), fill=float(-np.inf), guard=True),
    "lengths": Recipe(("lengths",)),
    "alibi": Recipe(("j <= i",), bias="alibi j"),
    "bias": Recipe((), bias="table"),
    "bias and padding": Recipe(("unsqueeze",), bias="table"),
    "off the diagonal": Recipe(("j <= i - 1",), fill=float(-np.inf), guard=True),
    "BERT": Recipe(("unsqueeze",), layers=2),
    "ViT": Recipe((), structure="packed slice"),
    "CLIP's text model": Recipe(("buffer",), structure="bmm"),
    "GPT-2": Recipe(("float buffer",), form="where scores", structure="packed split"),
    "Llama": Recipe(("j <= i", "gather_nd"), kv_heads=1, cache=True),
    "Mistral": Recipe(("j <= i", "j > i - w", "gather_nd"), kv_heads=1, cache=True),
    "Gemma 2": Recipe(("j <= i", "j > i - w", "flat gather"), kv_heads=1, softcap=True),
    "GPT-OSS": Recipe(("j <= i", "j > i - w", "gather_nd"), kv_heads=1, sinks=True),
    "BLOOM": Recipe(("j <= i", "not equal 0"), structure="bmm with 4-D masks", bias="alibi counted"),
    "MPT": Recipe(("not upper", "unsqueeze"), form="where not scores", bias="alibi j", structure="packed slice"),
    "T5": Recipe(("j <= i", "unsqueeze"), bias="table", layers=2),
}


def fused(model: onnx.ModelProto, **options: object) -> ir.Model:
    changed, _ = pipeline.run(ir.from_proto(model), pipeline.Options(**options))
    assert any(node.domain == DOMAIN for node in changed.graph.all_nodes())
    return changed


@pytest.mark.parametrize("name", RECIPES)
def test_runs_without_the_library(name: str) -> None:
    model = grammar.build(RECIPES[name])
    changed = ir.to_proto(fused(model))
    onnx.checker.check_model(changed)
    for seed in range(3):
        feeds = mask_feeds.feeds(model, seed)
        want, got = run(model, feeds)[0], run(changed, feeds)[0]
        known = np.isfinite(want)
        np.testing.assert_allclose(got[known], want[known], rtol=1e-4, atol=1e-5)
        if ort_session.has_library():
            np.testing.assert_allclose(run(changed, feeds, built())[0], got, rtol=1e-4, atol=1e-5)


def test_without_fallback_there_is_no_function() -> None:
    assert not fused(grammar.build(RECIPES["causal"]), fallback=False).functions


def test_the_library_wins() -> None:
    """A function that computes something else is not looked at where the library is."""
    if not ort_session.has_library():
        pytest.skip("the operator's library is not installed")
    model = grammar.build(RECIPES["causal"])
    changed = fused(model)
    (key,) = changed.functions
    nodes = changed.functions[key].graph
    result = nodes.outputs[0].producer()
    zeros = ir.node("Sub", [result.inputs[0], result.inputs[0]])
    nodes.insert_before(result, zeros)
    result.replace_input_with(0, zeros.outputs[0])
    feeds = mask_feeds.feeds(model, 0)
    wrong, right = (run(ir.to_proto(changed), feeds, library)[0] for library in (None, built()))
    assert not wrong.any()
    np.testing.assert_allclose(right, run(model, feeds)[0], rtol=1e-4, atol=1e-5)


def operator(name: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node("FlashAttention", inputs, [output], name=name, domain=DOMAIN, **attributes)


def two_nodes(first: dict, second: dict, extra: dict[str, tuple]) -> onnx.ModelProto:
    """Two fused nodes in a row on [1, 2, 5, 8]; each is given as {"inputs": […], attribute: value …}."""
    shape = [1, 2, 5, 8]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "qkv"]
    values += [helper.make_tensor_value_info(n, *what) for n, what in extra.items()]
    nodes = []
    for k, spec in enumerate((first, second)):
        attributes = {n: v for n, v in spec.items() if n != "inputs"}
        nodes.append(
            operator(f"n{k}", ["q" if k == 0 else "t", "k", "v", *spec.get("inputs", [])], "ty"[k], **attributes)
        )
    graph = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


MASK = {"mask": (TensorProto.BOOL, [1, 1, 5, 5])}
BIAS = {"bias": (TensorProto.FLOAT, [1, 2, 5, 5])}


def test_nodes_with_different_inputs_share_one_function() -> None:
    masked = {"inputs": ["mask"], "optional_inputs": "attn_mask", "empty_row": "mean"}
    biased = {"inputs": ["bias"], "optional_inputs": "attn_bias", "is_causal": 1, "empty_row": "mean"}
    model = ir.from_proto(two_nodes(masked, biased, MASK | BIAS))
    assert functions.add_fallback(model) == ""
    assert [key[2] for key in model.functions] == [""]
    names = [node.attributes["optional_inputs"].value for node in model.graph if node.domain == DOMAIN]
    assert names == ["attn_mask,unused", "unused,attn_bias"]
    feeds = random_feeds(model)
    (got,) = run(ir.to_proto(model), feeds)
    np.testing.assert_allclose(got, reference(feeds), rtol=1e-4, atol=1e-5)
    if ort_session.has_library():
        np.testing.assert_allclose(run(ir.to_proto(model), feeds, built())[0], got, rtol=1e-4, atol=1e-5)


def random_feeds(model: ir.Model) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    feeds = {v.name: random.standard_normal(tuple(v.shape)).astype(np.float32) for v in model.graph.inputs}
    return {n: a > -0.5 if n == "mask" else a for n, a in feeds.items()}


def reference(feeds: dict[str, np.ndarray]) -> np.ndarray:
    def attend(q: np.ndarray, keep: np.ndarray, bias: np.ndarray | float) -> np.ndarray:
        s = q @ feeds["k"].swapaxes(-1, -2) / np.sqrt(8) + bias
        e = np.exp(s) * keep
        total = e.sum(-1, keepdims=True)
        p = np.where(total > 0, e / np.where(total > 0, total, 1), 1 / 5)
        return p @ feeds["v"]

    return attend(attend(feeds["q"], feeds["mask"], 0.0), np.tril(np.ones((5, 5))), feeds["bias"])


def test_a_second_run_changes_nothing() -> None:
    model = fused(grammar.build(RECIPES["bias and padding"]))
    first = ir.to_proto(model)
    again, _ = pipeline.run(ir.from_proto(first), pipeline.Options())
    assert ir.to_proto(again) == first
    functions.add_fallback(model)
    assert ir.to_proto(model) == first


def test_forms_that_cannot_be_one_are_overloads_and_older_runtimes_refuse() -> None:
    """An onnxruntime that knows no overloads would take the last function for all nodes: that one does not load."""
    zero = {"inputs": ["mask"], "optional_inputs": "attn_mask", "empty_row": "zero"}
    model = ir.from_proto(two_nodes(zero, zero | {"empty_row": "mean"}, MASK))
    assert functions.add_fallback(model) == ""
    assert model.ir_version >= functions.OVERLOADS_IR_VERSION
    overloads = [key[2] for key in model.functions]
    assert len(overloads) == 3 and overloads[-1] == functions.LAST_OVERLOAD
    feeds = random_feeds(model)
    feeds["mask"][..., 2, :] = False
    newer = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 31)
    if newer:
        (got,) = run(ir.to_proto(model), feeds)
        np.testing.assert_allclose(got[0, :, 2], feeds["v"].mean(axis=-2)[0], rtol=1e-4, atol=1e-5)
    if ort_session.has_library():
        run(ir.to_proto(model), feeds, built())


def test_what_nothing_stands_in_for_is_said() -> None:
    packed = {"inputs": ["cu", "cu"], "optional_inputs": "cu_seqlens_q,cu_seqlens_kv"}
    model = ir.from_proto(two_nodes(packed, {}, {"cu": (TensorProto.INT32, [2])}))
    assert "cu_seqlens" in functions.add_fallback(model)
    assert not model.functions


LAYOUTS = tuple(itertools.product(("BHSD", "BSHD", "BSH"), ("BHSD", "BSHD", "BSH")))


@pytest.mark.parametrize(("given", "out"), LAYOUTS)
def test_layouts_and_groups(given: str, out: str) -> None:
    """4 query heads on 2 of keys and values, in each layout, with sinks and the log-sum-exp."""
    sizes = {"BHSD": lambda h: [2, h, 5, 8], "BSHD": lambda h: [2, 5, h, 8], "BSH": lambda h: [2, 5, h * 8]}[given]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, sizes(h)) for n, h in zip("qkv", (4, 2, 2), strict=True)
    ]
    values.append(helper.make_tensor_value_info("sinks", TensorProto.FLOAT, [4]))
    words = {f"{name}_layout": given for name in ("query", "key", "value")} | {"output_layout": out}
    node = helper.make_node(
        "FlashAttention", ["q", "k", "v", "sinks"], ["y", "", "", "lse"], domain=DOMAIN, name="n", q_num_heads=4,
        kv_num_heads=2, optional_inputs="sinks", optional_outputs="lse", is_causal=1, softcap=2.0, **words,
    )  # fmt: skip
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "lse")]
    graph = helper.make_graph([node], "g", values, outputs)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=9))
    assert functions.add_fallback(model) == ""
    random = np.random.default_rng(1)
    feeds = {v.name: random.standard_normal(tuple(v.shape)).astype(np.float32) for v in model.graph.inputs}
    y, lse = run(ir.to_proto(model), feeds)
    want, want_lse = grouped_reference(feeds, given)
    back = {"BHSD": want, "BSHD": want.swapaxes(1, 2), "BSH": want.swapaxes(1, 2).reshape(2, 5, 32)}[out]
    np.testing.assert_allclose(y, back, rtol=1e-4, atol=1e-5, err_msg=json.dumps(words))
    np.testing.assert_allclose(lse, want_lse, rtol=1e-4, atol=1e-5)


def float8_model(opset: int, words: dict, past: bool = False) -> onnx.ModelProto:
    """float32 inputs, through a Cast each, into a float8 node with descales and a float32 Cast of its output behind."""
    inputs = {"q": [2, 5, 32], "k": [2, 7, 16], "v": [2, 7, 16]}
    factors = {"qs": [], "ks": [2], "vs": [2, 2], "os": [1]}
    if words["output_dtype"] != "float8_e4m3fn":
        factors.pop("os")
    if past:
        inputs |= {"pk": [2, 2, 3, 8], "pv": [2, 2, 3, 8]}
    names = {"qs": "query_descale", "ks": "key_descale", "vs": "value_descale", "os": "output_scale"}
    optional = [*(("past_key", "past_value") if past else ()), *(names[f] for f in factors)]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (inputs | factors).items()]
    nodes = [helper.make_node("Cast", [n], [f"{n}8"], to=TensorProto.FLOAT8E4M3FN) for n in inputs]
    nodes.append(
        operator("n", [*(f"{n}8" for n in inputs), *factors], "o", q_num_heads=4, kv_num_heads=2, is_causal=1,
                 optional_inputs=",".join(optional), query_layout="BSH", **words)
    )  # fmt: skip
    nodes.append(helper.make_node("Cast", ["o"], ["y"], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes, "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "S", "C"])]
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


@pytest.mark.parametrize("output", ["float32", "float16", "bfloat16", "float8_e4m3fn", ""])
@pytest.mark.parametrize("opset", [19, 21])
def test_float8(output: str, opset: int) -> None:
    model = ir.from_proto(float8_model(opset, {"output_dtype": output}))
    assert functions.add_fallback(model) == ""
    onnx.checker.check_model(ir.to_proto(model))
    random = np.random.default_rng(0)
    feeds = {
        v.name: random.uniform(0.2, 0.4, tuple(v.shape)).astype(np.float32)
        if v.name.endswith("s")
        else random.standard_normal(tuple(v.shape)).astype(np.float32) * 4
        for v in model.graph.inputs
    }
    (y,) = run(ir.to_proto(model), feeds)
    e4m3 = {n: feeds[n].astype(ml_dtypes.float8_e4m3fn).astype(np.float32) for n in "qkv"}
    q, k, v = (e4m3[n].reshape(2, -1, h, 8).swapaxes(1, 2) for n, h in (("q", 4), ("k", 2), ("v", 2)))
    k, v = k * feeds["ks"].reshape(1, 2, 1, 1), v * feeds["vs"].reshape(2, 2, 1, 1)
    s = feeds["qs"] * q @ np.repeat(k, 2, axis=1).swapaxes(-1, -2) / np.sqrt(8)
    e = np.exp(s) * np.tri(5, 7)
    want = e / e.sum(-1, keepdims=True) @ np.repeat(v, 2, axis=1) / feeds.get("os", 1)
    want = want.swapaxes(1, 2).reshape(2, 5, 32)
    error = {"float32": 1e-6, "float16": 2**-11, "float8_e4m3fn": 2**-4}.get(output, 2**-8)
    np.testing.assert_allclose(y, want, rtol=error, atol=2e-5 if output != "float8_e4m3fn" else 2**-10)
    if ort_session.has_library():
        np.testing.assert_allclose(run(ir.to_proto(model), feeds, built())[0], y, rtol=2 * error, atol=2**-9)


def test_what_nothing_stands_in_for_float8() -> None:
    words = {"output_dtype": "float16"}
    model = ir.from_proto(float8_model(18, words))
    assert "the stand-in for float8 needs 19" in functions.add_fallback(model) and not model.functions
    model = ir.from_proto(float8_model(19, words, past=True))
    assert "a past or present of float8" in functions.add_fallback(model) and not model.functions


@pytest.mark.parametrize(("rows", "keys"), [(0, 7), (5, 0), (0, 0)])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "BSH"])
def test_tensors_without_elements(layout: str, rows: int, keys: int) -> None:
    def shape(heads: int, length: int) -> list[int]:
        return {"BHSD": [2, heads, length, 8], "BSHD": [2, length, heads, 8], "BSH": [2, length, heads * 8]}[layout]

    sizes = {"q": shape(4, rows), "k": shape(2, keys), "v": shape(2, keys)}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * len(s)) for n, s in sizes.items()]
    values.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, [None] * 4))
    words = {f"{name}_layout": layout for name in ("query", "key", "value", "output")}
    node = helper.make_node(
        "FlashAttention", ["q", "k", "v", "mask"], ["y"], domain=DOMAIN, name="n", q_num_heads=4, kv_num_heads=2,
        is_causal=1, optional_inputs="attn_mask", **words,
    )  # fmt: skip
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=9))
    assert functions.add_fallback(model) == ""
    feeds = {n: np.ones(s, np.float32) for n, s in sizes.items()} | {"mask": np.ones((1, 1, 1, keys), np.bool_)}
    (y,) = run(ir.to_proto(model), feeds)
    assert y.shape == tuple(sizes["q"]) and not y.any()


@pytest.mark.parametrize("opset", [7, 9, 10, 11])
def test_packed_columns_of_old_opsets(opset: int) -> None:
    """The columns are the node's numbers, so that no Range is needed."""
    values = [helper.make_tensor_value_info(*what) for what in (("x", TensorProto.FLOAT, [2, 5, 40]),)]
    words = {f"{name}_layout": "BSH" for name in ("query", "key", "value", "output")}
    columns = {"packed_columns": [0, 8, 16, 8, 32, 4], "head_dim": 8, "head_dim_v": 4}
    node = operator("n", ["x"] * 3, "y", scale=0.5, q_num_heads=2, kv_num_heads=2, **words, **columns)
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=5))
    assert functions.add_fallback(model) == ""
    feeds = random_feeds(model)
    q, k, v = (x.reshape(2, 5, 2, -1).swapaxes(1, 2) for x in np.split(feeds["x"], [16, 32], axis=2))
    e = np.exp(q @ k.swapaxes(-1, -2) / 2)
    want = (e / e.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(2, 5, 8)
    np.testing.assert_allclose(run(ir.to_proto(model), feeds)[0], want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12])
@pytest.mark.parametrize("form", ["plain", "groups", "bias", "mask", "causal"])
def test_old_opsets(form: str, opset: int) -> None:
    """Before opset 13 the function holds the node's numbers; what an opset has no operator for is said."""
    heads = 1 if form == "groups" else 2
    sizes = {"q": [1, 2, 5, 8], "k": [1, heads, 5, 8], "v": [1, heads, 5, 8]}
    extra = {"bias": BIAS, "mask": MASK}.get(form, {})
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in sizes.items()]
    values += [helper.make_tensor_value_info(n, *what) for n, what in extra.items()]
    words = {"optional_inputs": f"attn_{form}"} if extra else {"is_causal": int(form == "causal")}
    node = operator("n", ["q", "k", "v", *extra], "y", scale=0.5, softcap=3.0, **words)
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=5))
    first = {"mask": 9, "bias": 9, "causal": 11}.get(form, 7)
    if opset < first:
        assert f"opset {opset} doesn't have" in functions.add_fallback(model) and not model.functions
        return
    assert functions.add_fallback(model) == ""
    feeds = random_feeds(model)
    s = 3 * np.tanh(feeds["q"] @ feeds["k"].swapaxes(-1, -2) / 6) + feeds.get("bias", 0)
    keep = feeds["mask"] if form == "mask" else np.tri(5, dtype=bool) if form == "causal" else np.ones((5, 5), bool)
    e = np.where(keep, np.exp(s), 0)
    total = e.sum(-1, keepdims=True)
    want = np.where(total > 0, e / np.where(total > 0, total, 1), 0) @ feeds["v"]
    np.testing.assert_allclose(run(ir.to_proto(model), feeds)[0], want, rtol=1e-4, atol=1e-5)


def grouped_reference(feeds: dict[str, np.ndarray], layout: str) -> tuple[np.ndarray, np.ndarray]:
    q, k, v = (
        feeds[n] if layout == "BHSD" else feeds[n].reshape(2, 5, -1, 8).swapaxes(1, 2) for n in "qkv"
    )  # [B, H, S, D]
    k, v = (np.repeat(x, 2, axis=1) for x in (k, v))
    s = 2 * np.tanh(q @ k.swapaxes(-1, -2) / np.sqrt(8) / 2)
    e = np.where(np.tril(np.ones((5, 5), bool)), np.exp(s), 0)
    total = e.sum(-1, keepdims=True) + np.exp(feeds["sinks"]).reshape(1, 4, 1, 1)
    return e / total @ v, np.log(total)[..., 0]


@pytest.mark.parametrize(
    ("optional", "attributes", "reason"),
    [
        ("past_key,past_value,nonpad_kv_seqlen", {"cache": "window"}, "cache = window"),
        ("past_key,past_value,kv_extent", {"cache": "write"}, "the input kv_extent"),
        ("past_key,past_value,k_scale,v_scale", {}, "the input k_scale"),
        ("cos_cache,sin_cache,query_lengths", {}, "the input query_lengths"),
    ],
)
def test_nothing_stands_in_for_other_caches(optional: str, attributes: dict, reason: str) -> None:
    names = ["query", "key", "value", *optional.split(",")]
    node = helper.make_node("FlashAttention", names, ["output"], domain=DOMAIN, optional_inputs=optional, **attributes)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 3, 8]) for name in names]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 2, 3, 8])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(helper.make_graph([node], "g", inputs, [output]), opset_imports=opsets))
    assert f"nothing stands in for {reason}" in functions.add_fallback(model) and not model.functions


TRANSFORMS = {
    "by row": ({"rotary_dim": 4}, ("cos_cache", "sin_cache")),
    "by row, pairs": ({"rotary_dim": 6, "rotary_interleaved": 1}, ("cos_cache", "sin_cache")),
    "by position": ({}, ("cos_cache", "sin_cache", "position_ids")),
    "norm": ({"q_norm_epsilon": 0.1}, ("q_norm_weight", "k_norm_weight")),
    "norm of keys, by position": ({"k_norm_epsilon": 0.5}, ("cos_cache", "sin_cache", "position_ids", "k_norm_weight")),
    "a cache of rows in front of heads": ({"cache_layout": "BSHD"}, ()),
    "written": ({"cache": "write"}, ("write_indices",)),
    "written up to the lengths": ({"cache": "write", "is_causal": 1}, ("nonpad_kv_seqlen",)),
    "written, with lengths": (
        {"cache": "write", "alignment": "bottom_right", "is_causal": 1},
        ("nonpad_kv_seqlen", "write_indices"),
    ),
    "a cache of rows": ({"cache_layout": "BSH", "kv_num_heads": 2}, ()),
    "a cache of rows, whose heads the keys tell": ({"cache_layout": "BSH"}, ()),
    "a cache of rows, written": ({"cache_layout": "BSH", "kv_num_heads": 2, "cache": "write"}, ("write_indices",)),
    "written, no key": ({"cache": "write", "empty_row": "mean", "is_causal": 1}, ("query_offset", "write_indices")),
    "causal, lengths": ({"is_causal": 1}, ("nonpad_kv_seqlen",)),
    "causal from the end of the lengths": ({"is_causal": 1, "alignment": "bottom_right"}, ("nonpad_kv_seqlen",)),
}


@pytest.mark.parametrize(("attributes", "names"), TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_what_a_cache_step_does_is_the_same_in_the_stand_in(attributes: dict, names: tuple, library: str) -> None:
    """Positions repeat, and some lie outside of the table."""
    layout = attributes.get("cache_layout", "BHSD")
    rng, rows, axes = np.random.default_rng(4), 3, "BSHD" if layout == "BSH" else layout
    sizes = {"query": {"H": 4, "S": rows}, "key": {"H": 2, "S": rows}, "past_key": {"H": 2, "S": 5}}
    sizes |= {"value": sizes["key"], "past_value": sizes["past_key"]}
    feeds = {n: rng.standard_normal([{"B": 2, "D": 8, **s}[x] for x in axes]) for n, s in sizes.items()}
    by_row = "position_ids" not in names
    feeds |= {n: rng.standard_normal([1, rows, 4] if by_row else [6, 4]) for n in ("cos_cache", "sin_cache")}
    feeds |= {f"{x}_norm_weight": rng.standard_normal(8) for x in "qk"}
    feeds = {n: x.astype(np.float32) for n, x in feeds.items()}
    lengths = [3, 5] if "cache" in attributes else [8, 6]
    feeds |= {"position_ids": np.array([[2, 2, 0], [1, 7, -1]]), "nonpad_kv_seqlen": np.array(lengths)}
    if layout == "BSH":
        feeds |= {name: feeds[name].reshape(2, 5, 16) for name in ("past_key", "past_value")}
    feeds |= {"write_indices": np.array([0, 2]), "query_offset": np.array([-2])}
    optional = ["past_key", "past_value", *names]
    feeds = {n: feeds[n] for n in ("query", "key", "value", *optional)}
    words = {f"{name}_layout": axes for name in ("query", "key", "value")}
    words |= {"optional_inputs": ", ".join(optional), "optional_outputs": "present_key,present_value", **attributes}
    outputs = ["output", "present_key", "present_value"]
    node = helper.make_node("FlashAttention", list(feeds), outputs, domain=DOMAIN, **words)
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    inputs = [helper.make_tensor_value_info(n, types[x.dtype], list(x.shape)) for n, x in feeds.items()]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    plain = helper.make_model(helper.make_graph([node], "g", inputs, made), opset_imports=opsets, ir_version=9)
    model = ir.from_proto(plain)
    assert functions.add_fallback(model) == ""
    for want, got in zip(run(plain, feeds, library), run(ir.to_proto(model), feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
