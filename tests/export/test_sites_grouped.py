# SPDX-License-Identifier: Apache-2.0
"""onnxruntime's GroupQueryAttention: everything of it that the operator has is fused and right, in prompts and steps on
a cache; the rest is refused with all its reasons."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import faexport
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from faexport.feeds import decoders, inputs
from faexport.report.data import VerificationStatus
from faexport.runtimes import ort_session
from faexport.verify import model_check, reference
from onnx import TensorProto, helper, numpy_helper

from tests.export.compared import OPTIONS, run
from tests.export.grouped import DIM, HEADS, KV_HEADS, Form, model_of, quantized, with_attributes

VERSION = tuple(int(part) for part in ort.__version__.split(".")[:2])

FORMS = {
    "plain": Form(),
    "separate": Form(packed=False),
    "as the builder writes it": Form(rotary=True, mask=True),
    "scale and softcap": Form(attributes=with_attributes(scale=0.3, softcap=4.0)),
    "interleaved rotary": Form(packed=False, rotary=True, attributes=with_attributes(rotary_interleaved=1)),
    "position ids": Form(rotary=True, position_ids=True, mask=True),
    "bias": Form(bias=True),
    "sinks": Form(sinks=True, mask=True),
    "smooth softmax": Form(attributes=with_attributes(smooth_softmax=1)),
    "window": Form(rotary=True, attributes=with_attributes(local_window_size=4)),
    "window of 1": Form(mask=True, attributes=with_attributes(local_window_size=1)),
    "window of the cache": Form(
        rotary=True, mask=True, attributes=with_attributes(local_window_size=4, sliding_window_cache=1)
    ),
    "window of the cache, sinks": Form(
        sinks=True, attributes=with_attributes(local_window_size=6, sliding_window_cache=1)
    ),
}
NEWER = {
    "int8": Form("int8", rotary=True, attributes=quantized("PER_TENSOR", 8)),
    "int8 by channel": Form("int8", mask=True, attributes=quantized("PER_CHANNEL", 8)),
    "int8 by channel, flat": Form("int8", flat=True, rotary=True, attributes=quantized("PER_CHANNEL", 8)),
    "int4": Form("int4", attributes=quantized("PER_TENSOR", 4)),
    "int4, window, sinks": Form(
        "int4",
        mask=True,
        rotary=True,
        sinks=True,
        packed=False,
        attributes=quantized("PER_CHANNEL", 4) + with_attributes(local_window_size=4, softcap=3.0),
    ),
    "bias, window of the cache": Form(
        bias=True, attributes=with_attributes(local_window_size=4, sliding_window_cache=1)
    ),
    "query lengths, window of the cache": Form(
        mask=True,
        chunks=True,
        rotary=True,
        packed=False,
        attributes=with_attributes(local_window_size=4, sliding_window_cache=1),
    ),
    "int4 by channel": Form("int4", rotary=True, mask=True, attributes=quantized("PER_CHANNEL", 4)),
    "query lengths": Form(chunks=True, rotary=True, packed=False),
}


def sets_of(model: onnx.ModelProto) -> tuple[decoders.Decoder, list]:
    loaded = ir.from_proto(model)
    decoder = decoders.read(loaded)
    assert decoder is not None
    return decoder, list(decoders.steps(decoder, inputs.input_specs(loaded), np.random.default_rng(0)))


def fuse(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The fused model, and what was proven."""
    fused, report = faexport.fuse(model, options=OPTIONS)
    assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
    return fused, [fact.text for fact in report.sites[0].facts]


def compare(form: Form, library: str) -> list[str]:
    """Fuses and compares what counts of all outputs, in prompts and steps; returns what was proven."""
    model = model_of(form)
    fused, facts = fuse(model)
    decoder, sets = sets_of(model)
    names = [output.name for output in model.graph.output]
    compared = 0
    for item in sets:
        try:
            expected = dict(zip(names, run(model, item.tensors), strict=True))
        except Exception as error:  # a setting that onnxruntime doesn't take
            assert "GroupQueryAttention" in str(error), item.label
            continue
        found = dict(zip(names, run(fused, item.tensors, library), strict=True))
        wanted, found = (decoder.settled(outputs, item.tensors) for outputs in (expected, found))
        for name in names:
            tolerance = 1e-4 * max(1.0, float(np.abs(wanted[name].astype(float)).max()))
            assert found[name].shape == wanted[name].shape, (item.label, name)
            np.testing.assert_allclose(
                found[name].astype(float), wanted[name].astype(float), atol=tolerance, err_msg=f"{name} {item.label}"
            )
        compared += 1
    assert compared >= 4
    return facts


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_forms(form: Form, library: str) -> None:
    facts = compare(form, library)
    assert {"causal", "padding as lengths"} <= set(facts)
    assert any("in place" in fact for fact in facts)


