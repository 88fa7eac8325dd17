"""Metrics of one batch, moved to the host in one transfer and handed to the loggers."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_gradguard.runtime.lightning_api import batches_that_stepped
from lightning_gradguard.runtime.logging.loggers import write_hyperparameters, write_medium, write_scalars

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Hand scalars to every logger of the Trainer.

    Args:
        trainer: The Trainer; its loggers write on rank 0 and do nothing elsewhere.
        scalars: Tag to value.
        step: The horizontal axis.
    """
    for logger in trainer.loggers:
        _guarded(logger, partial(write_scalars, logger, scalars, step))


def log_text(trainer: pl.Trainer, tag: str, markdown: str, step: int) -> None:
    """Write Markdown to the loggers that have a place for it."""
    _hand_out(trainer, write_medium, "text", tag, markdown, step)


def log_figure(trainer: pl.Trainer, tag: str, draw: Callable[[], Figure], step: int) -> None:
    """Write a figure to the loggers that have a place for it; without one it is not drawn."""
    _hand_out(trainer, write_medium, "figure", tag, draw, step)


def log_histogram(trainer: pl.Trainer, tag: str, values: Any, step: int) -> None:
    """Write a histogram of finite values to the loggers that have a place for it."""
    _hand_out(trainer, write_medium, "histogram", tag, values, step)


def log_hyperparameters(trainer: pl.Trainer, settings: Mapping[str, Any]) -> None:
    """Write what the suite was told to do beside the hyperparameters, to the loggers that keep them apart."""
    _hand_out(trainer, write_hyperparameters, settings)


class MetricBuffer:
    """Numbers of one batch on their way to people: gathered on the device, moved to the host once.

    Attributes:
        on_bar: Tags of totals that the progress bar shows.
        last_logged: By tag, where it was logged last, and what.
    """

    def __init__(self) -> None:
        self.on_bar: set[str] = set()
        self.last_logged: dict[str, tuple[int, float]] = {}
        self._parts: list[tuple[Tensor, Callable[[list[float]], Mapping[str, float]], int | None]] = []
        self._scalars: dict[str, float] = {}
        self._totals: dict[str, float] = {}

    def add(
        self,
        values: Tensor,
        to_scalars: Callable[[list[float]], Mapping[str, float]],
        step: int | None = None,
    ) -> None:
        """Take in values to be logged.

        Args:
            values: Shape `(n,)`, on any device.
            to_scalars: Gets the values on the host and returns the scalars to log; it may look at them
                for symptoms on the way.
            step: Where on the loggers' axis; the running step if `None`.
        """
        self._parts.append((values.detach().double(), to_scalars, step))

    def add_scalars(self, scalars: Mapping[str, float | Tensor]) -> None:
        """Take in scalars, on the host or still on the device."""
        self._scalars |= {tag: value for tag, value in scalars.items() if not isinstance(value, Tensor)}
        waiting = {tag: value for tag, value in scalars.items() if isinstance(value, Tensor)}
        if waiting:
            stacked = torch.stack([value.double() for value in waiting.values()])
            self.add(stacked, lambda host: dict(zip(waiting, host, strict=True)))

    def publish_total(self, tag: str, value: float) -> None:
        """Show a total to `EarlyStopping` and the progress bar when the report goes out."""
        self._totals[tag] = value

    def send(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move everything to the host in one transfer and hand it to the loggers."""
        if not (self._parts or self._scalars or self._totals):
            return
        parts, self._parts = self._parts, []
        now = batches_that_stepped(trainer)
        by_step: dict[int, dict[str, float]] = defaultdict(dict)
        if parts:
            device = pl_module.device
            host = torch.cat([values.to(device) for values, _, _ in parts]).tolist()
            start = 0
            for values, to_scalars, step in parts:
                scalars = to_scalars(host[start : start + len(values)])
                by_step[now if step is None else step].update(scalars)
                start += len(values)
        by_step[now].update(self._scalars)
        self._scalars = {}
        for step, scalars in sorted(by_step.items()):
            if scalars:
                log_scalars(trainer, scalars, step)
                self.last_logged |= {tag: (step, value) for tag, value in scalars.items()}
        totals, self._totals = self._totals, {}
        publish_metrics(pl_module, totals, self.on_bar)


def publish_metrics(
    pl_module: pl.LightningModule, metrics: Mapping[str, float], on_bar: Collection[str] = ()
) -> None:
    """Put totals where `EarlyStopping(monitor=...)` looks for them, and some onto the progress bar."""
    if pl_module.trainer.barebones:
        return
    for tag, value in metrics.items():
        pl_module.log(
            tag,
            torch.tensor(value),  # of a number, Lightning would make one on the device, and wait for it
            prog_bar=tag in on_bar,
            on_step=True,
            on_epoch=False,
            logger=False,
            batch_size=1,
        )


def _hand_out(trainer: pl.Trainer, write: Callable[..., None], *content: Any) -> None:
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            _guarded(logger, partial(write, logger, *content))


def _guarded(logger: Any, write: Callable[[], Any]) -> None:
    """A logger that fails costs its records, never the run."""
    try:
        write()
    except Exception as error:
        name = type(logger).__name__
        warnings.warn(f"{name} could not write and was left out: {error!r}", stacklevel=3)
