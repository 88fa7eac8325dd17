"""What people read: the only tags, the only logger calls, the only words on the console."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def family(name: str, optimizer_index: int, n_optimizers: int) -> str:
    """The part of a tag before its first slash; with several optimizers, their index joins it.

    Example:
        >>> family("grad_norm", 1, n_optimizers=2), family("grad_norm", 0, n_optimizers=1)
        ('grad_norm.1', 'grad_norm')
    """
    return name if n_optimizers < 2 else f"{name}.{optimizer_index}"


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Hand scalars to every logger of the Trainer.

    Args:
        trainer: The Trainer; its loggers write on rank 0 and do nothing elsewhere.
        scalars: Tag to value.
        step: The horizontal axis.
    """
    for logger in trainer.loggers:
        _guarded(logger, partial(logger.log_metrics, dict(scalars), step=step))


def log_text(trainer: pl.Trainer, tag: str, markdown: str, step: int) -> None:
    """Write Markdown to the loggers that have a place for it."""
    _log_media(trainer, "add_text", tag, markdown, step)


def log_figure(trainer: pl.Trainer, tag: str, figure: Figure, step: int) -> None:
    """Write a figure to the loggers that have a place for it."""
    _log_media(trainer, "add_figure", tag, figure, step)


def log_histogram(trainer: pl.Trainer, tag: str, values: Any, step: int) -> None:
    """Write a histogram of finite values to the loggers that have a place for it."""
    _log_media(trainer, "add_histogram", tag, values, step)


def publish_metrics(pl_module: pl.LightningModule, metrics: Mapping[str, float]) -> None:
    """Put totals where `EarlyStopping(monitor=...)` and the progress bar look for them."""
    if pl_module.trainer.barebones:
        return
    for tag, value in metrics.items():
        # of a number, Lightning would make a tensor on the device, and wait for it
        pl_module.log(tag, torch.tensor(value), on_step=True, on_epoch=False, logger=False, batch_size=1)


def say(trainer: pl.Trainer, message: str) -> None:
    """Tell the person at the console, once, above the progress bar where there is one."""
    bar = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", True) and trainer.is_global_zero:
        bar.print(message)
    else:
        rank_zero_info(message)


def _log_media(trainer: pl.Trainer, method: str, tag: str, content: Any, step: int) -> None:
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        add = getattr(getattr(logger, "experiment", None), method, None)
        if add is not None:
            _guarded(logger, partial(add, tag, content, step))


def _guarded(logger: Any, write: Callable[[], Any]) -> None:
    """A logger that fails costs its records, never the run."""
    try:
        write()
    except Exception as error:
        name = type(logger).__name__
        warnings.warn(f"{name} could not write and was left out: {error!r}", stacklevel=3)
