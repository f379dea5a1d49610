# SPDX-License-Identifier: Apache-2.0
"""libfa_trt.so as a file: what it exports and needs; its registration from Python in real registries of TensorRT."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

from tests import packages
from tests.plugin.trt.test_parser import MODULES

SPEC = pathlib.Path(packages.ROOT / "csrc/include/fa/attributes.def")


def symbols(plugin: str, *options: str) -> set[str]:
    done = subprocess.run(["nm", "-D", *options, plugin], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}


def test_exactly_the_two_entry_points_are_exported(plugin):
    assert symbols(plugin, "--defined-only") == {"getCreators", "setLoggerFinder"}


def test_nothing_of_tensorrt_or_cuda_is_needed(plugin):
    undefined = symbols(plugin, "--undefined-only")
    assert not [name for name in undefined if re.search(r"nvinfer|PluginRegistry|getLogger|^cu[A-Z]|^cuda", name)]
    needed = subprocess.run(["readelf", "-d", plugin], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"\(NEEDED\).*\[(.+)\]", needed)
    assert all(re.match(r"lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so|ld-linux", name) for name in libraries), libraries


def child(version: str, script: str) -> subprocess.CompletedProcess[str]:
    environment = packages.python_with(f"tensorrt-{version}")
    command = [sys.executable, "-c", f"import {MODULES[version]} as trt, faplugin.trt\n{script}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("version", MODULES)
def test_register_twice(plugin, version):
    done = child(version, "faplugin.trt.register(trt); faplugin.trt.register(trt); print(trt.__version__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(version)


@pytest.mark.parametrize("version", MODULES)
def test_the_creator_lists_every_attribute(plugin, version):
    script = "faplugin.trt.register(trt); c = trt.get_plugin_registry().get_creator('FlashAttention', '1', '')\n"
    done = child(version, script + "print(*[f.name for f in c.field_names])")
    assert done.stdout.split() == re.findall(r"^FA_ATTRIBUTE\(\w+, (\w+),", SPEC.read_text(), re.MULTILINE)


def test_register_without_tensorrt(plugin):
    done = child("11.4", "faplugin.trt.register()")
    assert "ImportError: TensorRT can't be imported" in done.stderr
    assert "pip install tensorrt" in done.stderr


def test_register_in_a_wrong_major_version(plugin):
    done = child("11.4", "trt.__version__ = '8.6.1'; faplugin.trt.register(trt)")
    assert "is version 8.6.1; the plugin is for TensorRT 10 and 11" in done.stderr


def test_register_where_the_library_is_missing(plugin, tmp_path, monkeypatch):
    monkeypatch.setenv("FAPLUGIN_LIBRARY_DIR", str(tmp_path))
    done = child("11.4", "faplugin.trt.register(trt)")
    assert "FileNotFoundError: libfa_trt.so is not in" in done.stderr


def test_loading_the_library_after_registration_is_refused_by_tensorrt_not_fatal(plugin):
    script = "faplugin.trt.register(trt); print(trt.get_plugin_registry().load_library(faplugin.trt.library_path()))"
    done = child("11.4", script)
    assert done.returncode == 0 and done.stdout.strip() == "None"
