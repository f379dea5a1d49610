# SPDX-License-Identifier: Apache-2.0
"""Random graphs of the grammar, rewritten and compared in onnxruntime. 500 of them; RANDOM_GRAPHS=10000 (make nightly)
for more.

Not one may come out wrong; which are refused doesn't matter here, but many must be fused.
"""

from __future__ import annotations

import collections
import math
import os

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from faexport import pipeline
from faexport.verify import widen
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.export import mask_feeds
from tests.export import mask_grammar as grammar
from tests.export.compared import built, run, session

COUNT = int(os.environ.get("RANDOM_GRAPHS", "500"))
PART = 250  # graphs a test
TOLERANCE = {"float32": 2e-4, "float16": 4e-3}  # of the largest magnitude of an output
WEAK_TOLERANCE = 3e-7  # times a fill from -1e4 on that is added to scores: float32 then keeps little of them
outcomes: collections.Counter[str] = collections.Counter()


@st.composite
def recipes(draw: st.DrawFn) -> grammar.Recipe:
    pools = [grammar.CAUSAL, grammar.WINDOWS, grammar.PADDING, grammar.OTHERS, grammar.SQUARES, grammar.GIVEN]
    parts = draw(st.lists(st.sampled_from(pools).flatmap(st.sampled_from), min_size=0, max_size=3, unique=True))
    return grammar.Recipe(
        parts=tuple(parts),
        window=draw(st.integers(0, 5)),
        fill=draw(st.sampled_from(grammar.FILLS)),
        form=draw(st.sampled_from(grammar.FORMS)),
        first_form=draw(st.sampled_from(("", "", *grammar.FORMS))),
        first_fill=draw(st.sampled_from(grammar.FIRST_FILLS)),
        apart=draw(st.booleans()),
        negate_first=draw(st.sampled_from((False, False, False, True))),
        bias=draw(st.sampled_from(grammar.BIASES)),
        bias_first=draw(st.booleans()),
        scale_after_mask=draw(st.sampled_from((False, False, True))),
        cache=draw(st.booleans()),
        flat_cache=draw(st.sampled_from((False, False, True))),
        own_sizes=draw(st.sampled_from((False, False, True))),
        guard=draw(st.booleans()),
        row_guard=draw(st.sampled_from(grammar.ROW_GUARDS)),
        near_miss=draw(st.sampled_from(grammar.NEAR_MISSES)),
        structure=draw(st.sampled_from(grammar.STRUCTURES)),
        kv_heads=draw(st.sampled_from((grammar.HEADS, grammar.HEADS, 1))),
        softcap=draw(st.sampled_from((False, False, False, True))),
        sinks=draw(st.sampled_from((False, False, False, True))),
        softmax=draw(st.sampled_from(grammar.SOFTMAXES)),
        dtype=draw(st.sampled_from(("float32", "float32", "float32", "float16"))),
        wide_softmax=draw(st.booleans()),
        layers=draw(st.sampled_from((1, 1, 1, 2))),
        one_row=draw(st.sampled_from((False, False, False, False, True))),
        fixed=draw(st.sampled_from((None, None, None, (5, 0), (5, 3), (1, 4)))),
    )


def worst(want: list[np.ndarray], got: list[np.ndarray]) -> float:
    """The largest difference, of what isn't NaN in the original, in units of the largest magnitude."""
    result = 0.0
    for a, b in zip(want, got, strict=True):
        known = np.isfinite(a)
        if known.any():
            a, b = a.astype(np.float64), b.astype(np.float64)
            difference = float(np.abs(a - b)[known].max() / max(1e-3, np.abs(a[known]).max()))
            result = max(result, math.inf if math.isnan(difference) else difference)
    return result


