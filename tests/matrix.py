# SPDX-License-Identifier: Apache-2.0
"""The library under several versions of onnxruntime, each in a virtual environment of its own: `make test-matrix`.

One compiled library serves all. In each environment tests/plugin runs, the stand-in functions without the library, and
the demo's model, fused here, against its original.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tomllib

import faplugin
import rich.console
import rich.table

from tests import packages

ROOT = pathlib.Path(__file__).resolve().parents[1]
TESTS = ["tests/plugin/test_ort.py", "tests/plugin/test_ort_errors.py", "tests/plugin/test_library.py"]
FALLBACK = "tests/export/test_fallback.py"  # older versions know no functions of a model well enough
FALLBACK_SINCE = (1, 20)
MAX_DIFFERENCE = 1e-4
COMPARE = """
import sys, numpy as np, onnxruntime as ort, faplugin
options = ort.SessionOptions()
options.log_severity_level = 3
faplugin.register(options)
original, fused = (ort.InferenceSession(path, o, providers=["CPUExecutionProvider"])
                   for path, o in zip(sys.argv[1:], (ort.SessionOptions(), options)))
rng = np.random.default_rng(0)
feeds = {x.name: rng.standard_normal([d if isinstance(d, int) else 1 for d in x.shape], dtype=np.float32)
         for x in original.get_inputs()}
pairs = zip(original.run(None, feeds), fused.run(None, feeds), strict=True)
print(max(float(np.abs(a - b).max()) for a, b in pairs))
"""


def environment(version: str) -> pathlib.Path:
    """The interpreter of an environment with this onnxruntime; made on first use."""
    folder = ROOT / f".venv-ort-{version}"
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        needed = [*project["dependencies"], f"onnxruntime=={version}", "numpy<2", "ml_dtypes", "pytest", "pytest-xdist"]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *needed], check=True)
        (folder / ".ready").touch()
    return python


def fuse_demo(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The demo's model and its fused form."""
    original = packages.folder("demo") / packages.DEMO_MODEL
    fused = folder / "vit_s_focus.fa.onnx"
    command = [sys.executable, "-m", "faexport", original, "-o", fused, "--quiet", "--no-verify"]
    subprocess.run(command, check=True)
    return original, fused


def check_version(version: str, models: tuple[pathlib.Path, pathlib.Path]) -> tuple[bool, str, str]:
    """(all is well, pytest's last line, difference of the demo's outputs)."""
    python = environment(version)
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "export", ROOT / "plugin", ROOT))),
        "FAPLUGIN_LIBRARY_DIR": os.environ.get("FAPLUGIN_LIBRARY_DIR") or os.path.dirname(faplugin.library_path()),
    }
    fallback = [FALLBACK] if tuple(map(int, version.split(".")[:2])) >= FALLBACK_SINCE else []
    run = [python, "-m", "pytest", "-q", "-n", "2", *TESTS, *fallback]
    tested = subprocess.run(run, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    compare = [python, "-c", COMPARE, *models]
    compared = subprocess.run(compare, env=variables, capture_output=True, text=True, check=False)
    for done in (tested, compared):
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
    difference = float(compared.stdout) if compared.returncode == 0 else float("nan")
    good = tested.returncode == 0 and difference <= MAX_DIFFERENCE
    return good, tested.stdout.strip().rpartition("\n")[2], f"{difference:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="+", help="of onnxruntime, 1.18 or later")
    arguments = parser.parse_args()
    folder = ROOT / "build" / "matrix"
    folder.mkdir(parents=True, exist_ok=True)
    models = fuse_demo(folder)
    table = rich.table.Table("onnxruntime", "tests of the operator", "demo: largest difference", "")
    results = {version: check_version(version, models) for version in arguments.versions}
    for version, (good, tests, difference) in results.items():
        table.add_row(version, tests, difference, "[green]ok[/]" if good else "[red]FAILED[/]")
    rich.console.Console().print(table)
    sys.exit(0 if all(good for good, *_ in results.values()) else 1)


if __name__ == "__main__":
    main()