@pytest.mark.skipif(VERSION < (1, 32), reason="onnxruntime's CPU kernel has these from 1.32 on")
@pytest.mark.parametrize("form", NEWER.values(), ids=NEWER.keys())
def test_newer_forms(form: Form, library: str) -> None:
    compare(form, library)


def test_norm(library: str) -> None:
    """onnxruntime has it on GPUs only: here it gets rows that are normal already."""
    form = Form(norm=True, rotary=True, packed=False, attributes=with_attributes(qk_norm_epsilon=1e-3))
    with_norm, plain = model_of(form), model_of(dataclasses.replace(form, norm=False, attributes=()))
    fused, facts = fuse(with_norm)
    assert "RMS norm of the heads of query and key" in facts
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in with_norm.graph.initializer}
    decoder, sets = sets_of(plain)
    for item in sets[:5]:
        tensors = dict(item.tensors)
        for name, weight in (("query", "q_norm"), ("key", "k_norm")):
            rows = tensors[name].reshape(*tensors[name].shape[:2], -1, DIM)
            rows = rows / np.sqrt((rows * rows).mean(-1, keepdims=True) + 1e-3) * weights[weight]
            tensors[name] = rows.reshape(tensors[name].shape)
        names = [output.name for output in plain.graph.output]
        expected = decoder.settled(dict(zip(names, run(plain, tensors), strict=True)), tensors)
        found = decoder.settled(dict(zip(names, run(fused, item.tensors, library), strict=True)), tensors)
        for name in names:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=f"{name} {item.label}")


