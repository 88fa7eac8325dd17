"""Runs trials, in parallel processes where there are cores for them."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from lightning_gradguard.treatment.trials.program import Program
from lightning_gradguard.treatment.trials.trial import Job, Trial, run

#: Seconds after the deadline in which a process may end by itself.
GRACE = 2.0


def usable_processes() -> int:
    """Returns how many trials can run at once: one, where forked processes cannot use the device."""
    if not hasattr(os, "fork") or not hasattr(os, "sched_getaffinity") or torch.cuda.is_available():
        return 1
    return min(len(os.sched_getaffinity(0)), 4)


def outcomes(program: Program, jobs: Sequence[Job], deadline: float, processes: int) -> Iterator[Trial]:
    """Yields the outcomes of jobs as they come; jobs for which no time is left are omitted.

    They begin in order, several at once in processes, or one after another in this one.
    """
    waiting = list(jobs)
    if processes == 1 or len(waiting) == 1:
        while waiting and time.monotonic() < deadline:
            yield run(program, waiting.pop(0), deadline)
        return
    running: dict[Connection, tuple[Any, Job]] = {}
    try:
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < processes and time.monotonic() < deadline:
                job = waiting.pop(0)
                receiving, process = _started(program, job, deadline)
                running[receiving] = process, job
            left = max(deadline + GRACE - time.monotonic(), 0.0)
            ready = wait(list(running), timeout=left)
            if not ready:
                return
            for connection in ready:
                assert isinstance(connection, Connection)
                process, job = running.pop(connection)
                try:
                    trial = connection.recv()
                except EOFError:
                    trial = Trial(job=job, error="its process has ended, as of too little memory")
                process.join()
                connection.close()
                yield trial
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _started(program: Program, job: Job, deadline: float) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(program, job, deadline, sending), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which torch's own loaders have too
        process.start()
    sending.close()
    return receiving, process


def _work(program: Program, job: Job, deadline: float, connection: Connection) -> None:
    torch.set_num_threads(1)
    connection.send(run(program, job, deadline))
    connection.close()
