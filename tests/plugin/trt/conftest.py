# SPDX-License-Identifier: Apache-2.0
"""Builds the conformance host once, and finds the plugin and the real TensorRT libraries."""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests import cases, packages
from tests.plugin.trt import case_file

HERE = pathlib.Path(__file__).parent
BUILD = packages.ROOT / "build" / "trt-host"
REGISTRIES = {
    "11.4": ("tensorrt-11.4", "tensorrt_dispatch_libs/libnvinfer_dispatch.so.11"),
    "10.15": ("tensorrt-10.15", "tensorrt_lean_libs/libnvinfer_lean.so.10"),
}


@pytest.fixture(scope="session")
def plugin() -> str:
    """The path of libfa_trt.so."""
    faplugin_trt = pytest.importorskip("faplugin.trt", reason="faplugin is not installed")
    try:
        return faplugin_trt.library_path()
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(f"no TensorRT plugin: {error}")


@pytest.fixture(scope="session")
def host(plugin: str) -> pathlib.Path:
    """The folder with fa_trt_host and libfa_trt_faulty.so, compiled here: where the plugin was built, they can be."""
    BUILD.mkdir(parents=True, exist_ok=True)
    tools = os.pathsep.join([os.fspath(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=tools)
    assert cmake, "cmake is not installed"
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for step in ([cmake, "-S", HERE, "-B", BUILD], [cmake, "--build", BUILD]):
            done = subprocess.run(step, capture_output=True, text=True, check=False, env={**os.environ, "PATH": tools})
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return BUILD


@pytest.fixture(scope="session")
def quick_cases(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """cases.quick() as a case file, without values."""
    path = tmp_path_factory.mktemp("cases") / "quick.cases"
    case_file.write(path, cases.quick())
    return path


def registry_library(version: str) -> pathlib.Path:
    """A real TensorRT library with a plugin registry: "11.4" or "10.15". Skips where it can't be had."""
    package, path = REGISTRIES[version]
    return packages.folder(package) / path
