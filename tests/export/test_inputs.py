# SPDX-License-Identifier: Apache-2.0
"""What a model is verified on: values that belong together fit one another, and settings doubt what was proven."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from faexport.feeds import inputs, settings
from faexport.feeds.inputs import Drawing, MaskPattern, Role

HEADER = '<ir_version: 11, opset_import: ["": 24, "com.microsoft": 1]>'


def specs_of(given: str, body: str, weights: str = "") -> list[inputs.InputSpec]:
    text = f"{HEADER} g ({given}) => (float[X] y) {f'<{weights}>' if weights else ''} {{ {body} }}"
    return inputs.input_specs(ir.from_proto(onnx.parser.parse_model(text)))


def drawn(specs: list[inputs.InputSpec], drawing: Drawing | None = None, seed: int = 0, **sizes: int) -> dict:
    drawing = drawing or Drawing()
    bound = inputs.bind(specs, inputs.Sizes(3, 4, 7), sizes)
    return inputs.draw(specs, bound, drawing, np.random.default_rng(seed))


def test_lengths_of_grouped_query_attention_are_those_of_past_and_new_keys() -> None:
    specs = specs_of(
        "float[B,S,32] q, float[B,S,16] k, float[B,S,16] v, float[B,2,P,8] past_key, float[B,2,P,8] past_value, "
        "int32[B] seqlens, int32 total",
        "y, pk, pv = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> "
        "(q, k, v, past_key, past_value, seqlens, total)",
    )
    values = drawn(specs, S=4, P=7)
    assert (values["seqlens"] == 4 + 7 - 1).all() and values["total"] == 4 + 7
    assert values["seqlens"].dtype == np.int32 and values["total"].shape == ()
    padded = drawn(specs, Drawing(MaskPattern.RIGHT_PADDED), S=4, P=0)["seqlens"]
    assert padded[0] == 3 and (0 <= padded).all() and (padded < 4).all()


def test_sizes_of_one_name_are_equal_whatever_the_name_is() -> None:
    """Paddle's exporter numbers unknown sizes so; other exporters call each of them "?"."""
    model = onnx.parser.parse_model(f"{HEADER} g (float[B,S,8] x, float[B,T,8] z) => (float[X] y) {{ y = Add (x, z) }}")
    names = [["Dynamic.0", "Dynamic.1"], ["Dynamic.0", "?"]]
    for value, own in zip(model.graph.input, names, strict=True):
        for dim, name in zip(value.type.tensor_type.shape.dim, own, strict=False):
            dim.dim_param = name
    x, z = (spec.dims for spec in inputs.input_specs(ir.from_proto(model)))
    assert str(x[0]) == str(z[0]) == "Dynamic_0"
    assert len({str(dim) for dim in (*x[:2], z[1])}) == 3


def test_what_is_written_into_a_cache_stays_inside_of_it() -> None:
    specs = specs_of(
        "float[B,T,24] q, float[B,T,24] kn, float[B,16,24] kc, int64[B] where, int64[B] valid",
        "k = TensorScatter <axis = 1> (kc, kn, where)\n"
        "y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, k, , , , valid)",
    )
    assert {spec.name: spec.role for spec in specs}["where"] is Role.WRITE_INDEX
    seen = set()
    for seed in range(20):
        values = drawn(specs, seed=seed, T=4)
        assert (values["where"] >= 0).all() and (values["where"] + 4 <= 16).all()
        assert (values["valid"] == values["where"] + 4).all()
        seen |= set(values["where"].tolist())
    assert len(seen) > 5, "they differ"
    assert (drawn(specs, T=16)["where"] == 0).all()


def test_positions_follow_the_mask() -> None:
    specs = specs_of(
        "int64[B,S] input_ids, int64[B,M] attention_mask, int64[B,S] position_ids, float[B,2,P,8] past_key",
        "y = Cast <to = 1> (input_ids)",
    )
    values = drawn(specs, Drawing(MaskPattern.LEFT_PADDED), S=4, P=7)
    mask = values["attention_mask"]
    assert mask.shape == (3, 11) and not mask.all()
    assert np.array_equal(values["position_ids"], np.maximum(np.cumsum(mask, 1) - 1, 0)[:, -4:])


def test_positions_without_a_mask_go_on_after_the_past() -> None:
    specs = specs_of(
        "float[B,S,8] x, int64[S] cache_position, float[B,2,P,8] past_key, int64 past_length", "y = Identity (x)"
    )
    values = drawn(specs, S=4, P=7)
    assert values["cache_position"].tolist() == [7, 8, 9, 10] and values["past_length"] == 7
    assert drawn(specs, B=0, S=4, P=7)["cache_position"].shape == (4,), "positions of no batch entry"


