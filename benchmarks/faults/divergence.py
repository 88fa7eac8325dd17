"""Trains a deep network at learning rates far too high, bare and with the suite.

Twelve layers of ReLU with He initialization, SGD with momentum 0.9, 300 steps, five rates, three seeds.
A run has recovered if its accuracy on held-out samples of four classes reaches 0.9. Takes about a minute.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.faults.runs import quietly
from benchmarks.quiet_trainer import QUIET
from lightning_gradguard import TrainingDivergedError, default_callbacks

RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
STEPS = 300
DEPTH, WIDTH = 12, 64


class Deep(pl.LightningModule):
    """Twelve layers without anything that would help."""

    def __init__(self, lr: float, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        widths = [20, *[WIDTH] * (DEPTH - 1), 4]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            layer = nn.Linear(inputs, outputs)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        self._lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self._lr, momentum=0.9)


def clusters(n: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Four classes, each around a centre of its own, in twenty numbers."""
    centres = 2 * torch.randn(4, 20, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    targets = [torch.randint(4, (size,), generator=generator) for _ in range(n)]
    return [(centres[y] + torch.randn(size, 20, generator=generator), y) for y in targets]


def accuracy(lr: float, seed: int, callbacks: Sequence[pl.Callback]) -> float:
    """Trains once; returns the accuracy on held-out data, also if the suite has stopped training."""
    module = Deep(lr, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            default_root_dir=folder,
            **QUIET,
            callbacks=list(callbacks),
        )
        with contextlib.suppress(TrainingDivergedError):
            trainer.fit(module, DataLoader(clusters(STEPS, 64, seed), batch_size=None))  # type: ignore[arg-type]
    inputs, target = clusters(1, 2000, seed=1000 + seed)[0]
    return float((module.eval().net(inputs).argmax(1) == target).float().mean())


def main(seeds: Sequence[int]) -> dict[str, list[list[float]]]:
    """Returns, for the bare and the guarded runs, accuracies by rate and seed."""
    found: dict[str, list[list[float]]] = {"bare": [], "with the suite": []}
    for name, rows in found.items():
        for rate in RATES:
            callbacks = (default_callbacks() if name != "bare" else [] for _ in seeds)
            rows.append([quietly(accuracy, rate, s, c) for s, c in zip(seeds, callbacks, strict=True)])
    return found


def table(found: dict[str, list[list[float]]]) -> str:
    """The runs as a Markdown table."""
    lines = ["| learning rate | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for i, rate in enumerate(RATES):
        cells = [", ".join(f"{value:.2f}" for value in rows[i]) for rows in found.values()]
        lines.append(f"| {rate:g} | " + " | ".join(cells) + " |")
    recovered = [
        f"{sum(v >= 0.9 for row in rows for v in row)} of {sum(map(len, rows))}" for rows in found.values()
    ]
    return "\n".join([*lines, "| reach .9 | " + " | ".join(recovered) + " |"])
