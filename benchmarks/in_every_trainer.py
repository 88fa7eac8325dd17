"""Runs a command, such as another project's tests, with the default callbacks in every Trainer that it makes.

Lightning adds the callbacks that an installed package registers to every Trainer. This makes such a package
in a temporary folder, and puts it on the path of the command:

    git clone --depth 1 --branch 2.6.6 https://github.com/Lightning-AI/pytorch-lightning
    cd pytorch-lightning/tests
    export PYTHONPATH=/path/to/this/repository
    python -m benchmarks.in_every_trainer python -m pytest tests_pytorch/loops

Of Lightning's own tests, those that assert the exact list of callbacks or of metrics then fail; no other may.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

#: One for each package of Lightning.
GROUPS = ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory")
_NAME = "gradguard_in_every_trainer"
_MODULE = """
import sys


def callbacks():
    from lightning_gradguard import default_callbacks

    made = default_callbacks()
    # Lightning adds them to the very list that it is given, with which a program may make its next Trainer:
    # those of the last one are taken out, as two stateful callbacks with one key are an error
    given = sys._getframe(2).f_locals["self"].trainer.callbacks
    given[:] = [callback for callback in given if type(callback) not in map(type, made)]
    return made
"""


def install(folder: Path) -> None:
    """Writes a package that registers the default callbacks; `folder` on the path installs it."""
    (folder / f"{_NAME}.py").write_text(_MODULE, encoding="utf-8")
    metadata = folder / f"{_NAME}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: 1\n", encoding="utf-8"
    )
    entries = [f"[{group}]\n{_NAME} = {_NAME}:callbacks\n" for group in GROUPS]
    (metadata / "entry_points.txt").write_text("\n".join(entries), encoding="utf-8")


def run(command: Sequence[str]) -> int:
    """Runs a command with the package installed, and returns its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder))
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
