# SPDX-License-Identifier: Apache-2.0
"""Builds the wheels into dist/: `make wheels`.

    faexport          the tool, pure Python
    faplugin          the operator for the CPU
    faplugin-cu13     the operator for NVIDIA GPUs and the CPU, with the TensorRT plugin: where nvcc is, whose major
                      version is in the name

The two plugins hold the same Python package, so only one of them can be installed. Version, dependencies and texts are
those of pyproject.toml, which installs all from a checkout: of each wheel a project is written to build/wheels.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from typing import Any

import tomli_w
from old_glibc import GLIBC, linker_flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAGE = ROOT / "build" / "wheels"
TOOL = "faexport"
SHARED = ("version", "license", "license-files", "requires-python", "readme", "keywords")
RUNTIME_EXTRAS = ("ort", "gpu", "trt", "bench")
CPU_PLUGIN = "FlashAttention for ONNX Runtime and Python arrays on the CPU: what models rewritten by faexport run on"
GPU_PLUGIN = "FlashAttention for ONNX Runtime, TensorRT and Python arrays, on NVIDIA GPUs (CUDA {cuda}) and the CPU"
COMPILERS = {"x86_64": ("gcc", "g++"), "aarch64": ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["AUTO", "ON", "OFF"]
    parser.add_argument("--cuda", choices=choices, default="AUTO", help="build the GPUs' wheel; AUTO: where nvcc is")
    parser.add_argument("--machine", choices=COMPILERS, default=platform.machine(), help="whose plugins are built")
    parser.add_argument("--url", default="", help="of the project's page, for links in the description")
    parser.add_argument("--only", default="", metavar="NAME", help="build this wheel alone")
    parser.add_argument("--into", type=pathlib.Path, default=ROOT / "dist", metavar="DIR", help="default: dist")
    arguments = parser.parse_args()
    checkout = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    project = checkout["project"]
    for name, text, cuda in plan(project, arguments.cuda, arguments.machine):
        if arguments.only in ("", name):
            print(f"building {name}", flush=True)
            folder = stage(checkout, name, text, arguments.machine, arguments.url)
            wheel = _build(folder, cuda, arguments.machine, arguments.into)
            print(f"{wheel}  {wheel.stat().st_size / 1e6:.2f} MB", flush=True)


def plan(project: dict[str, Any], cuda: str, machine: str) -> list[tuple[str, str, str]]:
    """Name, description and FA_CUDA of each wheel; FA_CUDA is empty where nothing is compiled."""
    wheels = [(TOOL, project["description"], ""), ("faplugin", CPU_PLUGIN, "OFF")]
    nvcc = shutil.which("nvcc")
    if cuda == "ON" and not nvcc:
        sys.exit("error: no nvcc on this machine, so the GPUs' wheel can't be built: install NVIDIA's CUDA toolkit")
    reason = ""
    if cuda == "OFF":
        reason = "FA_CUDA=OFF"
    elif machine != platform.machine():
        reason = f"nvcc does not compile for {machine} here"
    if reason or not nvcc:
        print(f"The GPUs' wheel is left out: {reason or 'no nvcc on this machine'}.")
        return wheels
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major = re.search(r"release (\d+)\.", told)
    if not major:
        sys.exit(f"error: {nvcc} --version tells no release:\n{told}")
    return [*wheels, (f"faplugin-cu{major[1]}", GPU_PLUGIN.format(cuda=major[1]), "ON")]


def stage(checkout: dict[str, Any], name: str, text: str, machine: str, url: str) -> pathlib.Path:
    """The folder of one wheel's project, which compiles in it. `checkout`: what is in pyproject.toml."""
    folder = STAGE / f"{name}-{machine}"
    folder.mkdir(parents=True, exist_ok=True)
    is_tool = name == TOOL
    wheel = {
        "packages": [f"export/{TOOL}" if is_tool else "plugin/faplugin"],
        "exclude": ["**/__pycache__", "**.pyc"],
        "cmake": not is_tool,
        **({} if is_tool else {"py-api": "py3"}),
    }
    file = {
        "build-system": checkout["build-system"],
        "project": metadata(checkout["project"], name, text, url),
        "tool": {"scikit-build": {"wheel": wheel, "build-dir": "cmake"}},
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(file), "utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    (folder / "README.md").write_text(with_absolute_links(readme, url), "utf-8")
    for linked in ("LICENSE", "CMakeLists.txt", "csrc", "export", "plugin"):
        (folder / linked).unlink(missing_ok=True)
        (folder / linked).symlink_to(ROOT / linked)
    return folder


def metadata(project: dict[str, Any], name: str, text: str, url: str) -> dict[str, Any]:
    """The table [project] of a wheel, made from that of the checkout."""
    own = {"name": name, "description": text} | {key: project[key] for key in SHARED}
    if url:
        own["urls"] = {"Homepage": url, "Changelog": f"{url}/blob/main/CHANGELOG.md"}
    if name == TOOL:
        extras = project["optional-dependencies"]
        return own | {
            "classifiers": [x for x in project["classifiers"] if x != "Programming Language :: C++"],
            "dependencies": project["dependencies"],
            "optional-dependencies": {key: extras[key] for key in RUNTIME_EXTRAS},
            "scripts": project["scripts"],
        }
    gpu = [] if name == "faplugin" else ["Environment :: GPU :: NVIDIA CUDA"]
    numpy = [x for x in project["dependencies"] if x.startswith("numpy")]
    return own | {"classifiers": [*project["classifiers"], *gpu], "dependencies": numpy}


def with_absolute_links(text: str, url: str) -> str:
    """Relative links lead nowhere on a package's page: they get the project's address; without one, text."""
    link = re.compile(r"(!?)\[([^]]*)\]\((?![a-z]+:|#)([^)]+)\)")
    if not url:
        return link.sub(lambda found: "" if found[1] else found[2], text)
    kinds = {"!": "raw", "": "blob"}
    return link.sub(lambda found: f"{found[1]}[{found[2]}]({url}/{kinds[found[1]]}/main/{found[3]})", text)


def _build(folder: pathlib.Path, cuda: str, machine: str, into: pathlib.Path) -> pathlib.Path:
    """The wheel, in place of an older one. `cuda` is empty where nothing is compiled."""
    made = folder / "dist"
    shutil.rmtree(made, ignore_errors=True)
    variables = dict(os.environ)
    if machine != platform.machine():
        variables["_PYTHON_HOST_PLATFORM"] = f"linux-{machine}"
    defined = _definitions(cuda, machine) if cuda else {}
    settings = [f"--config-settings=cmake.define.{key}={value}" for key, value in defined.items()]
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", made, *settings, folder], env=variables, check=True)
    (wheel,) = made.glob("*.whl")
    name, suffix = wheel.name.partition("-")[0], machine if cuda else "any"
    into.mkdir(parents=True, exist_ok=True)
    for older in into.glob(f"{name}-*{suffix}.whl"):
        older.unlink()
    if not cuda:
        return pathlib.Path(shutil.copy(wheel, into))
    # The oldest tag that is true; auditwheel takes others only for the machine that it runs on.
    repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--only-plat", "--wheel-dir", into, wheel]
    subprocess.run(repair, env=variables, check=True)
    (repaired,) = into.glob(f"{name}-*{suffix}.whl")
    return repaired


def _definitions(cuda: str, machine: str) -> dict[str, Any]:
    """CMake's, for libraries that run on systems as old as the wheel's tag says."""
    compiler_c, compiler = COMPILERS[machine]
    definitions = {
        "FA_CUDA": cuda,
        "FA_HEADER_CACHE": ROOT / ".cache" / "headers",
        "CMAKE_MODULE_LINKER_FLAGS": linker_flags(STAGE / f"glibc-{GLIBC}-{machine}", machine, compiler_c),
        "CMAKE_CXX_COMPILER": compiler,
    }
    if machine != platform.machine():
        definitions |= {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": machine}
    return definitions


if __name__ == "__main__":
    main()
