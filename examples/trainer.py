"""The suite in a Trainer, in twenty lines: three batches in a hundred are NaN, and training continues.

Run it as `python examples/trainer.py`.
"""

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradguard import default_callbacks


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch), batch.sum(1, keepdim=True))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main(max_steps: int = 300) -> float:
    pl.seed_everything(0, verbose=False)
    batches = [torch.randn(64, 8) * (float("nan") if i % 33 == 32 else 1.0) for i in range(max_steps)]
    module = Regression()
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=default_callbacks())
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    held_out = torch.randn(1000, 8)
    error = float(nn.functional.mse_loss(module.eval().net(held_out).detach(), held_out.sum(1, keepdim=True)))
    skips = int(trainer.callback_metrics["rollback/skips"])
    print(f"{skips} batches skipped; error on new data {error:.3f}")
    return error


if __name__ == "__main__":
    auto_cli(main, description=__doc__)
