# SPDX-License-Identifier: Apache-2.0
"""understand_mask on the idioms of exporters, each beside a near miss: what is proven, and what must not be."""

from __future__ import annotations

import dataclasses

import faexport
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from faexport import pipeline
from faexport.spec import Alignment, AttentionSpec, EmptyRow, Mask, Refusal
from faexport.understand.index import logic as il
from faexport.understand.index.tensor import Unknown
from faexport.understand.mask import proof
from faexport.understand.shapes.constants import tensor_of

from tests.export import mask_grammar as grammar
from tests.export.compared import run
from tests.export.mask_grammar import MINIMUM, Recipe

INFINITY = float(-np.inf)


def outcome(model: onnx.ModelProto, **options: object) -> AttentionSpec | Refusal:
    candidates = pipeline.examine(ir.from_proto(model), pipeline.Options(**options))
    assert len(candidates) == 1
    return candidates[0].outcome


def proven(recipe: Recipe, **options: object) -> Mask:
    found = outcome(grammar.build(recipe), **options)
    assert isinstance(found, AttentionSpec), found
    return found.mask


def window(mask: Mask) -> tuple[int, int]:
    return mask.window_left, mask.window_right


def is_only_a_window(mask: Mask) -> bool:
    return mask.attn_mask is None and mask.attn_bias is None and mask.kv_lengths is None


@pytest.mark.parametrize("spelling", grammar.CAUSAL[:-3])
@pytest.mark.parametrize("cache", (False, True))
@pytest.mark.parametrize("fill", (INFINITY, MINIMUM, -1e4))
def test_causal_in_every_spelling(spelling: str, cache: bool, fill: float) -> None:
    mask = proven(Recipe((spelling,), fill=fill, cache=cache))
    assert window(mask) == (-1, 0) and is_only_a_window(mask)
    assert mask.alignment is (Alignment.BOTTOM_RIGHT if cache else Alignment.TOP_LEFT)
    assert mask.rows_see_a_key and mask.empty_row is EmptyRow.ZERO
    assert any("causal" in fact.text and fact.nodes for fact in mask.facts)


def test_a_diagonal_off_by_one_is_not_causal() -> None:
    assert window(proven(Recipe(("j <= i + 1",)))) == (-1, 1)
    strict = proven(Recipe(("j <= i - 1",), fill=INFINITY))
    assert strict.window_right == 0 and strict.query_offset is not None
    assert not strict.rows_see_a_key


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("j <= i", "j > i - w"), (2, 0)),
        (("j <= i", "i - j < w"), (2, 0)),
        (("j <= i", "i < j + w"), (2, 0)),
        (("abs(i - j) <= w",), (3, 3)),
        (("j <= i + w",), (-1, 3)),
        (("j > i - w",), (2, -1)),
    ],
)
@pytest.mark.parametrize("cache", (False, True))
def test_sliding_windows(parts: tuple[str, ...], expected: tuple[int, int], cache: bool) -> None:
    mask = proven(Recipe(parts, window=3, cache=cache))
    assert window(mask) == expected and is_only_a_window(mask)


@pytest.mark.parametrize("part", ("j > i - w", "i - j < w", "i < j + w"))
@pytest.mark.parametrize("padding", ((), ("unsqueeze",)))
def test_the_window_of_one_row_is_no_mask_of_keys(part: str, padding: tuple[str, ...]) -> None:
    """A step of a decoder that was exported for one token."""
    mask = proven(Recipe(("j <= i", part, *padding), window=3, cache=True, one_row=True))
    assert mask.window_left == 2 and mask.alignment is Alignment.BOTTOM_RIGHT
    assert mask.attn_bias is None and (mask.attn_mask is not None) == bool(padding)
    several = proven(Recipe((part, *padding), window=3, cache=True))
    assert several.window_left == 2


