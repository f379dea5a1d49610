# SPDX-License-Identifier: Apache-2.0
"""The documentation is true: its commands run as printed, its links lead somewhere, its options exist."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import onnx
import pytest
from faexport import optimize
from faexport.cli import app
from faexport.commands import bench
from faexport.commands.bench_data import Measured, Row, Timing

from tests.export import big_model
from tests.export.commands import environment, faexport
from tests.pages import ROOT, blocks

PAGES = ("README.md", "docs/faexport.md")
MARKDOWN = (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md")
ALL_PAGES = sorted(os.fspath(path.relative_to(ROOT)) for path in MARKDOWN)


def test_each_benchmark_is_in_the_list_of_benchmarks() -> None:
    page = (ROOT / "benchmarks/README.md").read_text()
    files = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", page)) == files
    results = {path.stem for path in (ROOT / "benchmarks/results").glob("*.json")}
    assert results <= set(re.findall(r"`(\w+)`", page))


@pytest.mark.parametrize("page", PAGES)
def test_commands_run_as_printed(page: str, tmp_path: pathlib.Path) -> None:
    """All `sh` blocks of a page in order, then its Python, in one folder with a model.onnx."""
    onnx.save(big_model.encoder(big_model.EncoderSize()), tmp_path / "model.onnx")
    for line in "".join(blocks(page, "sh")).splitlines():
        command = shlex.split(line, comments=True)
        assert command[0] == "faexport", line
        done = faexport(*command[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    for code in blocks(page, "python"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
    assert blocks(page, "python"), "the page shows the library too"


@pytest.mark.parametrize("page", ["docs/onnxruntime.md", "docs/operator.md", "docs/torch.md"])
def test_python_runs_as_printed(page: str, tmp_path: pathlib.Path) -> None:
    """The `python` blocks of a page, one after the other, in a folder with a fused model and inputs of it."""
    if page == "docs/torch.md":
        pytest.importorskip("torch")
    onnx.save(big_model.encoder(big_model.EncoderSize()), tmp_path / "model.onnx")
    optimize(tmp_path / "model.onnx", tmp_path / "model.fa.onnx", verify=False)
    np.savez(tmp_path / "inputs.npz", hidden_states=np.ones((2, 5, big_model.EncoderSize().hidden), np.float32))
    code = "\n".join(blocks(page, "python"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert code and done.returncode == 0, f"{code}\n{done.stderr}"


def test_the_matrix_of_versions_is_that_of_the_makefile() -> None:
    found = re.search(r"^ORT_VERSIONS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert found
    *most, last = found[1].split()
    assert f"under {', '.join(most)} and {last}." in (ROOT / "docs/onnxruntime.md").read_text()


def test_the_readme_leads_to_every_page() -> None:
    targets = set(
        re.findall(r"\]\((docs/\w[\w/-]*\.md)", (ROOT / "README.md").read_text().partition("## Documentation")[2])
    )
    assert targets == {page for page in ALL_PAGES if page.startswith("docs/")}


def anchors(page: pathlib.Path) -> set[str]:
    """What a link may name behind `#`: the headings of a page, as they are spelled in addresses."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", (ROOT / page).read_text()):
        if "://" in target:
            continue
        there = (ROOT / page).parent / target if target else ROOT / page
        assert there.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(there), f"{page}: {target}#{anchor}"


def test_tables_are_those_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme

    for name in readme.SECTIONS:
        text = (ROOT / name).read_text()
        assert readme.updated(name, text) == text, f"{name}: run python benchmarks/readme.py"


def test_bench_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `faexport bench --json` gives, by model, is what the tables are made of."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import model_pages

    def measured(milliseconds: float, memory: int | None) -> Measured:
        return Measured(Timing(milliseconds / 1e3, milliseconds / 1.1e3, milliseconds / 0.9e3, 20), memory, None)

    rows = [
        Row({"input_ids": [8, length]}, measured(theirs, 3 * 10**6), measured(ours, memory))
        for length, theirs, ours, memory in ((128, 1.0, 1.01, None), (512, 9.0, 3.0, 10**6))
    ]
    data = json.loads(json.dumps([bench._as_data(row) for row in rows]))
    model = {"title": "Model", "dtype": "float16", "padded": True, "notes": [], "picture": "bench_model.svg"}
    environment = {"gpu": "GPU", "versions": {"onnxruntime-gpu": "1"}, "commit": "abc", "date": "2026-01-01"}
    models = [model | {"rows": data, "conclusion": bench.conclusion(rows)}]
    page = model_pages.bench_tables({**environment, "exported_by": ["pytorch 2.13.0"], "models": models})
    assert "exports of PyTorch 2.13.0" in page
    assert "| 8×128 | 1 | 1.01 | 0.99 (even) | 3 | ? |" in page and "| 8×512 | 9 | 3 | 3.00 | 3 | 1 |" in page
    assert "entries of several lengths. It pays from input_ids 8x512 on" in page and "results/bench_model.svg)" in page


