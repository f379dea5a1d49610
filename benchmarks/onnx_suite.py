# SPDX-License-Identifier: Apache-2.0
"""ONNX's own tests of Attention, through faexport and onnxruntime with our library: `make onnx-suite`.

Every test_attention_* node test that the installed onnx package makes is fused, run and compared within the suite's
tolerance. With --expanded also the same tests written out in standard ops. Ends with "N fused and right, M refused, 0
wrong"; exits 1 where any is wrong.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
import tempfile
import warnings

import numpy as np
import onnx
import onnxruntime
import results_file
import rich.box
import rich.console
import rich.markup
import rich.table
from faexport import pipeline
from faexport.files import model_io
from faexport.report.data import count_nodes
from faexport.runtimes import ort_session
from faexport.spec import DOMAIN, OP_TYPE
from onnx.backend.test.runner import Runner

OPERATOR = f"{DOMAIN}::{OP_TYPE}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one test: "right", "refused" (left as Attention, with the reason) or "wrong"."""

    name: str
    outcome: str
    detail: str = ""
    max_abs_diff: float | None = None


def collect(expanded: bool) -> list:
    """The node tests of Attention, in the suite's order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite's other operators divide by zero on purpose
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases("Attention")
    return [
        case
        for case in cases
        if case.name.startswith("test_attention_") and case.name.endswith("_expanded") <= expanded
    ]


def check(case, folder: pathlib.Path) -> Result:  # an onnx TestCase, whose type is private
    """Fuses, runs and compares one test."""
    model, report = pipeline.run(model_io.load(case.model))
    if report.num_refused or not report.sites:
        reasons = [str(site.refusal) for site in report.sites if site.refusal] or ["no attention was found"]
        return Result(case.name, "refused", "; ".join(reasons))
    if not count_nodes(model).get(OPERATOR):
        return Result(case.name, "wrong", f"reported as fused, but without a {OP_TYPE} node")
    path = folder / f"{case.name}.onnx"
    model_io.save(model, path)
    names = [value.name for value in case.model.graph.input]
    worst = 0.0
    for inputs, expected in case.data_sets:
        results = ort_session.run_here(ort_session.Job(str(path), [dict(zip(names, inputs, strict=True))]))
        outputs = results.error or results.outputs[0]
        if isinstance(outputs, str):
            return Result(case.name, "wrong", f"does not run: {outputs}")
        try:
            worst = max(worst, compare(list(outputs.values()), expected, case.rtol, case.atol))
        except AssertionError as error:
            return Result(case.name, "wrong", " ".join(str(error).split())[:300])
    return Result(case.name, "right", max_abs_diff=worst)


def passes_alone(case, folder: pathlib.Path) -> bool:
    """Does onnxruntime itself pass the test, without us?"""
    path = folder / f"{case.name}.plain.onnx"
    onnx.save(case.model, path)
    names = [value.name for value in case.model.graph.input]
    for inputs, expected in case.data_sets:
        job = ort_session.Job(str(path), [dict(zip(names, inputs, strict=True))], library=False)
        results = ort_session.run_here(job)
        if results.error or isinstance(results.outputs[0], str):
            return False
        try:
            compare(list(results.outputs[0].values()), expected, case.rtol, case.atol)
        except AssertionError:
            return False
    return True


def compare(outputs: list[np.ndarray], expected: list[np.ndarray], rtol: float, atol: float) -> float:
    """As onnx's own test runner does; returns the largest difference. Raises AssertionError."""
    wanted = [onnx.numpy_helper.to_array(want) if isinstance(want, onnx.TensorProto) else want for want in expected]
    Runner.assert_similar_outputs(wanted, outputs, rtol, atol)
    worst = 0.0
    for got, want in zip(outputs, wanted, strict=True):
        difference = np.abs(got.astype(np.float64) - np.asarray(want, np.float64))
        worst = max(worst, float(difference[np.isfinite(difference)].max(initial=0.0)))
    return worst


def show(results: list[Result], screen: rich.console.Console) -> None:
    """The tests that are not fused and right, and the worst difference of the others."""
    others = [result for result in results if result.outcome != "right"]
    if others:
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("test", "outcome", "reason"):
            table.add_column(heading, overflow="fold")
        for result in others:
            colour = "red" if result.outcome == "wrong" else "yellow"
            table.add_row(result.name, f"[{colour}]{result.outcome}[/]", rich.markup.escape(result.detail))
        screen.print(table)
    worst = max((result for result in results if result.outcome == "right"), key=lambda r: r.max_abs_diff, default=None)
    if worst is not None:
        screen.print(f"largest difference of those fused: {worst.max_abs_diff:.2e} ({worst.name})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expanded", action="store_true", help="also the tests' bodies in standard ops")
    parser.add_argument("--filter", default="", help="only tests whose name contains this")
    parser.add_argument("--json", type=pathlib.Path, help="write the results to this file")
    parser.add_argument("--record", action="store_true", help="write the totals to benchmarks/results/onnx_suite.json")
    options = parser.parse_args()
    cases = [case for case in collect(options.expanded) if options.filter in case.name]
    with tempfile.TemporaryDirectory() as folder:
        results = [check(case, pathlib.Path(folder)) for case in cases]
        alone = sum(passes_alone(case, pathlib.Path(folder)) for case in cases)
    screen = rich.console.Console(highlight=False)
    show(results, screen)
    if options.json:
        data = {"onnx": onnx.__version__, "results": [dataclasses.asdict(result) for result in results]}
        options.json.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    counts = collections.Counter(result.outcome for result in results)
    if options.record:
        totals = {outcome: counts[outcome] for outcome in ("right", "refused", "wrong")}
        document = results_file.environment("onnx", "onnxruntime")
        results_file.write("onnx_suite", document | totals | {"tests": len(cases), "onnxruntime_alone": alone}, True)
    print(f"onnxruntime {onnxruntime.__version__} passes {alone} of the {len(cases)} tests by itself")
    print(f"{counts['right']} fused and right, {counts['refused']} refused, {counts['wrong']} wrong")
    return 1 if counts["wrong"] or not results else 0


if __name__ == "__main__":
    sys.exit(main())
