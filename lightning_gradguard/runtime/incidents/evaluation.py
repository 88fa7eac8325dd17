"""Finds nonfinite metrics of validation and test, and the first batch that has them."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_gradguard.core.remedies import advice
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.distributed import gather_objects
from lightning_gradguard.runtime.incidents.journal import incident_now, open_journal, publish
from lightning_gradguard.runtime.lightning_packages import is_instance_by_name

#: Advice on a metric that is nonfinite although no batch was.
_AT_END = (
    "No step has returned or logged a nonfinite value: look at how the metric is computed at the end, for a "
    "mean of nothing, a division by 0, or the value it starts with; or return what it is computed from, to "
    "have the batch named."
)


class EvaluationWatch:
    """Watches one pass over the validation or test data, without a synchronization until its end."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        self._flags: list[Tensor] = []

    def on_batch_end(self, trainer: pl.Trainer, outputs: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Keeps, on the device, whether what the step returned, or logged so far, is nonfinite."""
        logged = [value.reshape(1) for value in lightning_api.evaluation_sums(trainer).values()]
        found = [f for leaf in tree_leaves(outputs) if (f := _is_nonfinite(leaf)) is not None]
        if logged:
            found.append(~torch.isfinite(torch.cat([value.float() for value in logged])).all())
        if found:
            self._places.append((batch_idx, dataloader_idx))
            self._flags.append(torch.stack(found).any())

    def publish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, kind: str) -> None:
        """Publishes an incident if a metric, or what a step returned, is nonfinite. Collective."""
        flags = torch.stack(self._flags).tolist() if self._flags else []
        first = next((place for place, bad in zip(self._places, flags, strict=True) if bad), None)
        self._places, self._flags = [], []
        metrics = {
            name: value
            for name, value in lightning_api.evaluation_metrics(trainer).items()
            if not math.isfinite(value)
        }
        by_rank: list[tuple[dict[str, float], tuple[int, int] | None]] = gather_objects((metrics, first))
        # a metric that is summed over ranks is nonfinite on all, the batch on one
        metrics = next((bad for bad, _ in by_rank if bad), {})
        rank, first = next(((r, place) for r, (_, place) in enumerate(by_rank) if place), (0, None))
        if not (metrics or first):
            return
        open_journal(trainer)
        incident = incident_now(
            trainer,
            kind,
            batch_idx=None if first is None else first[0],
            where=tuple(metrics),
            value=next(iter(metrics.values()), None),
            detail="; ".join(
                [
                    *_place(bool(metrics), first, rank if len(by_rank) > 1 else None),
                    *_consequences(trainer, metrics),
                ]
            ),
            advice=advice(kind) if first is not None else _AT_END,
            action="stopped" if any(c.check_finite for c in _watching(trainer, metrics)) else "none",
        )
        publish(trainer, pl_module, incident)


def _is_nonfinite(leaf: Any) -> Tensor | None:
    """Returns a flag on the device: one number that is nonfinite, or NaN in more; masks may hold `-inf`."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.numel():
        return None
    plain = leaf.detach()
    return (plain.isnan().any() if plain.numel() > 1 else ~plain.isfinite().all()).reshape(())


def _place(in_metrics: bool, first: tuple[int, int] | None, rank: int | None) -> list[str]:
    if first is None:
        return []
    place = f"batch {first[0]} of data loader {first[1]}" + ("" if rank is None else f" on rank {rank}")
    if not in_metrics:
        return [f"what the step returns is nonfinite, no metric is; the first such batch is {place}"]
    return [f"the first such batch is {place}"]


def _watching(trainer: pl.Trainer, metrics: Collection[str]) -> list[Any]:
    """Returns each `EarlyStopping` of a metric, which acts in a fit alone."""
    if trainer.state.fn != "fit":
        return []
    return [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if is_instance_by_name(callback, "EarlyStopping") and callback.monitor in metrics
    ]


def _consequences(trainer: pl.Trainer, metrics: Collection[str]) -> list[str]:
    """Returns what each `EarlyStopping` does about it."""
    watching = _watching(trainer, metrics)
    does = {True: "stops training", False: "counts that as no improvement"}
    return [f"EarlyStopping(monitor={c.monitor!r}) {does[bool(c.check_finite)]}" for c in watching]