def test_models_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest export of each tool counts, of those that are right."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import model_pages

    def contestant(time: float, memory: float, difference: float = 1e-3) -> dict:
        return {"median_ms": time, "memory_mb": memory, "difference": difference}

    long, alone = (
        {"encoder": "long_range", "row": f"{title} b1 s4096", "dtype": "float16", "batch_size": 1, "length": 4096}
        for title in ("Long", "Alone")
    )
    long["failed"] = alone["failed"] = {}
    long["contestants"] = {
        "unfused, eager": contestant(8.0, 2000),
        "unfused, dynamo": contestant(9.0, 2000),
        "onnxruntime, eager": contestant(3.0, 300),
        "onnxscript, dynamo": contestant(0.5, 50, difference=0.3),
        "ours, eager": contestant(2.5, 110),
        "ours, dynamo": contestant(2.0, 100) | {"share_of_operator": 0.25},
        "compiled, sdpa": contestant(2.2, 90),
    }
    alone["compared_with"] = "dynamo float32 ours"
    alone["contestants"] = {"ours, dynamo": contestant(1.0, 10)}
    environment = {"gpu": "GPU", "versions": {"onnxruntime-gpu": "1"}, "commit": "abc", "date": "2026-01-01"}
    gains = model_pages.gains_table({**environment, "rows": [long, alone]})
    assert "| Long 1 × 4096 | 8.00 | 3.00 | 2.00 | 4.0 | 2000 → 100 |" in gains and "Alone" not in gains
    lines = model_pages.models_tables({**environment, "rows": [long, alone]}).splitlines()
    numbers = "2.000 | 3.000 | – | 8.000 | 2.200 | 4.00 | 1.50 | 25% | 2000 | 100 | 1e-03 | 1e-03"
    assert f"| Long 1 × 4096 | {numbers} |" in lines
    assert "| Alone 1 × 4096 | 1.000 | – | – | – | – | – | – | – | – | 10 | – | 1e-03 |" in lines
    assert "No float32 original has the memory to run: Alone b1 s4096; compared with faexport's float32 file." in lines
    assert lines[-1].endswith("| 100 MB at 4096 (20.0 times less) |") and "4.00 at 4096" in lines[-2]


def test_models_tables_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slower, what has no row, and what was verified on CUDA (verified_sentence)."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import model_pages

    row = {"dtype": "float16", "batch_size": 1, "length": 512, "failed": {}}
    right = {"memory_mb": 10, "difference": 1e-3}
    slow = row | {"encoder": "bert_large", "row": "Slow b1 s512", "contestants": {}, "commit": "def"}
    slow["contestants"]["unfused, eager"] = right | {"median_ms": 1.0}
    slow["contestants"]["ours, dynamo"] = right | {"median_ms": 1.25, "share_of_operator": 0.2}
    broken = row | {"encoder": "flux", "row": "Broken b1 s512", "contestants": {}, "failed": {"all": "no memory"}}
    environment = {"gpu": "GPU", "versions": {"onnxruntime-gpu": "1"}, "commit": "abc", "date": "2026-01-01"}
    page = model_pages.models_tables({**environment, "rows": [slow, broken]})
    assert "commit abc (Slow at def), " in page
    assert "slower: Slow b1 s512, where attention takes 20% of the time (free, it would bring 1.25)." in page
    assert "Not in the table: Broken b1 s512 (no memory)." in page
    assert "| Broken" not in page and "Mistral 7B | 0.80 (Slow b1 s512) |" in page
    models = {
        "bert_large dynamo": {"status": "passed", "settings": 9, "operators_as_timed": True},
        "bert_large eager": {"status": "unfinished after 9 s"},
    }
    verified = "1 of 2 exports pass, in 9 settings; 1 have the fused operators of the timed file"
    said = model_pages.verified_sentence({**environment, "models": models})
    assert said.endswith(f"{verified}; not: bert_large eager (unfinished after 9 s).")
    models["bert_large eager"]["status"] = model_pages.NO_TIME
    said = model_pages.verified_sentence({**environment, "models": models})
    assert said.endswith(f"{verified}; of the other 1 none was run, since time was up.")


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in ALL_PAGES:
        for target in re.findall(r"`?\bmake ([a-z-]+)(?=`|\s+#|$)", (ROOT / page).read_text(), re.M):
            assert target in targets, f"{page}: make {target}"


def test_every_option_is_described() -> None:
    page = (ROOT / "docs/faexport.md").read_text()
    for command in app.commands:
        assert f"`faexport {command}" in page or command == "fuse", command
    for parameter in app.commands["fuse"].params:
        if parameter.name not in ("model", "help"):
            names = [*parameter.opts, *parameter.secondary_opts]
            assert any(f"`{name}" in page for name in names), f"docs/faexport.md does not describe {names}"


def test_exit_codes_are_those_of_the_program() -> None:
    from faexport.commands import terminal

    page = (ROOT / "docs/faexport.md").read_text()
    rows = dict(re.findall(r"^\| (\d) \| ([^|]+?) \|$", page, re.M))
    codes = (terminal.EXIT_NOT_VERIFIED, terminal.EXIT_BAD_INPUT, terminal.EXIT_INTERNAL_ERROR, terminal.EXIT_STRICT)
    for code, word in zip(codes, ("could not be compared", "bad input", "defect", "--strict"), strict=True):
        assert word in rows[str(code)]
