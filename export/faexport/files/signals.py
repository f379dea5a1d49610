# SPDX-License-Identifier: Apache-2.0
"""Keeps a few steps together where a signal would end the program between them. Called around the moves of a commit."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP that arrive in the body take effect at its end. May be nested.

    The handlers are exchanged, not the thread's signal mask: the kernel gives a process's signals to any of its
    threads, and Python then runs the handler in the main thread whatever that one has masked.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only, so nothing interrupts this one
        return
    arrived: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in heeded:
        signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])
        for number in dict.fromkeys(arrived):
            handler = before[number]
            if callable(handler):
                handler(number, None)
            else:
                os.kill(os.getpid(), number)
