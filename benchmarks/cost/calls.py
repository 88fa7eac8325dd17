"""Counts the package's Python calls in one healthy, unlogged batch of the six default callbacks.

`python -m benchmarks.cost.calls` prints them by folder, and what the suite adds to the calls of all packages.
A small network with batch normalization is trained by Adam on the CPU. Nothing is timed: the counts do not
depend on the machine; they do on Python: from 3.12 on, list comprehensions make no calls.
"""

from __future__ import annotations

import itertools
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import lightning_gradguard
from benchmarks.quiet_trainer import QUIET
from lightning_gradguard import NaNRollback, default_callbacks

PACKAGE = Path(lightning_gradguard.__file__).parent
#: The batch whose calls are counted: state has been created by then, and no snapshot or log is due.
COUNTED = 39
LOG_EVERY = 50

Batch = tuple[Tensor, Tensor]


class CallCounter:
    """Counts calls of the package's functions between `start` and `stop`.

    Attributes:
        calls: By code object. Comprehensions, lambdas and resumed generators count.
        moves: Calls into another file than that of the call before. Comprehensions and lambdas are no moves:
            they run where they are written.
        of_all: Calls of functions of all packages.
    """

    def __init__(self) -> None:
        self.calls: Counter[CodeType] = Counter()
        self.moves = 0
        self.of_all = 0
        self._file = ""

    def start(self) -> None:
        """Begins to count."""
        sys.setprofile(self._observe)

    def stop(self) -> None:
        """Ends counting."""
        sys.setprofile(None)

    def _observe(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        self.of_all += event == "call"
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)):
            return
        self.calls[code] += 1
        if not code.co_name.startswith("<"):
            self.moves += code.co_filename != self._file
            self._file = code.co_filename


class Data:
    """Random batches, of which one is counted, from its request to that of the next one."""

    def __init__(self, counter: CallCounter) -> None:
        self._counter = counter

    def __len__(self) -> int:
        return COUNTED + 2

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        for batch_idx in range(len(self)):
            batch = torch.randn(16, 8, generator=generator), torch.randint(2, (16,), generator=generator)
            if batch_idx == COUNTED:
                self._counter.start()
            elif batch_idx == COUNTED + 1:
                self._counter.stop()
            yield batch


class Network(pl.LightningModule):
    """A perceptron with batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def count(callbacks: list[pl.Callback], log_every: int = LOG_EVERY) -> CallCounter:
    """Trains up to the batch after the one that is counted."""
    torch.manual_seed(0)
    counter = CallCounter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            **QUIET,
            callbacks=callbacks,
            default_root_dir=folder,
            log_every_n_steps=log_every,
            max_epochs=1,
        )
        trainer.fit(Network(), Data(counter))
    return counter


def table(counter: CallCounter) -> str:
    """Renders the counts by folder, and of the package."""

    def folder(code: CodeType) -> str:
        return Path(code.co_filename).parent.relative_to(PACKAGE).as_posix()

    def row(name: str, codes: list[CodeType]) -> str:
        calls, files = sum(counter.calls[code] for code in codes), {code.co_filename for code in codes}
        return f"{name:24}{calls:8}{len(codes):12}{len(files):8}"

    codes = sorted(counter.calls, key=folder)
    rows = [f"{'folder':24}{'calls':>8}{'functions':>12}{'files':>8}"]
    rows += [row(name, list(group)) for name, group in itertools.groupby(codes, folder)]
    return "\n".join([*rows, row("all", codes), f"moves between files: {counter.moves}"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(table(count(default_callbacks())))
    deferred = NaNRollback(check="deferred")
    for kind, every in (("hot", LOG_EVERY), ("logged", (COUNTED + 1) // 2)):
        bare = count([], every).of_all
        exact = count(default_callbacks(), every).of_all
        late = count(default_callbacks(nan_rollback=deferred), every).of_all
        print(f"in all packages, {kind}: bare {bare}, suite +{exact - bare}, deferred +{late - bare}")
