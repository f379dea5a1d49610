# SPDX-License-Identifier: Apache-2.0
"""Puts TensorRT 10.14's public headers (Apache-2.0) into a folder. Called by FindTensorRT.cmake.

No wheel of TensorRT's carries them; the pure Python package named below does. pip's settings say where from.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "kernel-lens==2.0.1"
PREFIX = "kernel_lens/include/tensorrt/"


def fetch(folder: pathlib.Path) -> None:
    if (folder / "NvInferRuntime.h").exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        # -I: inside pip's own build isolation the environment hides pip
        pip = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", scratch, PACKAGE], check=True)
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        unpacked = pathlib.Path(scratch) / "headers"
        unpacked.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(PREFIX) and name.endswith(".h"):
                    (unpacked / pathlib.PurePosixPath(name).name).write_bytes(archive.read(name))
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(unpacked, folder, dirs_exist_ok=True)


if __name__ == "__main__":
    try:
        fetch(pathlib.Path(sys.argv[1]))
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        sys.exit(f"TensorRT's headers can't be fetched: {error}. Set TensorRT_ROOT to an SDK, or pass -DFA_TRT=OFF.")