def turned_in_front(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with query and key turned before the node gets them."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.opset_import[0].version = 23
    (node,) = changed.graph.node
    angles = np.arange(64)[:, None] / 10 ** np.arange(DIM // 2)
    for name, array in (("cosines", np.cos(angles)), ("sines", np.sin(angles))):
        changed.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    positions = helper.make_tensor_value_info("positions", onnx.TensorProto.INT64, ["B", "S"])
    changed.graph.input.append(positions)
    for place, heads in ((0, HEADS), (1, KV_HEADS)):
        given, turned = node.input[place], f"{node.input[place]}_turned"
        inputs = [given, "cosines", "sines", "positions"]
        changed.graph.node.insert(0, helper.make_node("RotaryEmbedding", inputs, [turned], num_heads=heads))
        changed.graph.node[-1].input[place] = turned
    return changed


@pytest.mark.parametrize("norm", [False, True])
def test_a_rotation_in_front_of_the_nodes_own_norm_stays(norm: bool) -> None:
    """The operator turns what it has normalized, not the other way round."""
    fused, _ = fuse(turned_in_front(model_of(Form(packed=False, norm=norm))))
    assert ("RotaryEmbedding" in {node.op_type for node in fused.graph.node}) is norm


BIASES = {  # key j of row i at position p: where it is hidden, and whether the node hides as much by itself
    "causal": ("later = Greater(j, p)", True),
    "causal, and the first key": ("after = Greater(j, p); first = Less(j, one_); later = Or(after, first)", False),
    "before the row": ("later = GreaterOrEqual(j, p)", False),
    "window": ("after = Greater(j, p); far = Sub(p, two_); before = Less(j, far); later = Or(after, before)", False),
    "from the first key": ("later = Greater(j, i)", False),
}


def with_computed_bias(model: onnx.ModelProto, hidden: str) -> onnx.ModelProto:
    """The model with attention_bias computed from the sizes of mask and query instead of an input."""
    text = f"""<ir_version: 10, opset_import: ["": 21]> g (float[B,S,W] query, float[B,T] mask) => (float[1,1,S,T] bias)
    <int64 zero_ = {{0}}, int64 one_ = {{1}}, int64 two_ = {{2}}, float none = {{0}}, float huge = {{-3e38}},
     int64[1] at = {{1}}, int64[2] both = {{0, 1}}> {{
    rows = Shape<start = 1, end = 2>(query)
    row = Squeeze(rows)
    keys = Shape<start = 1>(mask)
    key = Squeeze(keys)
    j = Range(zero_, key, one_)
    count = Range(zero_, row, one_)
    i = Unsqueeze(count, at)
    past = Sub(key, row)
    p = Add(i, past)
    {hidden.replace("; ", chr(10))}
    bias_2d = Where(later, huge, none)
    bias = Unsqueeze(bias_2d, both)
    }}"""
    made = onnx.parser.parse_model(text).graph
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes = [*made.node, *changed.graph.node]
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    changed.graph.initializer.extend(made.initializer)
    inputs = [value for value in changed.graph.input if value.name != "bias"]
    del changed.graph.input[:]
    changed.graph.input.extend(inputs)
    return changed


@pytest.mark.parametrize(("hidden", "is_dropped"), BIASES.values(), ids=BIASES.keys())
def test_a_causal_bias_says_nothing_that_the_node_does_not(hidden: str, is_dropped: bool, library: str) -> None:
    model = with_computed_bias(model_of(Form(bias=True, mask=True, rotary=True)), hidden)
    fused, facts = fuse(model)
    (node,) = [n for n in fused.graph.node if n.op_type == "FlashAttention"]
    words = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert (b"attn_bias" in words["optional_inputs"]) is not is_dropped
    assert ("attention_bias hides no more keys than the node does" in facts) is is_dropped
    decoder, sets = sets_of(model)
    names = [output.name for output in model.graph.output]
    for item in sets[:6]:
        expected, found = (
            decoder.settled(dict(zip(names, outputs, strict=True)), item.tensors)
            for outputs in (run(model, item.tensors), run(fused, item.tensors, library))
        )
        for name in names:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=f"{name} {item.label}")


# ------------------------------------------------------------------------------------------ verification


def verified(tmp_path: pathlib.Path, model: onnx.ModelProto, fused: onnx.ModelProto) -> VerificationStatus:
    onnx.save(model, tmp_path / "a.onnx")
    onnx.save(fused, tmp_path / "b.onnx")
    found = model_check.verify(tmp_path / "a.onnx", tmp_path / "b.onnx", open_session=ort_session.SessionHere)
    print(found.reason, found.notes)
    return found.status


RICH = Form(
    rotary=True, position_ids=True, mask=True, sinks=True, attributes=with_attributes(local_window_size=4, softcap=5.0)
)

CHECKED = {
    "float16": Form(rotary=True, mask=True, half=True),
    "window": Form(rotary=True, mask=True, attributes=with_attributes(local_window_size=4)),
    "window of the cache": Form(
        rotary=True, mask=True, attributes=with_attributes(local_window_size=4, sliding_window_cache=1)
    ),
    "position ids": Form(rotary=True, position_ids=True, mask=True),
    "no cache": Form("", rotary=True),
    "sinks, softcap, window": RICH,
    "float16 on a cache of int8": Form(
        "int8", rotary=True, mask=True, half=True, attributes=quantized("PER_CHANNEL", 8)
    ),
    "float16 on a cache of int4": Form(
        "int4", rotary=True, mask=True, half=True, attributes=quantized("PER_TENSOR", 4)
    ),
}


@pytest.mark.parametrize("form", CHECKED.values(), ids=CHECKED.keys())
def test_what_is_right_passes(form: Form, tmp_path: pathlib.Path) -> None:
    model = model_of(form)
    assert verified(tmp_path, model, fuse(model)[0]) is VerificationStatus.PASSED


RING = Form(rotary=True, mask=True, attributes=with_attributes(local_window_size=4, sliding_window_cache=1))
WRONG = {
    "a wider window": (RICH, {"left_window_size": 4}),
    "a narrower window": (RICH, {"left_window_size": 2}),
    "no window": (RICH, {"left_window_size": -1}),
    "not causal": (RICH, {"is_causal": 0}),
    "no softcap": (RICH, {"softcap": 0.0}),
    "another scale": (RICH, {"scale": 0.26}),
    "interleaved": (RICH, {"rotary_interleaved": 1}),
    "tables changed": (RICH, {"cos_cache": "sin"}),
    "other lengths": (dataclasses.replace(RICH, mask=False), {"nonpad_kv_seqlen": "seqlens_k"}),
    "another window of the cache": (RING, {"left_window_size": 2}),
    "the whole cache": (RING, {"cache": "write"}),
    "interleaved on a cache of int8": (CHECKED["float16 on a cache of int8"], {"rotary_interleaved": 1}),
    "another scale of int4": (CHECKED["float16 on a cache of int4"], {"k_scale": "v_scale"}),
}


@pytest.mark.parametrize(("form", "change"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_fails(form: Form, change: dict[str, Any], tmp_path: pathlib.Path) -> None:
    model = model_of(form)
    fused = fuse(model)[0]
    (node,) = (n for n in fused.graph.node if n.domain == "faexport")
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    names = values["optional_inputs"].decode().split(",")
    for name, value in change.items():
        if name in names:
            node.input[3 + names.index(name)] = value
            continue
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])
    assert verified(tmp_path, model, fused) is VerificationStatus.FAILED


# ------------------------------------------------------------------------------------------ refusals


def refusal(form: Form) -> str:
    fused, report = faexport.fuse(model_of(form), options=OPTIONS)
    (site,) = report.sites
    assert not report.num_fused and site.refusal is not None and site.refusal.node == "node"
    assert not site.refusal.defect
    return site.refusal.reason


@pytest.mark.parametrize(
    ("form", "reasons"),
    [
        (Form(attributes=with_attributes(causal=0)), ["not causal"]),
        (Form(attributes=with_attributes(local_window_size=0)), ["window of 0 keys"]),
        (Form("", attributes=with_attributes(sliding_window_cache=1)), ["window of a cache"]),
        (Form(attributes=with_attributes(causal=0, local_window_size=0)), ["not causal", "window of 0 keys"]),
        (Form("", attributes=with_attributes(local_window_size=2)), ["without a cache", "local window"]),
        (Form("int8", attributes=with_attributes(k_quant_type="PER_ROW")), ["scales", "PER_ROW"]),
        (Form("int8", attributes=quantized("PER_TENSOR", 4)), ["8 bits", "kv_cache_bit_width"]),
    ],
)  # fmt: skip
def test_refusals_say_every_reason(form: Form, reasons: list[str]) -> None:
    found = refusal(form)
    assert all(reason in found for reason in reasons), found


def test_a_cache_that_is_not_given_on_is_refused() -> None:
    model = model_of(Form())
    del model.graph.output[1:], model.graph.node[-1].output[1:]
    _, report = faexport.fuse(model, options=OPTIONS)
    assert "give on" in str(report.sites[0].refusal)


def test_a_present_that_nobody_reads(library: str) -> None:
    model = model_of(Form(mask=True))
    decoder, sets = sets_of(model)
    del model.graph.output[1:]
    fused, _ = fuse(model)
    for item in sets[:6]:
        old, new = (run(m, item.tensors, lib)[0] for m, lib in ((model, None), (fused, library)))
        old, new = (decoder.settled({"output": x}, item.tensors)["output"] for x in (old, new))
        np.testing.assert_allclose(new, old, atol=1e-4, err_msg=item.label)


def test_total_that_is_no_size_goes_along_as_a_shape() -> None:
    """Rows of the present are max(capacity, total), so some tensor must have as many."""
    fused, _ = fuse(model_of(Form()))
    made = {output: node for node in fused.graph.node for output in node.output}
    (node,) = (n for n in fused.graph.node if n.domain == "faexport")
    names = helper.get_attribute_value(next(a for a in node.attribute if a.name == "optional_inputs")).decode()
    extent = node.input[3 + names.split(",").index("kv_extent")]
    assert made[extent].op_type == "ConstantOfShape"
    fused, _ = fuse(model_of(Form(mask=True)))
    (node,) = (n for n in fused.graph.node if n.domain == "faexport")
    assert "mask" in node.input and not any(n.op_type == "ConstantOfShape" for n in fused.graph.node)


def test_sums_of_the_mask_are_the_lengths_themselves() -> None:
    """The builder's models subtract 1 from them, which isn't added again."""
    fused, _ = fuse(model_of(Form(mask=True)))
    (node,) = (n for n in fused.graph.node if n.domain == "faexport")
    names = helper.get_attribute_value(next(a for a in node.attribute if a.name == "optional_inputs")).decode()
    lengths = node.input[3 + names.split(",").index("nonpad_kv_seqlen")]
    made = {output: n for n in fused.graph.node for output in n.output}
    assert made[lengths].op_type in ("Squeeze", "ReduceSum")
    assert not {"Sub", "Cast", "Add"} & {n.op_type for n in fused.graph.node}
    fused, _ = fuse(model_of(Form()))
    assert any(n.op_type == "Add" for n in fused.graph.node)


# ------------------------------------------------------------------------------------------ generation


class Generator:
    """A session with one buffer for each cache, bound as past and present, as onnxruntime-genai does it."""

    def __init__(self, model: onnx.ModelProto, capacity: int, library: str | None = None):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        if library:
            options.register_custom_ops_library(library)
        providers = ["CPUExecutionProvider"]
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
        shape = (3, KV_HEADS, capacity, DIM)
        self.caches = {n: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for n in ("key", "value")}

    def step(self, query: np.ndarray, mask: np.ndarray) -> np.ndarray:
        binding = self.session.io_binding()
        binding.bind_output("output")
        for name, array in (("query", query), ("mask", mask)):
            binding.bind_cpu_input(name, array)
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()


@pytest.mark.parametrize(
    ("form", "capacity", "lengths"), [(FORMS["as the builder writes it"], 30, (7, 3, 5)), (RING, 7, (7, 7, 7))]
)
def test_generation_in_place(form: Form, capacity: int, lengths: tuple[int, ...], library: str) -> None:
    """A prompt, padded on the right, and twenty steps."""
    model = model_of(form)
    original, fused = Generator(model, capacity), Generator(fuse(model)[0], capacity, library)
    random = np.random.default_rng(0)
    keys, width = np.array(lengths), (HEADS + 2 * KV_HEADS) * DIM
    for rows in (max(lengths), *[1] * 20):
        query = random.standard_normal((3, rows, width)).astype(np.float32)
        mask = (np.arange(keys.max()) < keys[:, None]).astype(np.int64)
        expected, found = (generator.step(query, mask) for generator in (original, fused))
        for b in range(3):
            used = slice(0, min(rows, keys[b]))
            np.testing.assert_allclose(found[b, used], expected[b, used], atol=1e-5, err_msg=f"{keys[b]} keys")
        keys = keys + 1
    window = 4 if form is RING else 0
    kept = decoders.rows_kept(keys - 1, capacity, window)
    for name, cache in original.caches.items():
        for b, rows in enumerate(kept):
            ours, theirs = (c.numpy()[b, :, :rows] for c in (fused.caches[name], cache))
            assert rows and np.abs(theirs).min(-1).max() > 0
            np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=f"{name} {b}")


