# SPDX-License-Identifier: Apache-2.0
"""Builds fa_csrc (CMakeLists.txt here) once and again only where sources changed."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
from types import ModuleType

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g"


def tool(name: str) -> str:
    """A build tool, from this Python's environment or the system."""
    beside = pathlib.Path(sys.executable).with_name(name)
    return os.fspath(beside) if beside.exists() else shutil.which(name) or name


def build(folder: pathlib.Path, *options: str) -> pathlib.Path:
    """Configures and compiles into `folder`; the module's path. Processes of pytest-xdist wait for one another."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"] if shutil.which(tool("ninja")) else []
        configure = [tool("cmake"), "-S", HERE, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *ninja, *options]
        for command in (configure, [tool("cmake"), "--build", folder, "--parallel", "2"]):
            done = subprocess.run(list(map(os.fspath, command)), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(folder.glob("fa_csrc*.so"))


def load(path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fa_csrc", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def module_path() -> pathlib.Path:
    return build(ROOT / "build" / "tests-csrc", "-DCMAKE_BUILD_TYPE=Release")


@pytest.fixture(scope="session")
def fa_csrc(module_path: pathlib.Path) -> ModuleType:
    """The compiled module; see bindings.cpp."""
    return load(module_path)