@pytest.mark.parametrize("spelling", grammar.PADDING[:-1])
@pytest.mark.parametrize("fill", (INFINITY, MINIMUM))
def test_padding_stays_small(spelling: str, fill: float) -> None:
    mask = proven(Recipe((spelling, "always"), fill=fill))
    assert window(mask) == (-1, -1) and mask.attn_bias is None
    assert "padding mask [B, 1, 1, S_kv]" in {fact.text for fact in mask.facts}
    assert mask.empty_row is (EmptyRow.MEAN if fill == MINIMUM else EmptyRow.ZERO)


def test_padding_of_rows_is_no_padding_of_keys() -> None:
    mask = proven(Recipe(("rows",)))
    assert {fact.text for fact in mask.facts} >= {"bool mask [B, 1, S_q, 1]"}


def test_causal_and_padding_part() -> None:
    mask = proven(Recipe(("j <= i", "gather_nd"), cache=True))
    assert window(mask) == (-1, 0) and mask.alignment is Alignment.BOTTOM_RIGHT
    assert mask.attn_mask is not None and mask.attn_bias is None
    assert mask.empty_row is EmptyRow.MEAN


def test_right_padding_gives_lengths_only_where_assumed() -> None:
    recipe = Recipe(("j <= i", "unsqueeze"))
    assert proven(recipe).kv_lengths is None
    mask = proven(recipe, assume_right_padding=True)
    assert mask.kv_lengths is not None and mask.attn_mask is None
    assert mask.alignment is Alignment.TOP_LEFT  # the length may not move the diagonal


@pytest.mark.parametrize("cache", (False, True))
def test_with_full_rows_only_what_is_visible_counts(cache: bool) -> None:
    recipe = Recipe(("j <= i - 1", "unsqueeze"), apart=True, cache=cache)
    exact = proven(recipe)
    assert exact.attn_bias is not None and any("--assume full-rows" in fact.text for fact in exact.facts)
    mask = proven(recipe, assume_full_rows=True)
    assert mask.window_right == 0 and mask.attn_bias is None and mask.attn_mask is not None
    assumed = outcome(float_padding_beside(-1e4, "where scores"), assume_full_rows=True)
    assert window(assumed.mask) == (-1, 0) and "bias [B, 1, 1, S_kv]" in {fact.text for fact in assumed.mask.facts}


def test_full_rows_may_not_hide_a_wrong_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    from faexport.understand.mask import strategies as module

    monkeypatch.setattr(module, "visible", lambda cases: il.TRUE)
    found = outcome(grammar.build(Recipe(("j <= i", "unsqueeze"), apart=True)), assume_full_rows=True)
    assert isinstance(found, Refusal) and "please report" in found.reason


def test_lengths_from_an_input() -> None:
    mask = proven(Recipe(("lengths",)))
    assert mask.kv_lengths is not None and mask.attn_mask is None


@pytest.mark.parametrize("fill", (-1.0, -5.0))
def test_a_small_fill_is_no_mask(fill: float) -> None:
    added = proven(Recipe(("j <= i",), fill=fill))
    assert window(added) == (-1, -1) and added.attn_bias is not None
    replaced = outcome(grammar.build(Recipe(("j <= i",), fill=fill, form="where scores")))
    assert isinstance(replaced, Refusal) and "no mask" in replaced.reason


def test_a_weak_fill_masks_only_where_rows_see_a_key() -> None:
    assert window(proven(Recipe(("j <= i",), fill=-1e4))) == (-1, 0)
    padded = proven(Recipe(("j <= i", "unsqueeze"), fill=-1e4))
    assert window(padded) == (-1, -1) and padded.attn_mask is None and padded.attn_bias is not None


def test_two_finite_masks_leave_what_both_leave() -> None:
    """j > i is masked twice, and minimum + minimum is -inf: hard. Padding alone is soft: a bias beside the window."""
    recipe = Recipe(("j <= i", "unsqueeze"), apart=True)
    mask = proven(recipe)
    assert mask.attn_mask is None and mask.attn_bias is not None and mask.empty_row is EmptyRow.ZERO


