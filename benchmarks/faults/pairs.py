"""Injects faults on one rank of two processes, and compares the ranks; a hang ends them within a minute."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from benchmarks.faults.classes import FAULTS
from benchmarks.faults.runs import CHECKS, HANG, Case, Outcome, play, quietly
from benchmarks.faults.tasks import OPTIMIZERS

TIMES = ("first step", "warm-up", "steady", "accumulation", "last batch")
MODELS = ("MLP", "RNN", "transformer")


def cases() -> Iterator[Case]:
    """Every survivable kind that is not reported, at every time; models, optimizers and checks in turn."""
    kinds = [k for k, f in FAULTS.items() if f.survivable and not f.precision and not f.is_reported]
    for n, (kind, when) in enumerate(itertools.product(kinds, TIMES)):
        yield Case(
            kind=kind,
            time=when,
            model=FAULTS[kind].model or MODELS[n % len(MODELS)],
            optimizer=list(OPTIMIZERS)[n % len(OPTIMIZERS)],
            precision="32-true",
            check=CHECKS[n // 2 % 2],
            seed=n,
            ranks=2,
        )


def work(kept: Path) -> None:
    """Plays all cases in one of the two processes, in the same order as the other."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=HANG)
    for case in cases():
        outcome: Outcome = quietly(play, case, rank)
        if rank == 0:
            with kept.open("a") as file:
                file.write(outcome.to_json() + "\n")
            print(".", end="", flush=True)
    dist.destroy_process_group()


def main(kept: Path) -> list[Outcome]:
    """Plays all cases in two processes; returns their outcomes, as rank 0 saw them.

    Raises:
        RuntimeError: If the processes hung or failed.
    """
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.faults.pairs", str(kept)]
    processes = []
    with tempfile.TemporaryFile("w+") as errors:
        for rank in range(2):
            environment = {**os.environ, **shared, "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, stderr=errors))
        codes = [process.wait() for process in processes]
        errors.seek(0)
        printed = errors.read()[-2000:]
    print()
    if any(codes):
        raise RuntimeError(f"two processes ended with {codes}: {printed}")
    return [Outcome.from_json(line) for line in kept.read_text().splitlines()]


if __name__ == "__main__":  # one of the two processes that `main` starts
    work(Path(sys.argv[1]))