def test_positions_follow_a_past_whose_rows_stand_in_front_of_its_heads() -> None:
    specs = specs_of(
        "float[B,S,8] x, int64[S] cache_position, float[B,P,2,8] past_key, int64 past_length", "y = Identity (x)"
    )
    values = drawn(specs, B=3, S=4, P=7)
    assert values["cache_position"].tolist() == [7, 8, 9, 10] and values["past_length"] == 7
    assert inputs.bind(specs, inputs.Sizes(2, 3, 5), {"P": 6})["P"] == 6


def test_lengths_that_are_compared_reach_beyond_one() -> None:
    specs = specs_of(
        "float[B,S,8] x, int64[B] n",
        "sh = Shape <start = 1, end = 2> (x)\n s = Squeeze (sh)\n r = Range (zero, s, step)\n"
        "l = Unsqueeze (n, axes)\n keep = Less (r, l)\n y = Cast <to = 1> (keep)",
        "int64[1] axes = {1}, int64 zero = {0}, int64 step = {1}",
    )
    assert specs[1].role is Role.LENGTHS
    found = np.concatenate([drawn(specs, Drawing(MaskPattern.RIGHT_PADDED), seed, S=9)["n"] for seed in range(20)])
    assert found.min() >= 1 and 8 <= found.max() <= 10 and len(set(found.tolist())) > 5


def test_integers_that_are_only_asked_for_0_may_be_anything_and_sizes_may_not() -> None:
    specs = specs_of(
        "int64[B,S] flags, int64[B,S] ids, int64 n",
        "narrow = Cast <to = 6> (flags)\n b = Cast <to = 9> (narrow)\n e = Gather (table, ids)\n"
        "r = Range (zero, n, step)\n y = Cast <to = 1> (b)",
        "float[5,2] table = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, int64 zero = {0}, int64 step = {1}",
    )
    assert [spec.only_bool for spec in specs] == [True, False, False]
    values = drawn(specs, Drawing(wild=True), S=50)
    assert np.abs(values["flags"]).max() == 2**32 and values["ids"].max() < 5 and values["n"] < 50


def test_of_a_mask_any_integers_hide_what_its_pattern_hides() -> None:
    """So that in float16 no query loses all its keys, where the CPU adds -65504 in float32 (reference.py)."""
    specs = specs_of("int64[B,S] attention_mask", "y = Cast <to = 9> (attention_mask)")
    assert specs[0].role is Role.MASK and specs[0].only_bool
    mask = drawn(specs, Drawing(MaskPattern.SCATTERED, wild=True), S=50)["attention_mask"]
    assert (mask[:, ::2] != 0).all() and (mask == 0).any() and np.abs(mask).max() == 2**32
    assert (drawn(specs, Drawing(MaskPattern.RANDOM, wild=True), S=50)["attention_mask"][:, ::2] == 0).any()


def test_a_float_mask_that_is_taken_from_1_holds_0_and_1_and_once_other_numbers() -> None:
    specs = specs_of("float[B,S] am", "m = Sub (one, am)\n y = Mul (m, low)", "float one = {1}, float low = {-1e4}")
    assert specs[0].role is Role.WEIGHT
    assert set(np.unique(drawn(specs, Drawing(MaskPattern.RANDOM), S=50)["am"])) == {0, 1}
    assert len(np.unique(drawn(specs, Drawing(MaskPattern.RANDOM, wild=True), S=50)["am"])) > 50


def test_an_initializer_that_is_an_input_gets_other_values_when_asked() -> None:
    specs = specs_of("float[N] x, float[3] w", "y = Mul (x, w)", "float[3] w = {1, 2, 3}")
    assert [spec.default is None for spec in specs] == [True, False]
    assert "w" not in drawn(specs)
    other = drawn(specs, Drawing(overrides="f"))["w"]
    assert other.tolist() != [1, 2, 3] and sorted(other) == [1, 2, 3], "elements that the model's author chose"
    assert "w" not in drawn(specs, Drawing(overrides="iu"))


def test_initializers_of_old_files_are_no_inputs() -> None:
    """Before IR version 4 every initializer had to be listed as an input; nobody can pass another value."""
    graph = "g (float[N] x, float[3] w) => (float[X] y) <float[3] w = {1, 2, 3}> { y = Mul (x, w) }"
    text = f'<ir_version: 3, opset_import: ["": 8]> {graph}'
    assert [s.name for s in inputs.input_specs(ir.from_proto(onnx.parser.parse_model(text)))] == ["x"]


