# SPDX-License-Identifier: Apache-2.0
"""The wheels in dist/, as a user gets them: `make test-wheels`, after `make wheels`.

twine looks at their metadata, auditwheel at what they need of a system. Then each plugin for this machine is installed
with the tool and onnxruntime into a fresh environment of each Python, where no compiler can be found, and there the
README's commands run.
"""

from __future__ import annotations

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

import onnx

from tests.export import big_model
from tests.pages import ROOT, blocks

DIST = ROOT / "dist"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MAX_MEGABYTES = {"faexport": 1, "faplugin": 5, "faplugin_cu": 45}
TAG = r"py3-none-(any|manylinux_2_(?P<glibc>\d+)_(?P<machine>\w+))"
WHEEL = re.compile(rf"(?P<name>faexport|faplugin(_cu\d+)?)-[^-]+-{TAG}\.whl")
NEWEST_GLIBC = 28
COMPUTE = """
import faplugin, numpy as np
q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 5, 16), np.float32)
scores = np.exp(q @ k.swapaxes(-1, -2) / 4)
expected = scores / scores.sum(-1, keepdims=True) @ v
print(faplugin.__version__, np.abs(faplugin.attention(q, k, v) - expected).max() < 1e-5)
"""


def run(*command: str | os.PathLike, **options) -> str:
    """The output; ends the program where the command fails."""
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(os.fspath, command))}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def check_files(wheels: list[pathlib.Path]) -> None:
    print(run(sys.executable, "-m", "twine", "check", "--strict", *wheels), end="")
    for wheel in wheels:
        found = WHEEL.fullmatch(wheel.name)
        if not found or int(found["glibc"] or 0) > NEWEST_GLIBC:
            sys.exit(f"{wheel.name}: is not for every Python 3 and every Linux since glibc 2.{NEWEST_GLIBC}")
        megabytes = wheel.stat().st_size / 1e6
        limit = MAX_MEGABYTES[re.sub(r"\d+$", "", found["name"])]
        if megabytes > limit:
            sys.exit(f"{wheel.name}: {megabytes:.1f} MB; allowed are {limit}")
        needs = "pure Python"
        if found["machine"]:
            told = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel).split())
            policy = re.search(r'consistent with the following platform tag: "manylinux_2_(\d+)_', told)
            if not policy or int(policy[1]) > NEWEST_GLIBC:
                sys.exit(f"{wheel.name}: {told}")
            needs = f"runs since glibc 2.{policy[1]}"
        print(f"{wheel.name}: {megabytes:.2f} MB, {needs}")


def interpreters() -> list[str]:
    """One Python of each version that is found, in PATH or among those of pyenv."""
    found: dict[str, str] = {}
    for version in PYTHONS:
        pyenv = pathlib.Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
        for place in filter(None, (shutil.which(f"python{version}"), *pyenv)):
            asked = [place, "-c", "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"]
            told = subprocess.run(asked, capture_output=True, text=True, check=False)  # pyenv has stand-ins that fail
            if told.stdout.strip() == version:
                found.setdefault(version, os.fspath(place))
    return list(found.values())


def check_installed(python: str, wheels: list[pathlib.Path], folder: pathlib.Path) -> None:
    """Installs, first without the plugin, and runs the README's commands in `folder`."""
    run(python, "-m", "venv", folder / "venv")
    own = folder / "venv" / "bin" / "python"
    # The environment's programs and nothing else: no compiler, no CMake.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FAPLUGIN", "VIRTUAL"))}
    alone = kept | {"PATH": os.fspath(own.parent)}
    pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    tool = [wheel for wheel in wheels if wheel.name.startswith("faexport")]
    run(*pip, *tool, "onnxruntime", env=alone, cwd=folder)
    onnx.save(big_model.encoder(big_model.EncoderSize()), folder / "model.onnx")
    bench = [own, "-m", "faexport", "bench", "model.onnx"]
    told = subprocess.run(bench, env=alone, cwd=folder, capture_output=True, text=True, check=False).stderr
    if "install the wheel faplugin" not in told:
        sys.exit(f"without the plugin, faexport bench says: {told}")
    run(*pip, *(wheel for wheel in wheels if wheel not in tool), env=alone, cwd=folder)
    version, same = run(own, "-c", COMPUTE, env=alone, cwd=folder).split()
    if same != "True":
        sys.exit("faplugin.attention computes something else than attention")
    commands = "".join(blocks("README.md", "sh")).splitlines()
    for command in commands:
        run("/bin/sh", "-c", command, env=alone, cwd=folder)
    for code in blocks("README.md", "python"):
        run(own, "-c", code, env=alone, cwd=folder)
    told = run(own, "--version").strip()
    print(f"{told}: {', '.join(w.name for w in wheels)}: {len(commands)} commands of the README, version {version}")


def main() -> None:
    wheels = sorted(DIST.glob("*.whl"))
    tool = [wheel for wheel in wheels if wheel.name.startswith("faexport-")]
    plugins = [wheel for wheel in wheels if wheel not in tool and wheel.name.endswith(f"{platform.machine()}.whl")]
    if not tool or not plugins:
        sys.exit("no wheels of faexport and faplugin in dist: run make wheels")
    check_files(wheels)
    found = interpreters()
    for python in found:
        for plugin in plugins:
            with tempfile.TemporaryDirectory() as folder:
                check_installed(python, [*tool, plugin], pathlib.Path(folder))
    if len(found) < 2:
        sys.exit(f"only {found} was found; two versions of Python are needed")


if __name__ == "__main__":
    main()
