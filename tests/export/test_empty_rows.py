# SPDX-License-Identifier: Apache-2.0
"""Two finite masks, one after the other: rows without a visible key, exact and without a tensor of S_q x S_kv."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from faexport import pipeline
from faexport.runtimes import ort_session
from faexport.spec import AttentionSpec, Refusal
from faexport.understand.mask import empty_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.export import mask_feeds, site_graphs
from tests.export import mask_grammar as grammar
from tests.export.compared import built, run
from tests.export.mask_grammar import HEAD_DIM, HEADS, MINIMUM, Recipe
from tests.export.test_random_graphs import worst

TOLERANCE = 2e-6  # of the largest magnitude, float32
LOCAL = Recipe(("band buffer", "causal padding"), apart=True, window=2, first_form="where scores")  # GPT-Neo
PRODUCT = Recipe(("j <= i",), form="where scores", bias="padding", bias_first=False)  # GPT-2 before transformers 4.48
WEAK = dataclasses.replace(PRODUCT, fill=-1e4, structure="packed split")  # GPT-1
RECIPES = {
    "window, then causal padding": LOCAL,
    "with a cache": dataclasses.replace(LOCAL, cache=True),
    "heads that share values": dataclasses.replace(LOCAL, cache=True, kv_heads=1),
    "packed": dataclasses.replace(LOCAL, structure="packed split"),
    "packed, heads that share values": dataclasses.replace(LOCAL, structure="packed slice", kv_heads=1),
    "heads in the batch": dataclasses.replace(LOCAL, structure="bmm"),
    "two layers": dataclasses.replace(LOCAL, layers=2),
    "window, then padding": Recipe(("band buffer", "unsqueeze"), apart=True, window=2),
    "scaled after the masks": Recipe(("j <= i", "unsqueeze"), apart=True, scale_after_mask=True),
    "window on both sides": Recipe(("abs(i - j) <= w", "unsqueeze"), apart=True, window=2),
    "open on the right": Recipe(("j > i - w", "unsqueeze"), apart=True, window=2, cache=True),
    "open on the left": Recipe(("j <= i + w", "unsqueeze"), apart=True, window=2, cache=True),
    "a product": PRODUCT,
    "a product, window, cache": dataclasses.replace(PRODUCT, parts=("band buffer",), window=2, cache=True),
    "a weak fill, then a product": WEAK,
}


def fused(model: onnx.ModelProto, **options: object) -> tuple[onnx.ModelProto, list[AttentionSpec]]:
    changed, report = pipeline.run(ir.from_proto(model), pipeline.Options(**options))
    assert all(site.fused for site in report.sites), [site.refusal for site in report.sites]
    return ir.to_proto(changed), report.sites


def paddings(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Masks [B, T] that leave rows without a visible key, and one that doesn't."""
    batch, keys = shape
    place = np.arange(keys)
    random = np.random.default_rng(7)
    return {
        "left": np.broadcast_to(place >= keys // 2, shape),
        "right": np.broadcast_to(place < keys // 3, shape),
        "holes": random.random(shape) < 0.3,
        "one sequence": np.arange(batch)[:, None] * np.ones(keys) > 0,
        "all": np.zeros(shape, bool),
        "none": np.ones(shape, bool),
    }


def feeds_of(model: onnx.ModelProto, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {
        i.name: [d.dim_value or sizes[d.dim_param] for d in i.type.tensor_type.shape.dim] for i in model.graph.input
    }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def difference(model: onnx.ModelProto, changed: onnx.ModelProto, sizes: dict[str, int], pattern: str) -> float:
    feeds = feeds_of(model, sizes)
    feeds["attention_mask"] = paddings(feeds["attention_mask"].shape)[pattern].astype(np.int64)
    return worst(run(model, feeds), run(changed, feeds, built()))


def sizes_of(recipe: Recipe, sequence: int = 11, past: int = 6) -> dict[str, int]:
    past = past if recipe.cache else 0
    return {"batch": 3, "sequence": sequence, "past_sequence": past, "total": sequence + past}


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_is_the_originals(name: str) -> None:
    recipe = RECIPES[name]
    model = grammar.build(recipe)
    changed, _ = fused(model)
    for pattern in paddings((1, 1)):
        for sequence in (11, 1) if recipe.cache else (11,):
            found = difference(model, changed, sizes_of(recipe, sequence), pattern)
            assert found <= TOLERANCE, (pattern, sequence)


@pytest.mark.parametrize("cache", (False, True))
def test_the_lower_of_two_masks(cache: bool) -> None:
    """TimesFM: the user's numbers may be any, also such that overflow."""
    recipe = Recipe((), bias="lower of two", cache=cache)
    model = grammar.build(recipe)
    changed, _ = fused(model)
    mask = pipeline.examine(ir.from_proto(model))[0].outcome.mask
    assert (mask.window_left, mask.window_right) == (-1, 0) and mask.empty_rows is not None
    assert "bias [B, 1, 1, S_kv]" in {fact.text for fact in mask.facts}
    for seed in range(20):
        feeds = mask_feeds.feeds(model, seed)
        feeds["padding"][0] = 1
        assert worst(run(model, feeds), run(changed, feeds, built())) <= TOLERANCE
    assumed = pipeline.examine(ir.from_proto(model), pipeline.Options(assume_full_rows=True))[0].outcome.mask
    assert assumed.is_causal and assumed.empty_rows is None


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_of_rows_times_keys_is_left(name: str) -> None:
    recipe = RECIPES[name]
    model = grammar.build(recipe)
    changed, _ = fused(model)
    sizes = sizes_of(recipe, sequence=13)  # no other axis has this size
    inner = [name for node in changed.graph.node for name in node.output]
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    feeds = feeds_of(model, sizes)
    feeds["attention_mask"] = np.ones(feeds["attention_mask"].shape, np.int64)
    shapes = [array.shape for array in run(changed, feeds, built())]
    keys = 13 + sizes["past_sequence"]
    assert shapes and not [shape for shape in shapes if shape.count(13) + shape.count(keys) * (keys != 13) >= 2]


def rearranged(recipe: Recipe, layout: str, output: str) -> onnx.ModelProto:
    """The recipe's graph with q, k, v as [B, S, H * D] or [B, S, H, D], and the output likewise."""
    model = grammar.build(recipe)
    graph = model.graph
    constants = {"split": [0, 0, HEADS, HEAD_DIM], "merge": [0, 0, HEADS * HEAD_DIM]}
    graph.initializer.extend(helper.make_tensor(name, TensorProto.INT64, [len(v)], v) for name, v in constants.items())
    front = []
    for info in graph.input:
        if info.name in ("q", "k", "v") and layout != "BHSD":
            name, source = info.name, f"{info.name}_given"
            shape = (
                ["batch", "sequence", HEADS * HEAD_DIM] if layout == "BSH" else ["batch", "sequence", HEADS, HEAD_DIM]
            )
            info.CopyFrom(helper.make_tensor_value_info(source, TensorProto.FLOAT, shape))
            if layout == "BSH":
                front.append(helper.make_node("Reshape", [source, "split"], [f"{name}_split"], name=f"split_{name}"))
                source = f"{name}_split"
            front.append(helper.make_node("Transpose", [source], [name], name=f"order_{name}", perm=[0, 2, 1, 3]))
    nodes = [*front, *graph.node]
    if output != "BHSD":
        result = graph.output[0].name
        nodes.append(helper.make_node("Transpose", [result], ["ordered"], name="order", perm=[0, 2, 1, 3]))
        if output == "BSH":
            nodes.append(helper.make_node("Reshape", ["ordered", "merge"], ["merged"], name="merge_heads"))
        name = "merged" if output == "BSH" else "ordered"
        graph.output[0].CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    del graph.node[:]
    graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("output", ("BHSD", "BSHD", "BSH"))
@pytest.mark.parametrize("layout", ("BHSD", "BSHD", "BSH"))
@pytest.mark.parametrize("recipe", (LOCAL, PRODUCT), ids=("running sums", "one sum"))
def test_layouts(recipe: Recipe, layout: str, output: str) -> None:
    model = rearranged(recipe, layout, output)
    changed, _ = fused(model)
    for pattern in ("left", "holes"):
        assert difference(model, changed, sizes_of(recipe), pattern) <= TOLERANCE


def mean_of(recipe: Recipe, visible: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(keys as rows [B, T] without a visible key, what they give [B, H, T, D] in float64): the rule, key by key."""
    row, key = np.arange(values.shape[2])[:, None], np.arange(values.shape[2])
    inside = (key <= row) & (key > row - 3 if recipe.parts[0] == "band buffer" else True)
    others = (key <= row) & visible[:, None] if "causal padding" in recipe.parts else visible[:, None] & (row >= 0)
    own = inside & ((recipe.fill != -1e4) | ~visible.any(axis=-1)[:, None, None])
    weights = (others | own).astype(np.float64)[:, None]
    return ~(inside & visible[:, None]).any(axis=-1), weights @ values / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("pattern", ("left", "holes", "one sequence", "all"))
@pytest.mark.parametrize("recipe", (LOCAL, PRODUCT, WEAK), ids=("window", "product", "weak, then product"))
def test_float16_as_if_it_swallowed_every_score(recipe: Recipe, pattern: str) -> None:
    """The fills are -65504. What a runtime makes of such rows differs; this is what float16 itself would."""
    model = grammar.in_half(dataclasses.replace(recipe, structure="heads"))
    changed, sites = fused(model)
    assert any("added to their fill in float16" in fact.text and fact.assumed for fact in sites[0].facts)
    feeds = feeds_of(model, sizes_of(recipe))
    visible = paddings(feeds["attention_mask"].shape)[pattern]
    feeds = {name: array.astype(np.float16) for name, array in feeds.items()}
    feeds["attention_mask"] = visible.astype(np.int64)
    before, after = (run(m, feeds, built())[0].astype(np.float64) for m in (model, changed))
    empty, want = mean_of(recipe, visible, feeds["v"].astype(np.float64))
    expected = np.where(empty[:, None, :, None], want, before)
    assert empty.any() and np.abs(after - expected).max() <= 3e-3 * np.abs(expected).max()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(RECIPES)))
def test_any_padding(data: st.DataObject, name: str) -> None:
    recipe = RECIPES[name]
    model = grammar.build(recipe)
    changed, _ = fused(model)
    sizes = sizes_of(recipe, data.draw(st.integers(1, 14)), data.draw(st.integers(0, 9)))
    feeds = feeds_of(model, sizes, data.draw(st.integers(0, 99)))
    bits = st.lists(st.integers(0, 1), min_size=sizes["total"], max_size=sizes["total"])
    feeds["attention_mask"] = np.asarray([data.draw(bits) for _ in range(sizes["batch"])], np.int64)
    assert worst(run(model, feeds), run(changed, feeds, built())) <= TOLERANCE


@pytest.mark.parametrize("past", (0, 777))
@pytest.mark.parametrize("recipe", (LOCAL, PRODUCT), ids=("running sums", "one sum"))
def test_long_sums_stay_exact(recipe: Recipe, past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 values of mean 1 against float64: far from the 1e-4 that a comparison of models allows."""
    monkeypatch.setattr(grammar, "MAX_LENGTH", 2048)
    recipe = dataclasses.replace(recipe, cache=past > 0)
    model = grammar.build(recipe)
    changed, _ = fused(model)
    feeds = feeds_of(model, {"batch": 1, "sequence": 2048 - past, "past_sequence": past, "total": 2048})
    place = np.arange(2048)[None]
    visible = place < 900 if "causal padding" in recipe.parts else place >= 1900
    feeds["attention_mask"] = visible.astype(np.int64)
    for name in {"v", "past_v"} & set(feeds):
        feeds[name] += 1
    values = np.concatenate([feeds[name] for name in ("past_v", "v") if name in feeds], axis=2).astype(np.float64)
    empty, want = (x[..., past:] if x.ndim == 2 else x[:, :, past:] for x in mean_of(recipe, visible, values))
    got = run(changed, feeds, built())[0]
    assert empty.sum() > 1000 and np.abs(got - want)[:, :, empty[0]].max() <= 2e-6 * np.abs(want).max()


def test_layers_share_what_is_the_same() -> None:
    made = []
    for layers in (1, 3):
        changed, _ = fused(grammar.build(dataclasses.replace(LOCAL, layers=layers, cache=True)))
        names = [node.name for node in changed.graph.node]
        made.append(([n for n in names if n.startswith("faexport_mask")], [n for n in names if "FlashAttention" in n]))
    (shared, own), (shared_by_three, own_of_three) = made
    assert len(shared_by_three) == len(shared) and len(own_of_three) == 3 * len(own) <= 3 * 25


def test_the_operator_itself_sees_a_key_in_every_row() -> None:
    """So its word for rows without keys doesn't matter, and one function may stand in for it and others."""
    assert pipeline.examine(ir.from_proto(grammar.build(LOCAL)))[0].outcome.mask.rows_see_a_key
    assert not pipeline.examine(ir.from_proto(grammar.build(WEAK)))[0].outcome.mask.rows_see_a_key


GPT2 = """<ir_version: 7, opset_import: ["" : OPSET]>
block (float[B, 2, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v, int64[B, S] attention_mask) => (float y) {
    kt = Transpose<perm = [0, 1, 3, 2]>(k)
    scores = MatMul(q, kt)
    AHEAD
    low = Constant<value = float {-3.4028234663852886e38}>()
    causal = Where(ahead, low, scores)
    spread = Constant<value = int64[4] {0, 1, 1, -1}>()
    mask = Reshape(attention_mask, spread)
    kept = Cast<to = 1>(mask)
    unit = Constant<value = float {1.0}>()
    gone = Sub(unit, kept)
    added = Mul(gone, low)
    masked = Add(causal, added)
    weights = Softmax<axis = -1>(masked)
    y = MatMul(weights, v)
}"""


@pytest.mark.parametrize("opset", (11, 12, 13, 15, 17))
def test_older_opsets(opset: int) -> None:
    """Before opset 12, Min and Max take no integers: there the bias stays."""
    if not ort_session.has_library():
        pytest.skip("below opset 13 the operator has no stand-in")
    model = onnx.parser.parse_model(GPT2.replace("OPSET", str(opset)).replace("AHEAD", site_graphs.AHEAD))
    changed, sites = fused(model)
    assert ("causal" in {fact.text for fact in sites[0].facts}) == (opset >= 12)
    for pattern in paddings((1, 1)):
        assert difference(model, changed, {"B": 3, "S": 9}, pattern) <= TOLERANCE, pattern


def test_a_second_run_changes_nothing() -> None:
    changed, _ = fused(grammar.build(LOCAL))
    again, report = pipeline.run(ir.from_proto(changed), pipeline.Options())
    assert not report.sites and ir.to_proto(again).SerializeToString() == changed.SerializeToString()


def test_a_core_in_half_precision_keeps_its_sums_in_float32() -> None:
    model = grammar.build(LOCAL)
    changed, _ = fused(model, dtype=ir.DataType.FLOAT16)
    readers = {node.op_type for node in changed.graph.node if "v" in node.input}
    assert readers == {"Cast", "Gather"}  # the operator reads it cast, the sums as it is
    assert difference(model, changed, sizes_of(LOCAL), "holes") <= 2e-3


def test_fills_of_different_depth_need_no_sums() -> None:
    """GPT-Neo in float16: its scores are float32, its padding adds float16's minimum. Each row has a key in its window,
    beside which the window's own fill weighs nothing."""
    recipe = dataclasses.replace(LOCAL, first_fill=MINIMUM, fill=-65504.0)
    model = grammar.build(recipe)
    mask = pipeline.examine(ir.from_proto(model))[0].outcome.mask
    assert (mask.window_left, mask.window_right) == (2, 0) and mask.empty_rows is None
    assert "bias [B, 1, 1, S_kv]" in {fact.text for fact in mask.facts}
    changed, _ = fused(model)
    for pattern in paddings((1, 1)):
        assert difference(model, changed, sizes_of(recipe), pattern) <= 1e-5, pattern


@pytest.mark.parametrize(
    "recipe",
    [
        dataclasses.replace(LOCAL, fill=-1e9, first_fill=-1e4),  # neither number swallows scores or is far below
        dataclasses.replace(LOCAL, sinks=True),
        Recipe(("j <= i - 1", "unsqueeze"), apart=True),  # row 0 has no key in its window
        dataclasses.replace(LOCAL, bias="alibi j"),
    ],
    ids=("weak", "sinks", "empty window", "slopes"),
)
def test_what_is_not_two_masks(recipe: Recipe) -> None:
    found = pipeline.examine(ir.from_proto(grammar.build(recipe)))[0].outcome
    assert isinstance(found, Refusal) or found.mask.empty_rows is None


def test_a_wrong_proof_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs the new nodes, too: other keys than those of the model do not pass."""
    original = empty_rows.two_masks

    def other_keys(site, cases):
        found = original(site, cases)
        return found and dataclasses.replace(found, up_to_window=not found.up_to_window)

    monkeypatch.setattr("faexport.understand.mask.strategies.two_masks", other_keys)
    found = pipeline.examine(ir.from_proto(grammar.build(LOCAL)))[0].outcome
    assert isinstance(found, Refusal) and "please report" in found.reason
