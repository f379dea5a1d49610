# SPDX-License-Identifier: Apache-2.0
"""How wheels are made of the one project, without compiling: `make test-wheels` looks at whole ones."""

from __future__ import annotations

import os
import pathlib
import platform
import re
import subprocess
import sys
import tomllib
import types
import zipfile
from email import message_from_string

import pytest

from tests.pages import ROOT

MACHINE = platform.machine()
URL = "https://example.org/faexport"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module wheels/build.py."""
    monkeypatch.syspath_prepend(ROOT / "wheels")
    monkeypatch.delitem(sys.modules, "build", raising=False)
    import build

    return build


def fake_nvcc(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = folder / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.86'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", os.fspath(folder))


def test_the_gpus_wheel_is_named_by_its_cuda(
    build: types.ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvcc(tmp_path, monkeypatch)
    assert [(name, cuda) for name, _, cuda in build.plan(PROJECT, "AUTO", MACHINE)] == [
        ("faexport", ""),
        ("faplugin", "OFF"),
        ("faplugin-cu12", "ON"),
    ]
    assert "CUDA 12" in build.plan(PROJECT, "ON", MACHINE)[2][1]
    assert [name for name, _, _ in build.plan(PROJECT, "OFF", MACHINE)] == ["faexport", "faplugin"]
    assert len(build.plan(PROJECT, "AUTO", "another")) == 2


def test_without_nvcc_there_is_no_gpus_wheel(
    build: types.ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert len(build.plan(PROJECT, "AUTO", MACHINE)) == 2
    assert "The GPUs' wheel is left out: no nvcc" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no nvcc on this machine"):
        build.plan(PROJECT, "ON", MACHINE)


def test_links_of_the_readme(build: types.ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    absolute = build.with_absolute_links(text, URL)
    links = re.findall(r"\]\(([^)]+)\)", absolute)
    assert len(links) == len(re.findall(r"\]\(([^)]+)\)", text)) > 5
    assert all(link.startswith(f"{URL}/") for link in links)
    assert f"![Speed against length, head_dim 128]({URL}/raw/main/benchmarks/results/attention_d128.png)" in absolute
    assert f"[operator]({URL}/blob/main/docs/operator.md)" in absolute
    assert "](" not in build.with_absolute_links(text, "")


def test_metadata_of_plugins(build: types.ModuleType) -> None:
    gpu = build.metadata(PROJECT, "faplugin-cu13", "text", URL)
    assert (gpu["name"], gpu["version"]) == ("faplugin-cu13", PROJECT["version"])
    assert [re.match(r"\w+", x)[0] for x in gpu["dependencies"]] == ["numpy"]
    assert "Environment :: GPU :: NVIDIA CUDA" in gpu["classifiers"] and "scripts" not in gpu
    assert gpu["urls"]["Homepage"] == URL
    assert "Environment :: GPU :: NVIDIA CUDA" not in build.metadata(PROJECT, "faplugin", "text", "")["classifiers"]


def test_the_tools_wheel(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, ROOT / "wheels" / "build.py", "--cuda", "OFF", "--only", "faexport", "--into", tmp_path]
    subprocess.run([*command, "--url", URL], check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    assert wheel.name == f"faexport-{PROJECT['version']}-py3-none-any.whl"
    assert wheel.stat().st_size < 1e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        told = message_from_string(archive.read(next(x for x in names if x.endswith("/METADATA"))).decode())
    assert {name.partition("/")[0] for name in names} == {"faexport", f"faexport-{PROJECT['version']}.dist-info"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".so")]
    modules = [path for path in (ROOT / "export/faexport").rglob("*") if path.suffix in (".py", ".def")]
    assert {os.fspath(path.relative_to(ROOT / "export")) for path in modules} <= set(names)
    assert "Homepage, https://example.org/faexport" in told.get_all("Project-URL")
    assert {"ort", "gpu", "trt", "bench"} == set(told.get_all("Provides-Extra"))


def test_what_to_install_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from faexport.errors import ModelError
    from faexport.runtimes import operator_library

    monkeypatch.setitem(sys.modules, "faplugin", None)  # as where it is not installed
    sentence = "install the wheel faplugin-….whl for the CPU, or faplugin_cu13-….whl for NVIDIA GPUs"
    with pytest.raises(ModelError, match=sentence):
        operator_library.path()
