# SPDX-License-Identifier: Apache-2.0
"""One model of the zoo: fuse it, run both files, look at what was written; the same for the peers.

zoo.py's workers. A folder has model.onnx, meta.json, inputs.npz and expected.npz (PyTorch's outputs). Results are plain
dictionaries (JSON).
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import onnx
import onnx_ir as ir
import zoo_peers
from faexport import pipeline
from faexport.files import model_io
from faexport.precision import half_check
from faexport.report.data import VerificationStatus
from faexport.runtimes import ort_session
from faexport.spec import DOMAIN, OP_TYPE, Layout
from faexport.verify import compare, model_check

MATERIALIZING = {"Expand", "Where", "ScatterND", "Trilu", "ConstantOfShape", "Tile"}  # what builds a mask of S x S


def examine(folder: pathlib.Path, peers: bool, isolate: bool, rest: bool, fp16: bool) -> dict:
    """Everything about one model. `isolate` runs each session in a process of its own, since one crashed before."""
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    keys = (
        "name",
        "family",
        "exporter",
        "attn",
        "opset",
        "dtype",
        "with_cache",
        "mode",
        "needs",
        "numerics_ok",
        "notes",
    )
    result = {key: meta.get(key) for key in keys} | {"expected": meta["expected_attention_blocks"]}
    open_session = ort_session.Session if isolate else ort_session.SessionHere
    given = model_check.InputSet("inputs.npz", dict(np.load(folder / "inputs.npz")))
    reference = model_check.make_reference(folder / "model.onnx", extra_inputs=[given], open_session=open_session)
    with tempfile.TemporaryDirectory(prefix="zoo-") as scratch:
        result["ours"] = _as_the_command(folder, pathlib.Path(scratch), reference, rest, fp16)
        if peers:
            result |= zoo_peers.results(folder, meta, pathlib.Path(scratch), reference, _outcome)
    return result


def _as_the_command(
    folder: pathlib.Path, scratch: pathlib.Path, reference: model_check.Reference, rest: bool, fp16: bool
) -> dict:
    """The fused model and its float16 form; where one of them is wrong with what was joined around attention, once more
    without, as `faexport` does (jobs.run)."""
    found, why = {}, ""
    for joins in (True, False) if rest else (False,):
        found = _ours(folder, scratch, reference, pipeline.Options(rest=joins))
        if fp16 and found["outcome"] == "right" and compare.least_precise(reference.model) == "float32":
            found["fp16"] = _half(scratch, reference)
        if why:
            found["without_rest"] = why
        why = next((one["detail"] for one in (found, found.get("fp16", found)) if one["outcome"] == "wrong"), "")
        if not why:
            break
    return found


def _ours(
    folder: pathlib.Path, scratch: pathlib.Path, reference: model_check.Reference, options: pipeline.Options
) -> dict:
    model = model_io.load(folder / "model.onnx")
    start = time.perf_counter()
    model, report = pipeline.run(model, options)
    seconds = time.perf_counter() - start
    path = scratch / "model.fa.onnx"
    model_io.save(model, path)
    result = {
        "fused": report.num_fused,
        "refusals": [{"site": site.name, "reason": site.refusal.reason} for site in report.sites if site.refusal],
        "facts": [[str(fact) for fact in site.facts] for site in report.sites if site.fused],
        "seconds": seconds,
        **_outcome(model_check.with_sites(reference, path, model_check.verify_against(reference, path))),
    }
    if report.num_fused and result["outcome"] == "right":
        result |= _operands(path, reference) | _against_torch(folder, path, reference)
        result["fallback"] = model_check.verify_against(reference, path, use_library=False).status
    return result


OUTCOMES = {
    VerificationStatus.PASSED: "right",
    VerificationStatus.FAILED: "wrong",
    VerificationStatus.NOT_RUN: "not run",
}


def _half(scratch: pathlib.Path, reference: model_check.Reference) -> dict:
    """The fused model in float16 against the float32 original."""
    try:
        made = half_check.make(reference, scratch / "model.fa.onnx")
        path = scratch / "model.fp16.onnx"
        model_io.save(made.model, path)
        said = half_check.check(reference, made.said, path)
    except model_io.ModelError as error:
        return {"outcome": "not run", "detail": str(error)}
    worst = max(said.outputs, key=lambda row: row.badness, default=None)
    sizes = {"max_abs_diff": worst.max_abs_diff, "plain_abs_diff": worst.plain_abs_diff} if worst else {}
    return {"outcome": OUTCOMES[said.status], "detail": said.reason, "kept": len(said.kept), **sizes}


def _outcome(verification: model_check.Verification) -> dict:
    """right, wrong, or not run, and the largest difference as a share of what is allowed."""
    worst = verification.worst
    return {
        "outcome": OUTCOMES[verification.status],
        "detail": verification.reason,
        "max_abs_diff": worst.max_abs_diff if worst else None,
        "tolerance": worst.tolerance if worst else None,
        "runs": sum(bool(run.outputs) for run in verification.runs),
        "skipped": [run.skipped for run in verification.runs if run.skipped],
    }


def _against_torch(folder: pathlib.Path, path: pathlib.Path, reference: model_check.Reference) -> dict:
    """The fused model's error against PyTorch's outputs beside the original's, relative to their magnitude."""
    expected = dict(np.load(folder / "expected.npz"))
    given = reference.outputs[0]
    fused = reference.run(ort_session.Job(str(path), [reference.sets[0].tensors]))
    if isinstance(given, str) or fused.error or isinstance(fused.outputs[0], str):
        return {}

    def error(outputs: dict[str, np.ndarray]) -> float:
        pairs = [(expected[name], outputs[name]) for name in expected if name in outputs]
        return max((_relative(want, got) for want, got in pairs if want.dtype.kind == "f"), default=0.0)

    return {"torch_error": error(fused.outputs[0]), "torch_error_of_original": error(given)}