@pytest.mark.parametrize("read", ["past_key", "output"])
def test_rows_that_hold_nothing_are_left_out_only_where_nothing_reads_them(read: str, tmp_path: pathlib.Path) -> None:
    """The sum of a cache depends on its free rows, that of a prompt's outputs on its padding."""
    path, model = tmp_path / "model.onnx", model_of(Form())
    onnx.save(model, path)
    assert reference.make_reference(path, open_session=ort_session.SessionHere).problem == ""
    name = model.graph.output[0].name if read == "output" else read
    model.graph.node.append(helper.make_node("ReduceSum", [name], ["sum"], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, []))
    onnx.save(model, path)
    problem = reference.make_reference(path, open_session=ort_session.SessionHere).problem
    assert "output 'sum' of the original depends on padding" in problem


def test_a_state_of_the_last_token_is_compared_where_that_is_no_padding(tmp_path: pathlib.Path, library: str) -> None:
    """As convolutions keep one beside the attention (LFM2): of an entry that is padded it holds what the padding is."""
    model = model_of(Form(mask=True))
    width = (HEADS + 2 * KV_HEADS) * DIM
    model.graph.node.append(helper.make_node("Gather", ["query", "end"], ["state"], axis=1))
    model.graph.initializer.append(numpy_helper.from_array(np.array(-1), "end"))
    model.graph.output.append(helper.make_tensor_value_info("state", TensorProto.FLOAT, ["B", width]))
    onnx.save(model, tmp_path / "model.onnx")
    report = faexport.optimize(tmp_path / "model.onnx", tmp_path / "fused.onnx")
    assert report.num_fused == 1 and report.verification.status is VerificationStatus.PASSED
    decoder, sets = sets_of(model)
    assert decoder.states == {"state"} and decoder.tokens == "query"
    padded = next(item for item in sets if (decoder.keys(item.tensors) < item.tensors["query"].shape[1]).any())
    state = np.ones((len(padded.tensors["query"]), width), np.float32)
    kept = decoder.settled({"state": state}, padded.tensors)["state"].any(1)
    assert kept.tolist() == (decoder.keys(padded.tensors) == padded.tensors["query"].shape[1]).tolist()


@pytest.mark.parametrize(
    ("form", "needs"),
    [
        (Form(), "cache = write"),
        (Form(cache="", packed=False, rotary=True), "cos_cache"),
        (Form(cache="", packed=False), ""),
    ],
    ids=["cache", "rotary", "plain"],
)
def test_a_site_that_the_tensorrt_plugin_refuses_is_told(form: Form, needs: str) -> None:
    said = "TensorRT can't build this model: our plugin for it doesn't have what site 'node' needs"
    for target in ("tensorrt", "onnxruntime"):
        _, report = faexport.fuse(model_of(form), options=faexport.Options(target=target))
        assert report.num_fused == 1
        told = [note for note in report.notes if "TensorRT can't build" in note]
        assert len(told) == bool(needs and target == "tensorrt")
        assert all(note.startswith(f"{said} ({needs})") for note in told)
