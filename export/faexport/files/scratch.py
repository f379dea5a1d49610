# SPDX-License-Identifier: Apache-2.0
"""Temporary folders, and the removal of those that a killed run left behind. Called by whatever writes a model.

Each folder holds a lock file, which its owner keeps locked as long as it lives: the kernel unlocks it when the process
ends, however it ends. So a folder whose lock can be taken belongs to nobody any more.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

from faexport.files.signals import uninterrupted

PREFIX = "faexport-"
LOCK = ".faexport-lock"
UNLOCKED_SECONDS = 3600.0  # an empty folder without a lock file is stale after so long: its owner was about to lock it

_standing: dict[pathlib.Path, int] = {}  # folders that this process has, and its number, which a fork's differs from


@contextlib.contextmanager
def folder(parent: pathlib.Path | None = None, what: str = "") -> Iterator[pathlib.Path]:
    """A new folder, removed at the end: hidden in `parent`, or in the system's temporary folder. `what` becomes part of
    its name. Folders there that killed runs left behind are removed first. Raises OSError."""
    place = pathlib.Path(tempfile.gettempdir()) if parent is None else parent
    prefix = PREFIX if parent is None else f".{PREFIX}"
    remove_stale(place, prefix)
    lock = None
    made: pathlib.Path | None = None
    try:
        with uninterrupted():
            made = pathlib.Path(tempfile.mkdtemp(prefix=f"{prefix}{what}", dir=place))
            _standing[made] = os.getpid()
            lock = _locked(made)
        yield made
    finally:
        with uninterrupted():
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
                _standing.pop(made, None)
            if lock is not None:
                os.close(lock)


@atexit.register
def _remove_standing() -> None:
    """Where Ctrl-C came on the way to the removal: Python may raise it between any two steps, also of a `finally`."""
    for made, owner in list(_standing.items()):
        if owner == os.getpid():
            shutil.rmtree(made, ignore_errors=True)


def remove_stale(place: pathlib.Path, prefix: str) -> None:
    """Removes this user's folders of this prefix whose owners are dead. What can't be removed stays."""
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_if_stale(pathlib.Path(entry.path), entry.stat(follow_symlinks=False))


def _locked(made: pathlib.Path) -> int | None:
    """The open lock file of a folder, which appears under its name once it is locked; None where locks don't work."""
    unnamed = made / f"{LOCK}.new"
    file = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        unnamed.unlink()
        os.close(file)
        return None
    unnamed.rename(made / LOCK)
    return file


def _remove_if_stale(made: pathlib.Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        return
    try:
        lock = os.open(made / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        if time.time() - status.st_mtime > UNLOCKED_SECONDS:
            made.rmdir()  # fails where anything is in it
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where the owner lives
        shutil.rmtree(made, ignore_errors=True)
    finally:
        os.close(lock)
