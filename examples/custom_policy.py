"""A clipping policy of your own: clip norms whose logarithm stands out from a running mean.

Run it as `python examples/custom_policy.py`. From YAML, the policy is named like any other class:

    callbacks:
      - class_path: lightning_gradguard.AdaptiveGradientClipping
        init_args:
          policy:
            class_path: examples.custom_policy.LogNormClipping
            init_args: {n_std: 3.0}
"""

import math
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradguard import AdaptiveGradientClipping, ClippingPolicy, Gradients


class LogNormClipping(ClippingPolicy):
    """Clips the total norm where its logarithm is more than `n_std` deviations above its running mean.

    Norms vary by factors, so that a mean and a deviation fit their logarithms, and the rule does not depend
    on the scale of the loss. A norm that is clipped enters the history as the bound, so that a spike hardly
    raises the bound of the next one. `coefficients` changes no history; `commit` does, and is called only if
    the step is taken.

    Args:
        n_std: Deviations above the mean at which a norm is clipped; positive.
        decay: Decay of the running mean and variance, once there are enough norms; in [0, 1).
        warmup_steps: Norms before any is clipped.

    Raises:
        ValueError: If `n_std` or `decay` is out of range.

    References:
        Chen and others, The Best of Both Worlds: Combining Recent Advances in Neural Machine Translation,
        2018, arXiv:1804.09849. There such steps are skipped; here they are clipped.
    """

    def __init__(self, n_std: float = 4.0, decay: float = 0.97, warmup_steps: int = 10) -> None:
        if not n_std > 0:
            raise ValueError(f"n_std={n_std!r} must be positive.")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} must be in [0, 1).")
        self.n_std = n_std
        self.decay = decay
        self.warmup_steps = warmup_steps
        self._history = {name: torch.zeros((), dtype=torch.float64) for name in ("mean", "variance", "seen")}
        self._pending = self._history

    def coefficients(self, gradients: Gradients) -> Tensor:
        """One coefficient for all, computed on the device without a host synchronization."""
        log_norm = gradients.total_norm.log()
        self._history = {name: value.to(log_norm.device) for name, value in self._history.items()}
        mean, variance, seen = self._history["mean"], self._history["variance"], self._history["seen"]
        is_finite = log_norm.isfinite()
        # a deviation of less than a tenth is noise of the estimate
        bound = mean + self.n_std * variance.sqrt().clamp(min=0.1)
        bound = torch.where(seen < self.warmup_steps, math.inf, bound)
        clipped = torch.minimum(log_norm, bound)
        # a plain mean at first, an exponential one when there are enough norms
        rate = (1 / (seen + 1)).clamp(min=1 - self.decay)
        away = clipped - mean
        moved = {
            "mean": mean + rate * away,
            "variance": (1 - rate) * (variance + rate * away.square()),
            "seen": seen + 1,
        }
        self._pending = {k: torch.where(is_finite, moved[k], old) for k, old in self._history.items()}
        self.threshold = bound.exp()
        return torch.where(is_finite, (clipped - log_norm).exp(), 1.0)

    def commit(self) -> None:
        self._history = self._pending

    def state_dict(self) -> dict[str, Any]:
        return dict(self._history)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history = dict(state_dict)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def batches(n: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Random inputs, labelled with the index of the largest of their first four numbers."""
    inputs = [torch.randn(size, 20) for _ in range(n)]
    return [(x, x[:, :4].argmax(1)) for x in inputs]


def accuracy(callbacks: list[pl.Callback], max_steps: int) -> float:
    """Train with one batch in 25 a hundred times too large and mislabelled; test on clean data."""
    pl.seed_everything(0, verbose=False)
    data = [(100 * x, y.flip(0)) if i % 25 == 24 else (x, y) for i, (x, y) in enumerate(batches(max_steps))]
    ((inputs, target),) = batches(1, size=2000)
    module = Classifier()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return float((module.eval().net(inputs).argmax(1) == target).float().mean())


def main(max_steps: int = 500) -> tuple[float, float]:
    bare = accuracy([], max_steps)
    clipping = AdaptiveGradientClipping(LogNormClipping())
    clipped = accuracy([clipping], max_steps)
    print(f"accuracy {bare:.2f} bare, {clipped:.2f} with LogNormClipping")
    return bare, clipped


if __name__ == "__main__":
    auto_cli(main, description=__doc__)
