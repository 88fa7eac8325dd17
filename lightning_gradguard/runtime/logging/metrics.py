"""Metrics of one batch, moved to the host in one transfer and logged."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_gradguard.runtime.lightning_api import batches_that_stepped, set_callback_metrics
from lightning_gradguard.runtime.logging.loggers import write_hyperparameters, write_medium, write_scalars

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NumbersReader(Protocol):
    """A callback that reads numbers on the host before it logs them."""

    def on_host_numbers(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: Any, numbers: list[float]
    ) -> None:
        """Called when the buffer is flushed, between the transfer and the loggers."""


class _Tagged(NamedTuple):
    values: Tensor
    tags: tuple[str, ...]
    is_total: bool = False


class _ForReader(NamedTuple):
    values: Tensor
    reader: NumbersReader
    record: Any


class MetricBuffer:
    """Metrics of one batch: gathered on the device, moved to the host once, then logged.

    Attributes:
        last_logged: By tag, the step at which it was logged last, and its value.
    """

    def __init__(self) -> None:
        self.last_logged: dict[str, tuple[int, float]] = {}
        self._on_bar: set[str] = set()
        self._pending: list[_Tagged | _ForReader] = []
        self._scalars: dict[str, float] = {}
        self._scalars_at: dict[int, dict[str, float]] = defaultdict(dict)
        self._totals: dict[str, float] = {}

    def show_on_bar(self, *tags: str) -> None:
        """Shows totals of these tags on the progress bar."""
        self._on_bar.update(tags)

    def add_scalars(self, scalars: Mapping[str, float | Tensor]) -> None:
        """Adds scalars of the running step, on the host or still on the device, by tag."""
        on_device = {tag: v.double().reshape(()) for tag, v in scalars.items() if isinstance(v, Tensor)}
        if on_device:
            values = torch.stack(list(on_device.values())).detach()
            self._pending.append(_Tagged(values, tuple(on_device)))
        self._scalars |= {tag: value for tag, value in scalars.items() if not isinstance(value, Tensor)}

    def add_scalars_at(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds scalars of a step that may have passed, by tag."""
        self._scalars_at[step].update(scalars)

    def add_numbers(self, reader: NumbersReader, record: Any, values: Tensor) -> None:
        """Adds numbers that a callback reads on the host, and logs from there."""
        self._pending.append(_ForReader(values.detach().double(), reader, record))

    def publish_total(self, tag: str, value: float | Tensor) -> None:
        """Publishes a total to `EarlyStopping` and the progress bar, without logging it."""
        if isinstance(value, Tensor):
            self._pending.append(_Tagged(value.detach().double().reshape(1), (tag,), is_total=True))
        else:
            self._totals[tag] = value

    def flush(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Moves everything to the host in one transfer, hands numbers to their readers, and logs."""
        if not (self._pending or self._scalars or self._scalars_at or self._totals):
            return
        self._to_host(trainer, pl_module)
        self._log(trainer, pl_module)

    def _to_host(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        host = iter(torch.cat([part.values.to(pl_module.device) for part in pending]).tolist())
        for part in pending:
            numbers = list(islice(host, len(part.values)))
            if isinstance(part, _ForReader):
                part.reader.on_host_numbers(trainer, pl_module, part.record, numbers)
            elif part.is_total:
                self._totals.update(zip(part.tags, numbers, strict=True))
            else:  # of two callbacks with one tag, a number that was on the host is logged
                self._scalars = {**dict(zip(part.tags, numbers, strict=True)), **self._scalars}

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        by_step, self._scalars_at = self._scalars_at, defaultdict(dict)
        by_step[batches_that_stepped(trainer)] |= self._scalars
        self._scalars = {}
        for step, scalars in sorted(by_step.items()):
            if scalars:
                log_scalars(trainer, scalars, step)
                self.last_logged |= {tag: (step, value) for tag, value in scalars.items()}
        totals, self._totals = self._totals, {}
        publish_metrics(pl_module, totals, self._on_bar)


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Logs scalars to every logger of the Trainer."""
    for logger in trainer.loggers:
        _guarded(logger, partial(write_scalars, logger, scalars, step))


def log_text(trainer: pl.Trainer, tag: str, markdown: str, step: int) -> None:
    """Logs Markdown to the loggers that take text."""
    _write_on_rank_zero(trainer, write_medium, "text", tag, markdown, step)


def log_figure(trainer: pl.Trainer, tag: str, draw: Callable[[], Figure], step: int) -> None:
    """Logs a figure to the loggers that take figures; it is not drawn without such a logger."""
    _write_on_rank_zero(trainer, write_medium, "figure", tag, draw, step)


def log_histogram(trainer: pl.Trainer, tag: str, values: Any, step: int) -> None:
    """Logs a histogram of finite values to the loggers that take histograms."""
    _write_on_rank_zero(trainer, write_medium, "histogram", tag, values, step)


def log_hyperparameters(trainer: pl.Trainer, settings: Mapping[str, Any]) -> None:
    """Logs the suite's settings to the loggers that keep them apart from the user's hyperparameters."""
    _write_on_rank_zero(trainer, write_hyperparameters, settings)


def publish_metrics(
    pl_module: pl.LightningModule, metrics: Mapping[str, float], on_bar: Collection[str] = ()
) -> None:
    """Publishes metrics to `trainer.callback_metrics`, and some to the progress bar."""
    if pl_module.trainer.barebones:
        return
    set_callback_metrics(pl_module.trainer, {tag: metrics[tag] for tag in metrics if tag not in on_bar})
    for tag in (tag for tag in metrics if tag in on_bar):
        pl_module.log(
            tag,
            torch.tensor(metrics[tag]),  # from a number, Lightning makes one on the device, and synchronizes
            prog_bar=True,
            on_step=True,
            on_epoch=False,
            logger=False,
            batch_size=1,
        )


def _write_on_rank_zero(trainer: pl.Trainer, write: Callable[..., None], *content: Any) -> None:
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            _guarded(logger, partial(write, logger, *content))


def _guarded(logger: Any, write: Callable[[], Any]) -> None:
    """Warns if a logger fails, which costs its records and never the run."""
    try:
        write()
    except Exception as error:
        name = type(logger).__name__
        warnings.warn(f"{name} could not write and is omitted: {error!r}", stacklevel=3)