def _relative(want: np.ndarray, got: np.ndarray) -> float:
    want, got = want.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(want)
    scale = np.abs(want[finite]).max(initial=0.0)
    return float(np.abs(want - got)[finite].max(initial=0.0) / scale) if scale else 0.0


def _operands(path: pathlib.Path, reference: model_check.Reference) -> dict:
    """What each operator node computes, and the S_q x S_kv masks that the file still builds: shapes at run time."""
    proto = onnx.load(path)
    model = ir.from_proto(proto)
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == OP_TYPE]
    makers = [node for node in model.graph if node.op_type in MATERIALIZING]
    names = {value.name for node in nodes for value in node.inputs if value is not None}
    names |= {node.outputs[0].name for node in makers}
    shapes = _shapes(proto, names, path.with_name("probe.onnx"), reference)
    scores = {sizes for node in nodes if (sizes := _score_sizes(node, shapes)) is not None}
    square = {sizes for sizes in scores if min(sizes) > 1}
    leftovers = [node.outputs[0].name for node in makers if tuple(shapes.get(node.outputs[0].name, ())[-2:]) in square]
    kinds = [_kind(node, shapes) for node in nodes]
    needed = any("SxS" in kind for kind in kinds)
    return {"kinds": kinds, "leftovers": [] if needed else leftovers, "leftovers_needed": leftovers if needed else []}


def _shapes(proto: onnx.ModelProto, names: set[str], path: pathlib.Path, reference: model_check.Reference) -> dict:
    """Shapes of values on the first inputs that the original runs on; {} where the probe does not run."""
    outputs = {output.name for output in proto.graph.output}
    constants = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    inputs = {value.name for value in proto.graph.input}
    wanted = sorted(names - outputs - inputs - constants.keys())
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    onnx.save(proto, path)
    index = next(i for i, given in enumerate(reference.outputs) if not isinstance(given, str))
    tensors = reference.sets[index].tensors
    results = reference.run(ort_session.Job(str(path), [tensors], optimize=False))
    if results.error or isinstance(results.outputs[0], str):
        return {}
    found = {name: tuple(array.shape) for name, array in results.outputs[0].items()}
    return constants | {name: tuple(array.shape) for name, array in tensors.items()} | found


def _score_sizes(node: ir.Node, shapes: dict) -> tuple[int, int] | None:
    rows = []
    for position, attribute in enumerate(("query_layout", "key_layout")):
        shape = shapes.get(node.inputs[position].name)
        if shape is None:
            return None
        layout = node.attributes.get_string(attribute, "") or (Layout.BSH if len(shape) == 3 else Layout.BHSD)
        rows.append(shape[layout.index("S")])
    if "past_key" in _optional_inputs(node):
        rows[1] += shapes[node.inputs[3 + _optional_inputs(node).index("past_key")].name][2]
    return rows[0], rows[1]


def _optional_inputs(node: ir.Node) -> list[str]:
    return [name for name in node.attributes.get_string("optional_inputs", "").split(",") if name]


def _kind(node: ir.Node, shapes: dict) -> str:
    """E.g. "causal + mask 1xS": the cheap masks by name, those of S x S marked as such."""
    parts = []
    attributes = node.attributes
    if attributes.get_int("is_causal", 0) or attributes.get_int("right_window_size", -1) == 0:
        parts.append("causal")
    if attributes.get_int("left_window_size", -1) >= 0 or attributes.get_int("right_window_size", -1) > 0:
        parts.append("window")
    if attributes.get_float("softcap", 0.0):
        parts.append("softcap")
    for position, name in enumerate(_optional_inputs(node), start=3):
        if name in ("attn_mask", "attn_bias"):
            shape = shapes.get(node.inputs[position].name, ())
            rows = shape[-2] if len(shape) > 1 else 1
            parts.append(f"{name.removeprefix('attn_')} {'SxS' if rows > 1 else '1xS'}")
        elif name == "nonpad_kv_seqlen":
            parts.append("lengths")
        elif name == "alibi_slopes":
            parts.append("alibi")
        elif name == "sinks":
            parts.append("sinks")
    return " + ".join(parts) or "no mask"


def serve() -> None:
    """A worker: reads {"folder", "peers", "isolate"} a line on stdin, answers with a line of JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # peers print, in Python and in C++
    for line in sys.stdin:
        job = json.loads(line)
        try:
            chosen = {name: job[name] for name in ("peers", "isolate", "rest", "fp16")}
            result = examine(pathlib.Path(job["folder"]), **chosen)
        except Exception as error:
            result = {"error": ort_session.one_line(f"{type(error).__name__}: {error}")}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    serve()
