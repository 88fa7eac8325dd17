"""Guards of others that are no clipping policies: skipping outliers, and stopping at them."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict, deque
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks.spike import SpikeDetection
from torch import Tensor, nn

#: Steps whose mean and deviation a step is compared with, and deviations from which on it is skipped.
WINDOW, SIGMAS = 128, 6.0


class SkipStep(pl.Callback):
    """Makes no update if loss or norm is six deviations above the mean of the last 128, once 64 are there.

    The rule of OLMo-core's `SkipStepOptimizer` (AI2, 2024). There the update is multiplied by zero, which
    leaves NaN in the weights; here gradients are removed, to its advantage.
    """

    def __init__(self) -> None:
        self._loss = torch.tensor(torch.nan)
        self._windows: dict[int, tuple[deque[Tensor], deque[Tensor]]] = defaultdict(
            lambda: (deque(maxlen=WINDOW + 1), deque(maxlen=WINDOW + 1))
        )

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        is_kept = True
        for window, value in zip(self._windows[id(optimizer)], (self._loss, norm), strict=True):
            window.append(value)
            if len(window) > WINDOW // 2:
                deviation, level = torch.std_mean(torch.stack(list(window)[:-1]))
                is_kept = is_kept and bool(value - level <= SIGMAS * deviation)
        if not is_kept:
            for parameter in parameters:
                parameter.grad = None


def spike_detection() -> list[Any]:
    """Returns Lightning's `SpikeDetection`, which ends a run whose loss is three times its mean of ten."""
    return [SpikeDetection(exclude_batches_path=os.path.join(tempfile.mkdtemp(), "skip_batches.json"))]
