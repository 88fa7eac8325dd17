"""Starting programs of several processes, and ending those that hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(arguments: Sequence[str], patience: float = 60) -> str:
    """Run Python with these arguments, to its end; returns what it said.

    Args:
        arguments: Those of the interpreter.
        patience: Seconds after which a program that has not ended hangs.

    Raises:
        AssertionError: If it fails or hangs; with the last that its processes said.
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
        said, _ = process.communicate(timeout=patience)
    except BaseException as error:  # the test may be ended as well
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise AssertionError(f"still running after {patience} seconds:\n{said[-6000:]}") from None
        raise
    assert process.returncode == 0, said[-6000:]
    return said


def launch_on(processes: int, module: str, *arguments: str, patience: float = 60) -> None:
    """Run a module in a group of processes."""
    launch(
        [
            *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
            *("-m", module, *arguments),
        ],
        patience,
    )