# ---------------------------------------------------------------------------------------------- settings


def labels(specs: list[inputs.InputSpec]) -> list[str]:
    return [item.label for item in settings.doubts(specs, settings.Assumed(), np.random.default_rng(0))]


@pytest.fixture
def cached() -> list[inputs.InputSpec]:
    return specs_of(
        "float[B,2,T,8] q, float[B,2,P,8] past_key, int64[B,M] attention_mask, float[1,2,1,1] factor",
        "y = Mul (q, factor)",
        "float[1,2,1,1] factor = {1, 2}",
    )


@pytest.mark.parametrize(
    "wanted",
    ["B=1", "T=1", "M=1", "P=1", "B=0", "T=0", "P=0", "inputs times 12", "initializers overridden", "the first only"],
)
def test_each_doubt_is_a_setting(wanted: str, cached: list) -> None:
    assert any(wanted in label for label in labels(cached)), labels(cached)


def test_sizes_are_1_together_and_differ_together(cached: list) -> None:
    found = [dict(word.split("=") for word in label.split(", ") if "=" in word) for label in labels(cached)]
    assert {"B": "1", "T": "1", "P": "1", "M": "1"} in found
    assert any(len(set(sizes.values())) == 4 for sizes in found)
    assert any(sizes["P"] == "0" and sizes["T"] not in "01" for sizes in found), "an empty cache"


def test_a_float_mask_holds_other_numbers_where_one_key_is_all_there_is() -> None:
    """A float16 model's -65504 times such a number hides a key altogether."""
    specs = specs_of("float[B,S] am", "m = Sub (one, am)\n y = Mul (m, low)", "float one = {1}, float low = {-1e4}")
    random, assumed = np.random.default_rng(0), settings.Assumed(full_rows=True)
    found = [item for item in settings.doubts(specs, assumed, random) if "'am' not only 0 and 1" in item.label]
    assert any("S=1" in item.label for item in found) and any("S=6" in item.label for item in found)
    assert all(not set(np.unique(item.tensors["am"])) <= {0, 1} for item in found)


def test_the_sizes_that_one_input_alone_has_are_1_together() -> None:
    specs = specs_of("float[B,2,T,8] q, float[M,1,1,N] bias", "y = Identity (q)")
    assert any({"M=1", "N=1"} <= {*label.split(", ")} and "B=2" in label for label in labels(specs)), labels(specs)


def test_a_model_of_fixed_sizes_has_more_than_one_setting() -> None:
    specs = specs_of("float[2,3] x", "y = Identity (x)")
    random = np.random.default_rng(0)
    sets = [*settings.plans(specs, settings.Assumed(), random), *settings.doubts(specs, settings.Assumed(), random)]
    assert len(sets) >= 3 and not np.array_equal(sets[0].tensors["x"], sets[1].tensors["x"])


def test_what_the_user_assumes_of_masks_is_kept(cached: list) -> None:
    random = np.random.default_rng(0)
    for item in settings.doubts(cached, settings.Assumed(right_padding=True), random, any_numbers=False):
        assert (np.diff(item.tensors["attention_mask"], axis=1) <= 0).all(), item.label
    for item in settings.doubts(cached, settings.Assumed(full_rows=True), random, any_numbers=False):
        mask = item.tensors["attention_mask"]
        assert mask.shape[1] < 2 or (mask[:, :-1] + mask[:, 1:] > 0).all(), "of two neighbours one is kept"
    both = settings.Assumed(right_padding=True, full_rows=True)
    for item in (*settings.plans(cached, both, random), *settings.doubts(cached, both, random, any_numbers=False)):
        mask = item.tensors["attention_mask"]
        assert (np.diff(mask, axis=1) <= 0).all() and (mask[:, :-1] > 0).all(), item.label


def test_the_mask_of_an_attention_node_has_past_and_new_keys_by_any_name() -> None:
    specs = specs_of(
        "float[B,2,T,8] q, float[B,2,T,8] k, float[B,2,T,8] v, float[T,P] m, float[B,2,L,8] a, float[B,2,L,8] b",
        "y, k1, v1 = Attention <is_causal = 1> (q, k, v, m, a, b)",
    )
    assert inputs.bind(specs, inputs.Sizes(2, 3, 7)) == {"B": 2, "T": 3, "L": 7, "P": 10}
    assert inputs.bind(specs, inputs.Sizes(2, 3, 7), {"T": 1, "L": 0}) == {"B": 2, "T": 1, "L": 0, "P": 1}