def rewritten(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """(the rewritten model, its number of fused nodes)."""
    changed, _ = pipeline.run(ir.from_proto(model), pipeline.Options())
    fused = sum(node.domain == "faexport" for node in changed.graph.all_nodes())
    return ir.to_proto(changed), fused


def misfit(recipe: grammar.Recipe, want: list[np.ndarray], got: list[np.ndarray], exact: list[np.ndarray]) -> str:
    """What is wrong, or "". `exact` is what the same graph gives in float32: in float16 an error of twice the
    original's is allowed."""
    weak = [-fill for fill in (recipe.fill, recipe.first_fill or 0) if -1e5 < fill <= -1e4]
    allowed = max(TOLERANCE[recipe.dtype], WEAK_TOLERANCE * max(weak, default=0))
    difference = worst(want, got)
    if not difference <= allowed and recipe.dtype == "float16":
        difference, allowed = worst(exact, got), max(allowed, 2 * worst(exact, want))
    return "" if difference <= allowed else f"differs by {difference:.3g}, allowed is {allowed:.3g}"


def check_random_graph(recipe: grammar.Recipe, number: int) -> None:
    model = grammar.build(recipe)
    try:
        original = session(model)
    except onnxruntime_errors():
        outcomes["no model"] += 1  # its fixed sizes contradict each other
        return
    changed, fused = rewritten(model)
    outcomes["fused" if fused else "refused"] += 1
    if not fused:
        return
    fused_one, wide_one = session(changed, built()), None
    # Where a maximum is hidden, exponentials far below it leave nothing of the others.
    large = recipe.dtype == "float32" and number % 4 == 0 and not recipe.softmax.startswith("hidden")
    for k in range(3):
        feeds = mask_feeds.feeds(model, number + k, large and k == 0, odd=True)
        shapes = {n: a.shape for n, a in feeds.items()}
        try:
            want = original.run(None, feeds)
        except onnxruntime_errors():
            continue  # no input for this graph
        got, exact = fused_one.run(None, feeds), want
        if recipe.dtype == "float16":
            wide_one = wide_one or session(ir.to_proto(widen.in_float32(ir.from_proto(model))))
            exact = wide_one.run(None, widen.inputs_in_float32(feeds))
        wrong = misfit(recipe, want, got, exact)
        assert not wrong, f"{wrong} at {shapes}"


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises where sizes don't fit each other."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    return state.Fail, state.InvalidArgument, state.RuntimeException


# What random graphs found to come out wrong, once.
FOUND = {
    "attention that feeds attention": grammar.Recipe((), layers=2),
    "a bias of the row beside a sink": grammar.Recipe(("j <= i",), bias="row", sinks=True),
    "a bias of the query beside a sink": grammar.Recipe((), bias="query", sinks=True, bias_first=False),
    "a causal mask of constants": grammar.Recipe(("j <= i",), fixed=(5, 0)),
    "integers cast to fewer bits": grammar.Recipe(("i < j + w", "int32"), window=2, negate_first=True),
    "exponentials hidden behind a mask that hides": grammar.Recipe(
        ("j <= i", "unsqueeze"),
        0,
        -math.inf,
        "where add",
        first_fill=grammar.MINIMUM,
        apart=True,
        guard=True,
        softmax="hidden",
    ),
    "a clamp behind a bias that overflows": grammar.Recipe(
        ("j <= i", "i >= j"), 0, -math.inf, first_form="max clamp", apart=True, bias="lower of two"
    ),
    "slopes beside a sink": grammar.Recipe(("trilu", "always"), bias="alibi j", sinks=True, row_guard="whole"),
}


# Exponentials that a mask hides, of scores that something else may have pushed so low that all that stay are 0.
HIDDEN = {
    "a float mask": grammar.Recipe(("j <= i",), bias="padding", guard=True, softmax="hidden"),
    "a clamp": grammar.Recipe(
        ("j <= i", "unsqueeze"), 0, -math.inf, first_form="max clamp", apart=True, negate_first=True, guard=True,
        softmax="hidden",
    ),
    "a mask with empty rows": grammar.Recipe(
        ("j <= i", "i >= j"), 0, -math.inf, "where add", first_fill=grammar.MINIMUM, apart=True, negate_first=True,
        guard=True, softmax="hidden",
    ),
    "the lower of two": grammar.Recipe(
        ("j > i - w",), 0, -math.inf, "where add", bias="lower of two", guard=True, softmax="hidden"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_exponentials_hidden_beside(name: str) -> None:
    _, report = pipeline.run(ir.from_proto(grammar.build(HIDDEN[name])), pipeline.Options())
    assert "exponentials that stay may be 0" in str(report.sites[0].refusal)


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name: str) -> None:
    recipe = FOUND[name]
    model = grammar.build(recipe)
    changed, fused = rewritten(model)
    assert fused == recipe.layers
    original, fused_one = session(model), session(changed, built())
    for number in range(8):
        feeds = mask_feeds.feeds(model, number)
        want = original.run(None, feeds)
        assert not misfit(recipe, want, fused_one.run(None, feeds), want)


def test_a_bias_and_then_a_fill_that_does_not_absorb_it() -> None:
    """In a row that sees no key the fill leaves steps of 64 of score and bias together. The operator adds bias and fill
    first, so that scores near the middle of two steps came out one step away."""
    recipe = grammar.Recipe(("one length",), fill=-1e9, bias="alibi j")
    model = grammar.build(recipe)
    _, report = pipeline.run(ir.from_proto(model), pipeline.Options())
    assert "depends on the order of its additions" in str(report.sites[0].refusal)
    check_random_graph(recipe, 0)
    changed, report = pipeline.run(ir.from_proto(model), pipeline.Options(assume_full_rows=True))
    assert report.num_fused == 1
    feeds = mask_feeds.feeds(model, 0, large=True) | {"length": np.asarray([3])}
    want, got = run(model, feeds), run(ir.to_proto(changed), feeds, built())
    assert not misfit(recipe, want, got, want)


@pytest.mark.parametrize("part", range(math.ceil(COUNT / PART)))
def test_random_graphs(part: int) -> None:
    """Parts, so that several processes share the work and the number of those done is seen."""
    outcomes.clear()
    check = given(recipe=recipes(), number=st.integers(0, 1 << 30))(check_random_graph)
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    check = settings(max_examples=PART, deadline=None, database=None, suppress_health_check=health)(check)
    seed(20261122 + part)(check)()
    assert outcomes.total() >= PART
    assert outcomes["fused"] >= 0.4 * outcomes.total(), outcomes
