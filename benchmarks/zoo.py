# SPDX-License-Identifier: Apache-2.0
"""Fuses a folder of exported models and checks every one: `make zoo ZOO=folder`.

Each model is fused, both files run in onnxruntime on the given inputs and at other sizes, and the peers are tried on
it too (zoo_peers.py, which keeps their results): onnxruntime's transformers optimizer and onnxscript's ort_fusions.
Prints tables by family and by slice; exits 1 where any result of ours is wrong. With --record the totals go to
benchmarks/results/zoo.json, from which docs/faexport.md's table is made.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable

import rich.box
import rich.console
import rich.markup
import rich.progress
import rich.table
from results_file import environment, write

WORKER = pathlib.Path(__file__).with_name("zoo_model.py")
PEERS = {"onnxruntime": "onnxruntime optimizer", "onnxscript": "onnxscript ort_fusions"}

# What a model is known to have (manifest.jsonl) and the word for it in the operator's kinds (zoo_model.py).
NEEDS = {
    "causal": "causal", "sliding_window": "window", "padding_mask": "1xS", "softcap": "softcap", "sinks": "sinks",
    "alibi": "ALiBi, slopes",
}  # fmt: skip


@dataclasses.dataclass
class Options:
    peers: bool
    timeout: float
    rest: bool = False
    fp16: bool = False


class Worker:
    """A process that examines one model after the other; started again after a crash or a timeout."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.process: subprocess.Popen | None = None

    def examine(self, folder: pathlib.Path) -> dict:
        result = self._ask(folder, isolate=False)
        if "crash" in result:  # onnxruntime's optimizer crashes on some originals: every session in its own process now
            result = self._ask(folder, isolate=True)
        if "crash" in result or "error" in result:
            result = _meta(folder) | {
                "ours": {"fused": 0, "outcome": "error", "detail": result.get("crash") or result["error"]}
            }
        return result

    def _ask(self, folder: pathlib.Path, isolate: bool) -> dict:
        if self.process is None:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen([sys.executable, WORKER], text=True, env=environment, **pipes)
        chosen = {"peers": self.options.peers, "rest": self.options.rest, "fp16": self.options.fp16}
        job = {"folder": str(folder), "isolate": isolate, **chosen}
        timer = threading.Timer(self.options.timeout, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        timed_out = not timer.is_alive()
        timer.cancel()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.process = None
        return {
            "crash": f"took longer than {self.options.timeout:.0f} s"
            if timed_out
            else f"the process died with code {code}"
        }

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def _meta(folder: pathlib.Path) -> dict:
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    return meta | {"expected": meta["expected_attention_blocks"]}


def find_models(root: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    """Folders of `root` that hold a model and say how many blocks are expected, by name."""
    folders = sorted(path.parent for path in root.glob("*/meta.json") if re.search(pattern, path.parent.name))
    complete = (folder for folder in folders if (folder / "model.onnx").exists() and (folder / "inputs.npz").exists())
    return [folder for folder in complete if "expected_attention_blocks" in (folder / "meta.json").read_text("utf-8")]


def examine_all(folders: list[pathlib.Path], options: Options, jobs: int, screen: rich.console.Console) -> list[dict]:
    """All models, `jobs` at a time, in the order of `folders`."""
    todo: queue.SimpleQueue = queue.SimpleQueue()
    for item in enumerate(folders):
        todo.put(item)
    results: list[dict] = [{}] * len(folders)
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    with rich.progress.Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("models", total=len(folders))

        def work() -> None:
            worker = Worker(options)
            while True:
                try:
                    index, folder = todo.get_nowait()
                except queue.Empty:
                    break
                results[index] = worker.examine(folder)
                bar.update(task, advance=1, description=folder.name)
                if not screen.is_terminal and todo.qsize() % 50 == 0:
                    print(f"{len(folders) - todo.qsize()} of {len(folders)} models begun", file=sys.stderr, flush=True)
            worker.close()

        threads = [threading.Thread(target=work) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


@dataclasses.dataclass
class Tally:
    """Sums over a group of models; `good` counts blocks fused in models that still agree, `extra` what was fused in a
    model beyond the blocks that it is said to have (not counted as fused)."""

    models: int = 0
    expected: int = 0
    fused: int = 0
    good: int = 0
    extra: int = 0
    wrong: int = 0
    not_run: int = 0
    worst: float = 0.0
    kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @classmethod
    def of(cls, results: Iterable[dict], tool: str = "ours") -> Tally:
        tally = cls()
        for result in results:
            found = result.get(tool, {"fused": 0, "outcome": "not tried"})
            fused = min(found["fused"], result["expected"])
            tally.models += 1
            tally.expected += result["expected"]
            tally.fused += fused
            tally.extra += found["fused"] - fused
            tally.good += fused if found["outcome"] == "right" else 0
            tally.wrong += found["outcome"] in ("wrong", "error")
            tally.not_run += found["outcome"] == "not run"
            if found.get("tolerance"):
                tally.worst = max(tally.worst, found["max_abs_diff"] / found["tolerance"])
            tally.kinds.update(found.get("kinds", []))
        return tally

    @property
    def share(self) -> str:
        return f"{100 * self.fused / self.expected:.1f} %" if self.expected else "-"


def slices(results: list[dict]) -> dict[str, list[dict]]:
    """The groups that the issue of reach is judged by; a model is in several."""
    tests: dict[str, Callable[[dict], bool]] = {
        f"{exporter} / {attention or 'torch modules'}": lambda r, e=exporter, a=attention: (
            (r["exporter"], r["attn"]) == (e, a)
        )
        for exporter, attention in sorted({(r["exporter"], r["attn"]) for r in results}, key=str)
    }
    tests |= {
        "KV cache": lambda r: r["mode"] in ("cache", "decode1"),
        "fp16": lambda r: r["dtype"] == "fp16",
        "opset 23 and 24": lambda r: r["opset"] >= 23,
        "all": lambda r: True,
    }
    groups = {name: [result for result in results if test(result)] for name, test in tests.items()}
    return {name: group for name, group in groups.items() if group}


def show_slices(results: list[dict], peers: bool, screen: rich.console.Console) -> None:
    """Blocks expected and fused (right) by us and by the peers."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("slice")
    for heading in (
        "models",
        "blocks",
        "fused (right)",
        "share",
        "wrong",
        "not run",
        *(PEERS.values() if peers else ()),
    ):
        table.add_column(heading, justify="right")
    for name, group in slices(results).items():
        ours = Tally.of(group)
        right = f"{ours.fused} ({ours.good})"
        cells = [name, ours.models, ours.expected, right, ours.share, ours.wrong, ours.not_run]
        others = [Tally.of(group, peer) for peer in PEERS] if peers else []
        cells += [f"{other.fused} ({other.good})" for other in others]
        table.add_row(*map(str, cells), style="red" if any(other.good >= ours.good > 0 for other in others) else None)
    screen.print(table)
    screen.print("in brackets: blocks fused in models that then still ran and agreed; red: a peer has as many\n")


def add_needs(results: list[dict], manifest: pathlib.Path) -> None:
    """Takes from the folder's manifest, where there is one, what each model is known to have."""
    lines = manifest.read_text("utf-8").splitlines() if manifest.exists() else []
    needs = {entry["name"]: entry.get("needs") for entry in map(json.loads, lines)}
    for result in results:
        known = needs.get(result["name"]) or result.get("needs") or []
        result["needs"] = [*known, *(["alibi"] if "alibi" in (result.get("notes") or "").lower() else [])]


def show_families(results: list[dict], screen: rich.console.Console) -> None:
    """By family: blocks, what was proven, the worst error as a share of the tolerance."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("family", "models", "blocks", "fused", "wrong", "worst error / allowed", "as"):
        table.add_column(heading, justify="left" if heading in ("family", "as") else "right")
    for family in sorted({result["family"] for result in results}):
        tally = Tally.of(result for result in results if result["family"] == family)
        kinds = ", ".join(f"{count} {kind}" for kind, count in tally.kinds.most_common())
        cells = (family, tally.models, tally.expected, tally.fused, tally.wrong, f"{tally.worst:.3f}", kinds)
        table.add_row(*map(str, cells), style="red" if tally.wrong else None)
    screen.print(table)


def show_proofs(results: list[dict], screen: rich.console.Console) -> None:
    """For each property that the models are known to have: in how many of them it was proven."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("property", "models that have it", "proven in", "not in"):
        table.add_column(heading, justify="right" if heading in ("models that have it", "proven in") else "left")
    for need, word in NEEDS.items():
        having = [
            result for result in results if need in (result.get("needs") or []) and result["ours"]["outcome"] == "right"
        ]
        without = [result["name"] for result in having if not any(word in text for text in _proofs(result["ours"]))]
        if having:
            table.add_row(need, str(len(having)), str(len(having) - len(without)), ", ".join(without))
    if table.row_count:
        screen.print(table)


def _proofs(ours: dict) -> list[str]:
    return [*ours.get("kinds", []), *(fact for site in ours.get("facts", []) for fact in site)]


def show_reasons(results: list[dict], screen: rich.console.Console) -> None:
    """Why sites were left, with an example, and every model that is not right."""
    examples: dict[str, list[str]] = collections.defaultdict(list)
    for result in results:
        for refusal in result["ours"].get("refusals", []):
            reason = re.sub(r"'[^']*'|\d+", "…", refusal["reason"])
            examples[reason].append(f"{result['name']}: {refusal['site']}")
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("sites", "refused because", "for example"):
        table.add_column(heading, overflow="fold")
    for reason, places in sorted(examples.items(), key=lambda item: -len(item[1])):
        table.add_row(str(len(places)), rich.markup.escape(reason), rich.markup.escape(places[0]))
    if examples:
        screen.print(table)
    for result in results:
        ours = result["ours"]
        if why := ours.get("without_rest"):
            screen.print(f"made without what stands around attention: {result['name']}: {rich.markup.escape(why)}")
        if (half := ours.get("fp16")) and half["outcome"] != "right":
            screen.print(f"[red]float16 {half['outcome']}[/]: {result['name']}: {rich.markup.escape(half['detail'])}")
        if ours["outcome"] in ("wrong", "error"):
            screen.print(f"[red]{ours['outcome']}[/]: {result['name']}: {rich.markup.escape(ours['detail'])}")
        if ours.get("leftovers"):
            names = ", ".join(ours["leftovers"])
            screen.print(f"[red]S x S left[/]: {result['name']}: {rich.markup.escape(names)}")


def _counts(group: list[dict], options: Options) -> dict:
    """Ours and the peers' sums over a group of models."""
    tally = Tally.of(group)
    others = {peer: Tally.of(group, peer) for peer in PEERS} if options.peers else {}
    return {
        "models": tally.models,
        "blocks": tally.expected,
        "fused": tally.fused,
        "fused_and_right": tally.good,
        "fused_beyond_expected": tally.extra,
        "wrong": tally.wrong,
        "not_run": tally.not_run,
        "peers": {name: {"fused": t.fused, "fused_and_right": t.good, "wrong": t.wrong} for name, t in others.items()},
    }


def summary(results: list[dict], options: Options) -> dict:
    leftovers = sum(bool(result["ours"].get("leftovers")) for result in results)
    fallback = collections.Counter(r["ours"]["fallback"] for r in results if "fallback" in r["ours"])
    halves = collections.Counter(r["ours"]["fp16"]["outcome"] for r in results if "fp16" in r["ours"])
    return _counts(results, options) | {
        "leftovers": leftovers,
        "without_library": dict(fallback),
        "without_rest": sum("without_rest" in result["ours"] for result in results),
        **({"fp16": dict(halves)} if options.fp16 else {}),
    }


def record(results: list[dict], options: Options, seconds: float, folder: pathlib.Path) -> pathlib.Path:
    """Writes benchmarks/results/zoo.json: machine, versions, commit; slices, families, what was not fused. Sentences
    name files of `folder` as they lie in it."""
    families = sorted({result["family"] for result in results})
    by_family = {name: [result for result in results if result["family"] == name] for name in families}
    refused = collections.Counter(r["reason"] for result in results for r in result["ours"].get("refusals", []))
    document = environment("onnxruntime", "onnxscript", "onnx", "onnx-ir", "numpy", "faexport") | {
        "seconds": round(seconds),
        "summary": summary(results, options),
        "slices": {name: _counts(group, options) for name, group in slices(results).items()},
        "families": {
            name: _counts(group, options) | {"kinds": dict(Tally.of(group).kinds)} for name, group in by_family.items()
        },
        "refused": dict(refused.most_common()),
        "not_run": {
            r["name"]: r["ours"]["detail"].replace(f"{folder}/", "")
            for r in results
            if r["ours"]["outcome"] == "not run"
        },
    }
    return write("zoo", document, record=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=pathlib.Path, help="a folder of models: NAME/model.onnx, meta.json, inputs.npz, expected.npz"
    )
    parser.add_argument("--only", default="", help="a regular expression; only models whose name matches")
    parser.add_argument("--every", type=int, default=1, help="only every n-th model")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one model (default: %(default)s)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave the peers out")
    parser.add_argument(
        "--no-rest", dest="rest", action="store_false", help="leave what stands around attention as it is"
    )
    parser.add_argument(
        "--fp16", action="store_true", help="convert each float32 model to float16 as well, and compare"
    )
    parser.add_argument("--record", action="store_true", help="write the totals to benchmarks/results/zoo.json")
    parser.add_argument(
        "--json", type=pathlib.Path, default=pathlib.Path("build/zoo.json"), help="results (default: %(default)s)"
    )
    arguments = parser.parse_args()
    folders = find_models(arguments.folder, arguments.only)[:: arguments.every]
    if not folders:
        print(f"error: {arguments.folder}: no models (folders with model.onnx and meta.json) there", file=sys.stderr)
        return 2
    options = Options(arguments.peers, arguments.timeout, arguments.rest, arguments.fp16)
    screen = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    start = time.monotonic()
    results = examine_all(folders, options, arguments.jobs, screen)
    add_needs(results, arguments.folder / "manifest.jsonl")
    totals = summary(results, options)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"summary": totals, "results": results}, indent=1) + "\n", "utf-8")
    show_families(results, screen)
    show_proofs(results, screen)
    show_reasons(results, screen)
    show_slices(results, options.peers, screen)
    seconds = time.monotonic() - start
    files = [arguments.json, *([record(results, options, seconds, arguments.folder)] if arguments.record else [])]
    print(f"{len(results)} models in {seconds:.0f} s; results: {', '.join(map(str, files))}")
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in totals["without_library"].items())
    print(f"rewritten models in plain onnxruntime {importlib.metadata.version('onnxruntime')}: {outcomes}")
    if totals["fused_beyond_expected"]:
        print(f"{totals['fused_beyond_expected']} more sites fused than the models are said to have, not counted")
    if options.fp16:
        print(f"in float16: {', '.join(f'{count} {outcome}' for outcome, count in totals['fp16'].items())}")
    print(f"{totals['fused']} of {totals['blocks']} blocks fused ({Tally.of(results).share}), {totals['wrong']} wrong")
    bad = (totals["leftovers"], totals["without_library"].get("failed"), totals.get("fp16", {}).get("wrong"))
    return 1 if totals["wrong"] or any(bad) else 0


if __name__ == "__main__":
    sys.exit(main())