@pytest.mark.parametrize("kind", ("alibi j", "alibi distance"))
@pytest.mark.parametrize("cache", (False, True))
@pytest.mark.parametrize("bias_first", (False, True))
def test_alibi(kind: str, cache: bool, bias_first: bool) -> None:
    mask = proven(Recipe(("j <= i",), bias=kind, cache=cache, bias_first=bias_first))
    np.testing.assert_allclose(tensor_of(mask.alibi_slopes).numpy(), [0.5, 0.125])
    assert mask.attn_bias is None and window(mask) == (-1, 0)


def test_alibi_before_the_scale_is_scaled() -> None:
    mask = proven(Recipe(("j <= i",), bias="alibi j", scale_after_mask=True))
    np.testing.assert_allclose(tensor_of(mask.alibi_slopes).numpy(), [0.175, 0.04375], rtol=1e-6)


def test_a_bias_that_grows_with_the_key_is_no_alibi_without_a_causal_window() -> None:
    mask = proven(Recipe((), bias="alibi j"))
    assert mask.alibi_slopes is None and mask.attn_bias is not None
    assert proven(Recipe((), bias="alibi distance")).alibi_slopes is not None


@pytest.mark.parametrize("right_padding", (False, True))
def test_alibi_with_positions_counted_from_a_mask(right_padding: bool) -> None:
    """BLOOM adds slope * (cumsum(mask) - 1) * mask: ALiBi only for a mask without holes, so that has to be assumed."""
    mask = proven(Recipe(("j <= i", "unsqueeze"), bias="alibi counted"), assume_right_padding=right_padding)
    assert window(mask) == (-1, 0)
    assert (mask.alibi_slopes is not None) == right_padding == (mask.attn_bias is None)
    if not right_padding:
        assert any("[B, H, 1, S_kv]: ALiBi" in fact.text for fact in mask.facts)


def test_a_relative_bias_stays_a_bias_without_the_batch() -> None:
    mask = proven(Recipe(("j <= i", "unsqueeze"), bias="table"))
    assert window(mask) == (-1, 0) and mask.attn_bias is not None and mask.attn_mask is not None
    assert "bias [1, H, S_q, S_kv]" in {fact.text for fact in mask.facts}


@pytest.mark.parametrize("kind", ("row", "query"))
def test_a_bias_of_a_whole_row_is_none(kind: str) -> None:
    assert proven(Recipe((), bias=kind)).attn_bias is None


def test_a_float_mask_beside_a_finite_mask_stays_a_bias() -> None:
    """The user's mask may hold the minimum too; then rows would be shared between both."""
    mask = proven(Recipe(("j <= i",), bias="input"))
    assert window(mask) == (-1, -1) and mask.attn_bias is not None
    assert window(proven(Recipe(("j <= i",), bias="input", fill=INFINITY))) == (-1, 0)


@pytest.mark.parametrize("kind", ("row", "query", "alibi j"))
def test_a_sink_makes_softmax_see_what_is_the_same_for_a_row(kind: str) -> None:
    """Found by random graphs."""
    mask = proven(Recipe(("j <= i",), bias=kind, sinks=True))
    assert window(mask) == (-1, 0) and mask.attn_bias is not None and mask.alibi_slopes is None


@pytest.mark.parametrize("fill", (INFINITY, MINIMUM, -1e4))
def test_with_a_sink_no_row_is_empty(fill: float) -> None:
    mask = proven(Recipe(("j <= i", "unsqueeze"), fill=fill, apart=True, sinks=True))
    assert window(mask) == (-1, 0) and mask.attn_mask is not None and mask.attn_bias is None


@pytest.mark.parametrize("near_miss", ("other axis", "second consumer", "post scale"))
def test_near_misses_of_attention_are_refused(near_miss: str) -> None:
    assert isinstance(outcome(grammar.build(Recipe(("j <= i",), near_miss=near_miss))), Refusal)


def test_chunks_and_prefixes_stay_a_bool_mask() -> None:
    for part in ("chunk", "prefix", "segments", "input mask"):
        mask = proven(Recipe((part,)))
        assert window(mask) == (-1, -1) and mask.attn_mask is not None, part


