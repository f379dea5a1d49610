# SPDX-License-Identifier: Apache-2.0
"""Deals tasks to the GPUs of one host, a process a task: all of a GPU's load at the same time, then one after the other
has the GPU for itself, so that it can take times and memory.

A process says READY on its standard output when it has loaded, and waits for a line on its standard input; who starts
one by hand presses Enter. Its turn comes when the process before it has ended, and so given back its memory.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence

READY = "ready"
TIME_IS_UP = "the time was up"


@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    command: Sequence[str]
    cost: float  # a task of larger cost is dealt before others


@dataclasses.dataclass(frozen=True)
class Host:
    """A GPU, or "" for none, and the cores of the processes that run on it."""

    gpu: str
    cores: frozenset[int]


Said = Callable[[Task, str], None]  # a line of a task's standard output
Ended = Callable[[Task, str], None]  # why it failed, or ""


def hosts(num_gpus: int) -> list[Host]:
    """The first GPUs of those that may be used, each with its share of the cores; 0: the processor alone."""
    cores = sorted(os.sched_getaffinity(0))
    if num_gpus == 0:
        return [Host("", frozenset(cores))]
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = visible[:num_gpus] if visible else [str(number) for number in range(num_gpus)]
    if len(gpus) < num_gpus:
        raise ValueError(f"{num_gpus} GPUs are wanted, CUDA_VISIBLE_DEVICES has {len(gpus)}")
    share = max(1, len(cores) // num_gpus)
    starts = [number * share % len(cores) for number in range(num_gpus)]
    return [Host(gpu, frozenset(cores[start : start + share])) for gpu, start in zip(gpus, starts, strict=True)]


def deal(tasks: Sequence[Task], num_hosts: int) -> list[list[Task]]:
    """The costliest first, each to whoever has least to do."""
    dealt: list[list[Task]] = [[] for _ in range(num_hosts)]
    for task in sorted(tasks, key=lambda task: -task.cost):
        min(dealt, key=lambda one: sum(task.cost for task in one)).append(task)
    return dealt


def run(tasks: Sequence[Task], where: Sequence[Host], jobs: int, seconds: float, said: Said, ended: Ended) -> None:
    """Runs all tasks, and ends those that are not finished after `seconds`.

    Args:
        jobs: how many processes of one host may be there at the same time.
        said, ended: called by one thread at a time.
    """
    running = _Running(time.monotonic() + seconds, threading.Lock(), said, ended)
    # The pool waits for its threads, so what they wait for must have been killed before.
    with concurrent.futures.ThreadPoolExecutor(len(where)) as pool, running.ending():
        list(pool.map(lambda pair: running.all_of(*pair, jobs), zip(where, deal(tasks, len(where)), strict=True)))


@dataclasses.dataclass
class _Running:
    end: float  # of time.monotonic()
    lock: threading.Lock
    said: Said
    ended: Ended
    processes: list[subprocess.Popen] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Kills what still runs when the time is up, or when this is left by an exception."""
        timer = threading.Timer(max(0.0, self.end - time.monotonic()), self._kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self.end = -math.inf  # no thread starts another process
            self._kill()

    def _kill(self) -> None:
        for process in list(self.processes):
            process.kill()

    def all_of(self, host: Host, tasks: Sequence[Task], jobs: int) -> None:
        """A host's tasks, in waves of as many as may load at the same time."""
        for first in range(0, len(tasks), jobs):
            with contextlib.ExitStack() as stack:
                wave = [(task, stack.enter_context(self._started(task, host))) for task in tasks[first : first + jobs]]
                for task, (process, _) in wave:
                    self._read(task, process, READY)
                for task, (process, errors) in wave:
                    self._finish(task, process, errors)

    @contextlib.contextmanager
    def _started(self, task: Task, host: Host) -> Iterator[tuple[subprocess.Popen, object]]:
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": host.gpu} if host.gpu else {})
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(task.command, env=environment, stderr=errors, **pipes)
            with contextlib.suppress(OSError):  # it may have ended
                os.sched_setaffinity(process.pid, host.cores)
            self.processes.append(process)
            if time.monotonic() > self.end:
                process.kill()
            with process:
                yield process, errors
            self.processes.remove(process)

    def _read(self, task: Task, process: subprocess.Popen, last: str = "") -> None:
        """Hands on its lines, to the end or to the line `last`."""
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == last:
                return
            with self.lock:
                self.said(task, line.rstrip("\n"))

    def _finish(self, task: Task, process: subprocess.Popen, errors) -> None:
        """Its turn, until it has ended."""
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it may have ended
            process.stdin.write("\n")
            process.stdin.close()
        self._read(task, process)
        code = process.wait()
        errors.seek(0)
        last = [line.strip() for line in errors.read().splitlines() if line.strip()][-1:]
        why = f"the process ended with {code}: {''.join(last)[:300]}" if code else ""
        with self.lock:
            self.ended(task, TIME_IS_UP if code and time.monotonic() > self.end else why)
