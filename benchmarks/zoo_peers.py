# SPDX-License-Identifier: Apache-2.0
"""The zoo's peers: onnxruntime's transformers optimizer and onnxscript's ort_fusions on a model, judged as ours is.

Called by zoo_model.py. Their results depend on the model, on their versions and on how they are judged, not on
faexport's fusing; they are kept in build/zoo-peers under a name made of all these, so that the next run has them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable

import onnx_ir as ir
from faexport.feeds import inputs, settings
from faexport.files import model_io
from faexport.report.data import count_nodes
from faexport.runtimes import ort_session
from faexport.verify import compare, model_check, widen

CACHE = pathlib.Path(__file__).parents[1] / "build" / "zoo-peers"
PEER_OPS = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "PackedMultiHeadAttention"}
JUDGES = (__file__, *(judge.__file__ for judge in (model_check, compare, settings, inputs, ort_session, widen)))
Outcome = Callable[[model_check.Verification], dict]


def results(
    folder: pathlib.Path, meta: dict, scratch: pathlib.Path, reference: model_check.Reference, outcome: Outcome
):
    """{"onnxruntime": …, "onnxscript": …}, each with the number of attention operators and what became of the model."""
    kept = CACHE / f"{folder.name}-{_key(folder)}.json"
    if kept.exists():
        return json.loads(kept.read_text("utf-8"))
    peers = {"onnxruntime": _onnxruntime_optimizer, "onnxscript": _onnxscript_fusions}
    found = {name: _peer(fuse, folder, meta, scratch, reference, outcome) for name, fuse in peers.items()}
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found), "utf-8")
    partial.replace(kept)
    return found


def _key(folder: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for package in ("onnxruntime", "onnxscript", "onnx-ir", "onnx"):
        digest.update(importlib.metadata.version(package).encode())
    for path in (*JUDGES, folder / "meta.json", folder / "inputs.npz", *sorted(folder.glob("model.onnx*"))):
        digest.update(pathlib.Path(path).read_bytes())
    return digest.hexdigest()[:16]


def _peer(
    fuse: Callable,
    folder: pathlib.Path,
    meta: dict,
    scratch: pathlib.Path,
    reference: model_check.Reference,
    outcome: Outcome,
) -> dict:
    """A peer's fusion of the same file, judged as ours."""
    path = scratch / f"{fuse.__name__}.onnx"
    try:
        fuse(folder / "model.onnx", meta, path)
        counts = count_nodes(model_io.load(path))
    except Exception as error:  # a peer that fails on a model fuses nothing in it
        return {"fused": 0, "outcome": "failed", "detail": ort_session.one_line(f"{type(error).__name__}: {error}")}
    fused = sum(counts.get(f"com.microsoft::{op_type}", 0) for op_type in PEER_OPS)
    if not fused:
        return {"fused": 0, "outcome": "nothing fused"}
    return {"fused": fused, **outcome(model_check.verify_against(reference, path))}


def _onnxruntime_optimizer(source: pathlib.Path, meta: dict, target: pathlib.Path) -> None:
    from onnxruntime.transformers import optimizer

    kind = meta["peer_type"] if meta.get("peer_type") in optimizer.MODEL_TYPES else "bert"
    sizes = {"num_heads": meta.get("num_heads") or 0, "hidden_size": meta.get("hidden") or 0}
    optimized = optimizer.optimize_model(str(source), model_type=kind, opt_level=0, **sizes)
    optimized.save_model_to_file(str(target))


def _onnxscript_fusions(source: pathlib.Path, meta: dict, target: pathlib.Path) -> None:
    from onnxscript.rewriter import ort_fusions

    model, _ = ort_fusions.optimize_for_ort(ir.load(source))
    ir.save(model, target)
