"""Changes of optimizers: rates, schedules, weight decay, epsilon as configured, and a warm-up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any

from torch.optim import Optimizer

from lightning_gradguard.core.backoff import ScaledLearningRate
from lightning_gradguard.core.remedies.changes import Change
from lightning_gradguard.runtime.configured_rates import scale_rates
from lightning_gradguard.runtime.optimizer_hooks import after_step


def change_optimizers(configured: Any, changes: Sequence[Change]) -> list[str]:
    """Makes changes of what `configure_optimizers` returns, before a checkpoint restores what it has saved.

    Groups without weight decay are left without, where others have some. Changes of other kinds than
    `learning_rate`, `constant_rate`, `weight_decay` and `epsilon` are ignored. Returns a line for each that
    was made.
    """
    parts = list(_flat(configured))
    optimizers = [part for part in parts if isinstance(part, Optimizer)]
    schedules = [part for part in parts if not isinstance(part, Optimizer)]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    lines = []
    for change in changes:
        if change.kind == "learning_rate":
            before = [float(group["lr"]) for group in groups]
            for optimizer in optimizers:
                scale_rates(optimizer, schedules, [change["scale"]] * len(optimizer.param_groups))
            lines += [_line("lr", before, [float(group["lr"]) for group in groups])]
        elif change.kind == "constant_rate":
            _remove_schedules(configured)
            for group in groups:
                group["lr"] = group.get("initial_lr", group["lr"])
            lines += [f"{len(schedules)} schedules of the learning rate are removed"]
        elif change.kind in ("weight_decay", "epsilon"):
            key = "weight_decay" if change.kind == "weight_decay" else "eps"
            have = [group for group in groups if key in group]
            chosen = [group for group in have if group[key]] or have
            before = [float(group[key]) for group in chosen]
            for group in chosen:
                group[key] = change["value"]
            lines += [_line(key, before, [change["value"]] * len(chosen))]
    return lines


def _line(name: str, before: Sequence[float], after: Sequence[float]) -> str:
    pairs = dict.fromkeys(zip(before, after, strict=True))
    if not pairs:
        return f"{name}: not changed, no optimizer has it"
    return f"{name}: " + ", ".join(f"{old:g} -> {new:g}" for old, new in pairs)


def _flat(configured: Any) -> Iterator[Any]:
    """Yields optimizers and schedules."""
    if isinstance(configured, dict):
        configured = list(configured.values())
    if isinstance(configured, (list, tuple)):
        for part in configured:
            yield from _flat(part)
    elif isinstance(configured, Optimizer) or isinstance(getattr(configured, "optimizer", None), Optimizer):
        yield configured


def _remove_schedules(configured: Any) -> None:
    if isinstance(configured, dict):
        configured.pop("lr_scheduler", None)
    elif isinstance(configured, (list, tuple)):
        for part in configured:
            _remove_schedules(part)
        if isinstance(configured, list):
            is_kept = [
                isinstance(part, list) or isinstance(next(_flat(part), None), Optimizer)
                for part in configured
            ]
            configured[:] = compress(configured, is_kept)


class WarmUp:
    """Raises the learning rate of an optimizer to what is scheduled, linearly over its first steps.

    The rate is scaled only while the optimizer steps. Steps that are skipped count, as they do for schedules.

    Args:
        optimizer: The optimizer.
        steps: Number of steps.
        done: Those of earlier runs.
    """

    def __init__(self, optimizer: Optimizer, steps: int, done: int) -> None:
        self._rate = ScaledLearningRate(optimizer)
        self._steps = steps
        self.set_done(done)
        self._handle = after_step(optimizer, lambda: self.set_done(self.done + 1))

    def set_done(self, done: int) -> None:
        """Continues from a number of steps."""
        self.done = done
        self._rate.scale = min(1.0, (done + 1) / self._steps)

    def remove(self) -> None:
        """Removes the hooks."""
        self._handle.remove()
        self._rate.remove()