def test_sites_of_one_graph_share_nodes() -> None:
    model = ir.from_proto(grammar.build(Recipe(("j <= i", "unsqueeze"), layers=2)))
    first, second = (candidate.outcome.mask for candidate in pipeline.examine(model))
    assert first.attn_mask is second.attn_mask and tuple(first.new_nodes) == tuple(second.new_nodes)


def test_a_model_that_was_edited_is_proven_anew() -> None:
    """No proof of the model as it was is used for the model as it is."""
    model = ir.from_proto(grammar.build(Recipe(("j <= i",))))
    assert window(pipeline.examine(model)[0].outcome.mask) == (-1, 0)
    (comparison,) = (node for node in model.graph if node.op_type == "LessOrEqual")
    comparison.replace_input_with(0, comparison.inputs[1])
    edited = pipeline.examine(model)[0].outcome.mask
    assert window(edited) == (-1, -1) and is_only_a_window(edited)


def test_a_wrong_proof_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs the model's own nodes: a proof that is off by one does not pass."""
    from faexport.understand.mask import draft as module

    def off_by_one(site, cond):
        found, rest = module_split(site, cond)
        return dataclasses.replace(found, right=found.right + 1), rest

    module_split = module.split
    monkeypatch.setattr(module, "split", off_by_one)
    found = outcome(grammar.build(Recipe(("j <= i",))))
    assert isinstance(found, Refusal) and "please report" in found.reason


def float_padding_beside(fill: float, form: str) -> onnx.ModelProto:
    return grammar.build(Recipe(("j <= i",), fill=fill, form=form, bias="padding", bias_first=False))


def test_padding_as_a_product_beside_a_causal_mask() -> None:
    """(1 - mask) * minimum: two masks if the mask's integers are 0 and 1; with padding at the end any integers do."""
    for fill in (MINIMUM, -1e4):
        model = float_padding_beside(fill, "where scores")
        found = outcome(model)
        assert isinstance(found, AttentionSpec) and window(found.mask) == (-1, 0) and found.mask.empty_rows is not None
        assert "attention_mask holds zeros and ones" in {fact.text for fact in found.mask.facts if fact.assumed}
        assumed = outcome(model, assume_right_padding=True)
        assert isinstance(assumed, AttentionSpec) and window(assumed.mask) == (-1, 0)
        assert "bias [B, 1, 1, S_kv]" in {fact.text for fact in assumed.mask.facts}


def test_a_float_mask_of_the_users_stays_as_it_is() -> None:
    given = Recipe(("j <= i",), form="where scores", bias="input", bias_first=False)
    exact = proven(given)
    assert window(exact) == (-1, -1) and exact.attn_bias is not None
    assert any("undoes the one in their place" in fact.text for fact in exact.facts if fact.assumed)
    weak = outcome(grammar.build(dataclasses.replace(given, fill=-1e4)))
    assert isinstance(weak, Refusal) and "float mask" in weak.reason


@pytest.mark.parametrize("cache", (False, True))
def test_a_band_ahead_of_the_diagonal_moves_the_position(cache: bool) -> None:
    mask = proven(Recipe(("j <= i + 1", "j <= i"), negate_first=False, cache=cache))
    assert window(mask) == (-1, 0)
    band = proven(
        Recipe(("j <= i", "j <= i + w"), window=2, negate_first=True, fill=INFINITY, cache=cache)
    )  # i < j <= i + 2
    assert window(band) == (0, 1) and band.query_offset is not None


def test_a_replacement_after_a_float_mask_is_one_bias_if_it_absorbs_any_score() -> None:
    mask = outcome(grammar.build(Recipe(("prefix",), form="where scores", bias="padding"))).mask
    assert mask.attn_bias is not None and mask.attn_mask is None
    found = outcome(grammar.build(Recipe(("prefix",), form="where scores", bias="padding", fill=-1e4)))
    assert isinstance(found, Refusal) and "what was added to others may be lower" in found.reason


