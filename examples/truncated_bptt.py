"""Truncated backpropagation through time: the hidden state is carried from batch to batch, NaN is not.

A GRU forecasts a chaotic series, 25 readings a batch; now and then the sensor fails, and a reading is NaN. A
skipped step restores what its forward pass has written, the hidden state included, so that the next batch
continues from the last good one. Run it as `python examples/truncated_bptt.py`.
"""

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradguard import default_callbacks

STREAMS, LENGTH = 16, 25


class Forecaster(pl.LightningModule):
    """Forecasts the next reading of each stream."""

    state: Tensor

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(1, width, batch_first=True)
        self.head = nn.Linear(width, 1)
        self.register_buffer("state", torch.zeros(1, STREAMS, width), persistent=False)

    def training_step(self, readings: Tensor, batch_idx: int) -> Tensor:
        states, last = self.gru(readings[:, :-1], self.state)
        self.state = last.detach()  # backpropagation is truncated here
        return nn.functional.mse_loss(readings[:, :-1] + self.head(states), readings[:, 1:])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def series(n: int) -> Tensor:
    """Mackey-Glass series from `STREAMS` starts, `(STREAMS, n, 1)`; one reading a unit of time."""
    delay, per_unit = 17, 5
    values = list(1.2 + 0.2 * torch.randn(delay * per_unit, STREAMS))
    for _ in range((n + 100) * per_unit):
        past = values[-delay * per_unit]
        values.append(values[-1] + (0.2 * past / (1 + past**10) - 0.1 * values[-1]) / per_unit)
    return torch.stack(values[-n * per_unit :: per_unit], dim=1).unsqueeze(-1) - 1


def train(batches: list[Tensor], callbacks: list[pl.Callback]) -> float:
    """Train on all batches but the last four; returns the error of forecasts on those."""
    pl.seed_everything(0, verbose=False)
    module = Forecaster()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches[:-4], batch_size=None))  # type: ignore[arg-type]
    with torch.no_grad():
        return sum(float(module.training_step(batch, 0)) for batch in batches[-4:]) / 4


def main(max_steps: int = 300) -> dict[str, float]:
    pl.seed_everything(0, verbose=False)
    readings = series((max_steps + 4) * LENGTH + 1)
    batches = list(readings.unfold(1, LENGTH + 1, LENGTH).transpose(0, 1).mT.clone())
    for bad in batches[19:-4:20]:
        bad[0, 3] = torch.nan
    errors = {
        "guessing no change": float(readings.diff(dim=1).square().mean()),
        "bare": train(batches, []),
        "guarded": train(batches, default_callbacks()),
    }
    print("error of forecasts:", ", ".join(f"{value:.5f} {name}" for name, value in errors.items()))
    return errors


if __name__ == "__main__":
    auto_cli(main, description=__doc__)
