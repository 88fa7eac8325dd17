"""Launches programs of several processes, and ends those that hang.

As a program, it runs a module in a group of processes that are forked when the module has been imported:
to import torch and Lightning takes longer than most of what they run.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(arguments: Sequence[str], patience: float = 150) -> str:
    """Runs Python with these arguments to its end; returns its output.

    Args:
        arguments: Those of the interpreter.
        patience: Seconds after which a program that has not ended hangs.

    Raises:
        AssertionError: If it fails or hangs; with the end of its output.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=patience)
    except BaseException as error:  # the test may be interrupted as well
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise AssertionError(f"still running after {patience} seconds:\n{output[-6000:]}") from None
        raise
    assert process.returncode == 0, output[-6000:]
    return output


def launch_on(processes: int, module: str, *arguments: str, patience: float = 150) -> None:
    """Runs a module in a group of processes, with the environment that torchrun gives them."""
    launch(["-m", "tests.launching", str(processes), module, *arguments], patience)


def main(processes: int, module: str, *arguments: str) -> int:
    """Forks the processes, and waits for all of them, or for the first that fails.

    Returns:
        The exit code of the first that failed; 0 if none did.
    """
    importlib.import_module(module)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_run, args=(rank, processes, port, module, arguments))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    while running := [rank.sentinel for rank in ranks if rank.exitcode is None]:
        multiprocessing.connection.wait(running)
        if failed := next((rank.exitcode for rank in ranks if rank.exitcode), 0):
            for rank in ranks:
                rank.kill()
            return abs(failed)
    return 0


def _run(rank: int, processes: int, port: int, module: str, arguments: Sequence[str]) -> None:
    os.environ.update(
        {
            "TORCHELASTIC_RUN_ID": "none",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
        }
    )
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
