# SPDX-License-Identifier: Apache-2.0
"""Linking for Linux systems older than this one: a folder that stands in for the C library at link time.

The compiler of this machine compiles as always. But a library linked against this machine's glibc asks for the newest
versions of its functions and loads nowhere else. So it is linked against an older glibc's list of functions, which the
package ziglang has for every version and architecture, with the C++ standard library inside. This works for any
compiler that links by ld, those behind nvcc and cross compilers included.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

GLIBC = "2.28"
LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
# A variable of glibc 2.32 which headers and libstdc++ of today read; 0 says that there may be threads: always right.
NEWER_SYMBOLS = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'


def linker_flags(folder: pathlib.Path, machine: str, compiler: str) -> str:
    """What a link needs to depend on nothing newer than glibc 2.28; makes the folder where it isn't there.

    Args:
        folder: for the stand-ins.
        machine: "x86_64" or "aarch64".
        compiler: a C compiler for that machine.
    """
    if not (folder / "libc.so").exists():
        _make(folder, machine, compiler)
    return f"-L{folder} -static-libstdc++ -shared-libgcc"


def _make(folder: pathlib.Path, machine: str, compiler: str) -> None:
    """zig makes its stand-ins when it links a library, and leaves them in its cache."""
    folder.mkdir(parents=True, exist_ok=True)
    cache, source = folder / "zig", folder / "newer.c"
    source.write_text(NEWER_SYMBOLS)
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{GLIBC}"]
    link = ["-shared", os.fspath(source), "-o", os.fspath(folder / "unused.so")]
    variables = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": os.fspath(cache), "ZIG_LOCAL_CACHE_DIR": os.fspath(cache)}
    subprocess.run([*zig, *link], env=variables, check=True)
    (libc,) = cache.glob("o/*/libc.so.6")
    for library in libc.parent.glob("lib*.so.*"):
        shutil.copy(library, folder)
    (folder / "libld.so.2").rename(folder / LOADERS[machine])
    subprocess.run([compiler, "-fPIC", "-c", source, "-o", folder / "newer.o"], check=True)
    for path in folder.glob("lib*.so.*"):
        name = path.name.partition(".so")[0]
        if name != "libc":
            (folder / f"{name}.so").symlink_to(path.name)
    shutil.rmtree(cache)
    # Every link ends with -lc, so what stands here is found after the C++ library, which needs it.
    needed = f"libpthread.so.0 libdl.so.2 librt.so.1 {LOADERS[machine]}"
    find = [compiler, "-print-file-name=libc_nonshared.a"]  # the functions that every library has a copy of
    static = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    (folder / "libc.so").write_text(f"INPUT ( libc.so.6 {static} newer.o AS_NEEDED ( {needed} ) )\n")
