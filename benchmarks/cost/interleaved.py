"""Several real fits in one process, which take their steps in turn."""

from __future__ import annotations

import gc
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from greenlet import getcurrent, greenlet

from benchmarks.cost.peers import LOG_EVERY, Variant
from benchmarks.quiet_trainer import QUIET
from lightning_gradguard.runtime.diagnosis.schedule import is_sampled

#: Reported length of an epoch, so that no step is the last.
ENDLESS = 10**6
#: Steps between the suite's snapshots, by default.
SNAPSHOT_EVERY = 50
#: Interval of the samples of `TrainingDiagnosis`, its default.
SAMPLE_EVERY = 100

#: Of one fit: number of a step, from 1, and its seconds.
Seconds = dict[int, float]


class Fit:
    """A fit that pauses between two steps.

    It runs in a greenlet of its own. Whenever its Trainer requests a batch, the greenlet returns control,
    so that a step lasts from one batch to the request for the next. Nothing is shared between two
    fits but the process.

    Args:
        module: Trained on the batch that it holds.
        variant: Added to the Trainer.
        folder: For what loggers write.

    Attributes:
        steps: Number of steps so far.
    """

    def __init__(self, module: pl.LightningModule, variant: Variant, folder: Path) -> None:
        self.steps = 0
        self._module = module
        self._runs = True
        self._trainer = pl.Trainer(
            **QUIET
            | {
                "max_epochs": 1,
                "default_root_dir": folder,
                "logger": variant.logger(folder),
                "log_every_n_steps": LOG_EVERY,
                "callbacks": variant.callbacks(),
                **variant.arguments,
            }
        )
        self._greenlet = greenlet(lambda: self._trainer.fit(module, _Feed(self)))
        self._greenlet.switch()

    def step(self) -> None:
        """Makes one step."""
        self.steps += 1
        self._greenlet.switch()

    def end(self) -> None:
        """Ends the fit."""
        self._runs = False
        self._greenlet.switch()

    def batches(self) -> Iterator[Any]:
        """Yields a batch at each request of the Trainer, until the fit ends."""
        while True:
            getcurrent().parent.switch()
            if not self._runs:
                return
            yield self._module.batch


class _Feed:
    """The data loader of the Trainer."""

    def __init__(self, fit: Fit) -> None:
        self._fit = fit

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Any]:
        return self._fit.batches()


@contextmanager
def fits(
    modules: Mapping[str, pl.LightningModule], variants: Mapping[str, Variant]
) -> Iterator[dict[str, Fit]]:
    """Start a fit for each module with the variant of the same name; end them all at last."""
    warnings.filterwarnings("ignore")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        running: dict[str, Fit] = {}
        try:
            for i, (name, module) in enumerate(modules.items()):
                running[name] = Fit(module, variants[name], Path(folder) / str(i))
            yield running
        finally:
            for fit in running.values():
                fit.end()
            logging.disable(disabled)


def time_in_turn(
    running: Mapping[str, Fit],
    rounds: int,
    warm_up: int,
    seed: int = 0,
    *,
    settle: int = 0,
    in_a_row: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Seconds]:
    """Runs steps of all fits in each round, in random order.

    Args:
        running: The fits.
        rounds: Number of timed rounds.
        warm_up: Number of rounds before those.
        seed: Of the order.
        settle: Steps at the start of each turn that do not count.
        in_a_row: Steps of a turn that count.
        clock: In seconds.

    Returns:
        Seconds of each fit, by number of the step.
    """
    order, chance = list(running), random.Random(seed)
    seconds: dict[str, Seconds] = {name: {} for name in running}
    for i in range(warm_up + rounds):
        if i == warm_up:
            # existing objects stay; collecting them repeatedly would slow steps at random
            gc.collect()
            gc.freeze()
        chance.shuffle(order)
        for name in order:
            for j in range(settle + in_a_row):
                start = clock()
                running[name].step()
                took = clock() - start
                if i >= warm_up and j >= settle:
                    seconds[name][running[name].steps] = took
    gc.unfreeze()
    return seconds


def is_hot(step: int) -> bool:
    """True if a step is not logged, not near a sample of the diagnosis, and not near one of the snapshots."""
    return step % LOG_EVERY != 0 and not _is_near_sample(step) and not _is_near_snapshot(step)


def is_logged(step: int) -> bool:
    """True if a step is logged, and not near a snapshot."""
    return step % LOG_EVERY == 0 and not _is_near_snapshot(step)


def _is_near_sample(step: int) -> bool:
    """A sample of the diagnosis is followed into the next step; steps are counted from 1 here."""
    return is_sampled(step - 1, SAMPLE_EVERY) or is_sampled(step - 2, SAMPLE_EVERY)


def _is_near_snapshot(step: int) -> bool:
    """It is taken when the next step begins, or the one after that if the check is deferred."""
    return step % SNAPSHOT_EVERY <= 2
