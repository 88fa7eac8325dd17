"""One forward pass, and a backward pass if requested, of which everything that a sample holds is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_gradguard.core.detectors.diagnosis import LossBaselines, Sample, StepTrace


def traced_pass(
    pl_module: pl.LightningModule, batch: Any, run_loss: Callable[[], Tensor], *, backward: bool = False
) -> Sample:
    """Runs a loss on a batch, and returns what was measured; state and gradients are the caller's to keep."""
    trace = StepTrace(pl_module, batch, LossBaselines())
    with trace:
        loss = run_loss()
    if backward:
        loss.backward()  # type: ignore[no-untyped-call]
    return trace.sample(0, trace.close(pl_module.device).tolist())