@pytest.mark.parametrize("fill", (MINIMUM, INFINITY, -1e4))
@pytest.mark.parametrize("parts", (("unsqueeze",), ("gather_nd",), ("input mask",), ("j <= i", "unsqueeze")))
def test_a_guard_for_empty_rows_is_absorbed(parts: tuple[str, ...], fill: float) -> None:
    """0 where the mask of the scores lets no key through: what the operator does by itself."""
    recipe = Recipe(parts, fill=fill, form="where scores", row_guard="whole")
    found = outcome(grammar.build(recipe))
    assert found.output.producer().op_type == "Where" and found.mask.empty_row is EmptyRow.ZERO
    assert found.mask.attn_mask is not None and found.mask.attn_bias is None


@pytest.mark.parametrize(("bound", "absorbed"), (("-2", True), ("-0.5", False)))
@pytest.mark.parametrize("part", ("j <= i", "unsqueeze"))
def test_a_guard_may_test_a_bias_made_of_weights(part: str, bound: str, absorbed: bool) -> None:
    """T5: the float mask holds the bias where a key is visible, and the weights are seen to be larger than the fill."""
    found = outcome(grammar.build(Recipe((part,), bias="table", row_guard=f"table > {bound}")))
    assert found.output.producer().op_type == ("Where" if absorbed else "MatMul")


@pytest.mark.parametrize("parts", (("j <= i",), ("always",), ("j <= i", "unsqueeze")))
def test_a_guard_that_is_never_taken_is_absorbed(parts: tuple[str, ...]) -> None:
    found = outcome(grammar.build(Recipe(parts, row_guard="first")))
    assert found.output.producer().op_type == "Where"
    assert found.mask.empty_row is (EmptyRow.MEAN if "unsqueeze" in parts else EmptyRow.ZERO)


@pytest.mark.parametrize(
    "recipe",
    (
        Recipe(("unsqueeze", "j <= i"), row_guard="first"),  # a row with only later keys: the mean of all values
        Recipe(("j <= i - 1", "unsqueeze"), row_guard="first"),
        Recipe(("j <= i",), row_guard="off by one"),
        Recipe(("unsqueeze",), row_guard="off by one"),
        Recipe(("unsqueeze",), bias="input", row_guard="whole"),  # a bias may itself be a mask
    ),
)
def test_another_guard_stays(recipe: Recipe) -> None:
    found = outcome(grammar.build(recipe))
    assert isinstance(found, AttentionSpec) and found.output.producer().op_type == "MatMul"
    without = outcome(grammar.build(dataclasses.replace(recipe, row_guard="none")))
    assert found.mask.empty_row is without.mask.empty_row


WITH_BIAS = """<ir_version: 8, opset_import: ["" : 17]>
block (float[B, T, 8] q, float[B, S, 8] k, float[B, S, 8] v, float[B, T, S] bias, bool[B, 1, S] m) => (float y) {
    kt = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, kt) BODY p = Softmax<axis = -1>(x) y = MatMul(p, v)
}"""


def test_a_bias_that_can_t_be_written_otherwise_stays_what_it_is(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """On whatever axes it meets the scores. Of several terms the reason is no shape that isn't known."""

    def unknown(*args: object) -> None:
        raise Unknown

    monkeypatch.setattr(proof, "mask_of", unknown)
    model = onnx.parser.parse_model(WITH_BIAS.replace("BODY", "x = Add(s, bias)"))
    fused, report = faexport.fuse(model)
    assert report.num_fused == 1 and "broadcast as it is" in report.sites[0].facts[0].text
    shapes = {"q": (3, 4, 8), "k": (3, 5, 8), "v": (3, 5, 8), "bias": (3, 4, 5)}
    random = np.random.default_rng(0)
    inputs = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    inputs["m"] = np.ones((3, 1, 5), bool)
    np.testing.assert_allclose(run(fused, inputs, library)[0], run(model, inputs)[0], atol=2e-6)
    both = "low = Constant<value = float {-1.0e30}>() a = Add(s, bias) x = Where(m, a, low)"
    _, report = faexport.fuse(onnx.parser.parse_model(WITH_BIAS.replace("BODY", both)))
    assert [site.refusal.reason for site in report.sites] == [proof.NOT_UNDERSTOOD]
