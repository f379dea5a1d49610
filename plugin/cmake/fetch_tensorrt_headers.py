# SPDX-License-Identifier: Apache-2.0
"""Puts TensorRT 10.14's public headers (Apache-2.0) into a folder. Called by FindTensorRT.cmake.

No wheel of TensorRT's carries them; the pure Python package named below does. pip's settings say where from. What is
compiled here comes from somebody else, so pip takes the very file that was looked at, and no other.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "kernel-lens==2.0.1 --hash=sha256:07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
PREFIX = "kernel_lens/include/tensorrt/"


def fetch(folder: pathlib.Path) -> None:
    if (folder / "NvInferRuntime.h").exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        requirements = pathlib.Path(scratch) / "requirements.txt"  # pip takes a hash from a file alone
        requirements.write_text(PACKAGE)
        # -I: inside pip's own build isolation the environment hides pip
        pip = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", scratch, "--requirement", str(requirements)], check=True)
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
