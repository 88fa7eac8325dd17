"""Launches programs of several processes, and ends those that hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(arguments: Sequence[str], patience: float = 60) -> str:
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


def launch_on(processes: int, module: str, *arguments: str, patience: float = 60) -> None:
    """Runs a module in a group of processes."""
    launch(
        [
            *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
            *("-m", module, *arguments),
        ],
        patience,
    )
