"""Histograms of gradients."""

from __future__ import annotations

import pytorch_lightning as pl
import torch

from lightning_gradguard.core.norms import Gradients, local_shard
from lightning_gradguard.core.tags import GRAD_HISTOGRAM, tag
from lightning_gradguard.runtime.lightning_api import batches_that_stepped
from lightning_gradguard.runtime.logging.chart_groups import ChartGroups
from lightning_gradguard.runtime.logging.metrics import log_histogram


def log_gradient_histograms(trainer: pl.Trainer, gradients: Gradients, charts: ChartGroups) -> None:
    """Logs a histogram of each gradient that has a chart.

    Args:
        trainer: The Trainer that runs.
        gradients: Of one optimizer step.
        charts: The charts of these parameters.
    """
    for i in charts.select(gradients.names):
        values = local_shard(gradients.tensors[i].detach())
        values = values.coalesce().values() if values.is_sparse else values
        finite = values[torch.isfinite(values)].float()
        if finite.numel():
            # TensorBoard takes the histogram of larger values for empty, and raises
            bounded = finite.clamp(-1e18, 1e18).cpu()
            log_histogram(
                trainer, tag(GRAD_HISTOGRAM, gradients.names[i]), bounded, batches_that_stepped(trainer)
            )
