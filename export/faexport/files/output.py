# SPDX-License-Identifier: Apache-2.0
"""Where results go: which paths are refused before any work is done, and how a single file is written.

Called by model_io.py and the commands. A regular file is written beside its place and moved there, a
symbolic link is followed, and a device or a pipe is written through or refused: none of them is ever replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from faexport.errors import ModelError
from faexport.files import scratch
from faexport.files.signals import uninterrupted

PathLike = str | os.PathLike[str]
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
SUFFIX, OWN_SUFFIX = ".onnx", ".fa.onnx"  # of models, and of those that are written where nothing else is said


def check_output(path: pathlib.Path, inputs: Iterable[PathLike], option: str = "-o", streams: bool = False) -> None:
    """Raises ModelError where `path`, which `option` chooses, can't be written or is one of `inputs`.

    `streams`: devices and pipes are allowed, as write_file() writes through them.
    """
    elsewhere = f"choose another place with {option}"
    if path.name == "-":
        raise ModelError(f"{path}: is no name of a file; {elsewhere}")
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        kind = None
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror}; {elsewhere}") from error
    if kind is not None and stat.S_ISDIR(kind):
        raise ModelError(f"{path}: is a folder; give the name of a file with {option}")
    if kind is not None and not stat.S_ISREG(kind):
        if streams and not stat.S_ISBLK(kind):
            return
        raise ModelError(f"{path}: is {_kind_name(kind)}, not a place for a file; {elsewhere}")
    place = final_path(path)
    if not place.parent.is_dir():
        raise ModelError(f"{path}: the folder {place.parent} does not exist; create it or {elsewhere}")
    if any(_same_file(path, name) for name in inputs):
        raise ModelError(f"{path}: would overwrite the input; choose another name with {option}")
    if kind is not None and _is_own_stream(path):
        raise ModelError(f"{path}: is where this command prints; {elsewhere}")
    if why := closed(place.parent, os.W_OK | os.X_OK) or (closed(path, os.W_OK) if kind is not None else ""):
        raise ModelError(f"{path}: cannot be written: {why}; {elsewhere}")


def closed(path: pathlib.Path, access: int) -> str:
    """Why this process has no such access (os.access) to what is there, as part of a sentence, or ""."""
    if os.access(path, access):
        return ""
    with contextlib.suppress(OSError):
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            return "the file system is read-only"
    return "no permission"


# What the files of an option that writes a report begin with. Such a file may be written again, no other one.
_REPORT_STARTS = {"--report": (b"{",), "--html": (b"<!doctype html>",), "--svg": (b"<svg ",)}


def check_report(
    path: pathlib.Path | None, models: Iterable[PathLike], option: str, targets: Iterable[pathlib.Path] = ()
) -> None:
    """Before anything is done: the report that `option` names can be written, and over nothing but an older one.

    Raises ModelError. `models` are read, and `targets` will be written.
    """
    if path is None:
        return
    check_output(path, models, option, streams=True)
    if any(final_path(path) == final_path(target) for target in targets):
        raise ModelError(f"{path}: is where the model will be written; choose another name with {option}")
    if path.is_file():
        starts = _REPORT_STARTS[option]
        with path.open("rb") as file:
            begin = file.read(max(map(len, starts)))
        if begin and not begin.startswith(starts):
            raise ModelError(f"{path}: is there already and is not a report; choose another name with {option}")


def check_input(path: pathlib.Path, advice: str = "check the path") -> None:
    """Raises ModelError where `path` is no regular file that can be read. A file is read more than once, so a pipe
    won't do, and some devices never end. So it is by other processes, which have other files open."""
    if str(path).startswith(("/dev/stdin", "/dev/fd/", "/proc/")):
        raise ModelError(f"{path}: is another file in each process, and several read the model; give the file's name")
    try:
        kind = path.stat().st_mode
        if stat.S_ISREG(kind):
            with path.open("rb"):
                return
    except FileNotFoundError as error:
        if str(path) == "-":
            raise ModelError(
                f"{path}: a model is read more than once, so not from stdin; give a file's name"
            ) from error
        if re.match(r"\w+:/", str(path)):
            advice = "an address isn't read, so download the file first"
        raise ModelError(f"{path}: no such file; {advice}") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}; {advice}") from error
    raise ModelError(f"{path}: is {_kind_name(kind)}; give the name of a file")


def is_model_name(path: PathLike, suffix: str = SUFFIX) -> bool:
    """Is a file of this name a model? Some are named in capitals."""
    return os.fspath(path).lower().endswith(suffix)


def model_stem(model: pathlib.Path) -> str:
    """Its name, without the suffix of models."""
    return model.name[: -len(SUFFIX)] if is_model_name(model) else model.name


def default_target(model: pathlib.Path) -> pathlib.Path:
    """model.onnx -> model.fa.onnx, beside it."""
    return model.with_name(f"{model_stem(model)}{OWN_SUFFIX}")


def final_path(path: pathlib.Path) -> pathlib.Path:
    """Where a file written to `path` comes to lie: the end of its symbolic links. Raises ModelError."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, up to Python 3.12
        raise ModelError(f"{path}: its symbolic links lead nowhere; choose another place") from error


def write_file(path: pathlib.Path, content: Any) -> None:
    """Writes a buffer: never half a file. Devices and pipes are written through. Raises ModelError."""
    with writing(path):
        if path.exists() and not path.is_file():
            _write_through(path, content)
            return
        place = final_path(path)
        with scratch.folder(place.parent) as folder:
            partial = folder / place.name
            partial.write_bytes(content)
            with uninterrupted():
                partial.replace(place)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Makes an OSError of the body a ModelError that says what to do."""
    try:
        yield
    except OSError as error:
        advice = "free some space" if error.errno in FULL_DISK else "choose another place"
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}; {advice}") from error


def _write_through(path: pathlib.Path, content: Any) -> None:
    """Opens without waiting: a pipe that nobody reads is an error at once, not a program that hangs."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise ModelError(f"{path}: nobody reads this pipe; start its reader first") from error
    os.set_blocking(file, True)
    with open(file, "wb") as stream:
        stream.write(content)


def _kind_name(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for test, name in kinds if test(mode)), "no file")


def _same_file(a: PathLike, b: PathLike) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def _is_own_stream(path: pathlib.Path) -> bool:
    """Is the file this process's stdout or stderr (say /dev/stdout of a command whose output goes to a file)?"""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is None:
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                return True
    return False
