"""Runs under the Lightning package that the environment variable `LIGHTNING_PACKAGE` names."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl
else:
    # before any import of the other package
    pl = import_module(os.environ.get("LIGHTNING_PACKAGE", "pytorch_lightning"))

import torch
from torch import nn

from lightning_gradguard import NaNRollback, default_callbacks
from tests.tasks import Batch, ResumableLoader, batches, optimizer_state, plain_loader, poisoned, weights

#: A single NaN batch, a spike that its running variances do not take, three NaN batches that need a
#: rollback; and one after the checkpoint.
STORM = poisoned(batches(70), nan=[4, 20, 21, 22, 60], spikes=[12])
SAVED_AT = 50


class Network(pl.LightningModule):
    """A module of the package under test."""

    def __init__(self, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(20, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 4))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Data(pl.LightningDataModule):
    """Batches, some of them NaN."""

    def train_dataloader(self) -> Any:
        return plain_loader(STORM)


def trained(
    folder: Path, more: Sequence[Any] = (), seed: int = 0, epochs: int = 1, checkpoint: str | None = None
) -> dict[str, Any]:
    """Fits with all default callbacks; returns the state to compare runs by."""
    module, suite = Network(seed=seed), default_callbacks(nan_rollback=NaNRollback(snapshot_every_n_steps=5))
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
        callbacks=[*more, *suite],
    )
    trainer.fit(module, ResumableLoader(STORM), ckpt_path=checkpoint)
    (rollback,) = [callback for callback in suite if isinstance(callback, NaNRollback)]
    return {
        "weights": weights(module),
        "optimizer": optimizer_state(trainer),
        "counts": [rollback.skips, rollback.rollbacks],
        "metrics": trainer.callback_metrics,
    }


def main(task: str, folder: Path, *checkpoints: str) -> None:
    """Saves the state of each run.

    Args:
        task: `storm` fits, writes a checkpoint on the way, and keeps averages in further fits; `resume`
            resumes from checkpoints, with the loggers of the package and of the suite at level ERROR.
        folder: To write to.
        checkpoints: Files to resume from.
    """
    kinds: Any = pl.callbacks
    if task == "storm":
        keep = kinds.ModelCheckpoint(folder, every_n_train_steps=SAVED_AT, save_top_k=-1)
        states = {"storm": trained(folder, [keep])}
        states["stochastic"] = trained(folder / "swa", [kinds.StochasticWeightAveraging(1e-2, 1)], epochs=3)
        if hasattr(kinds, "EMAWeightAveraging"):
            states["exponential"] = trained(folder / "ema", [kinds.EMAWeightAveraging(decay=0.9)])
    else:
        for name in (pl.__name__, "lightning_gradguard"):
            logging.getLogger(name).setLevel(logging.ERROR)
        states = {str(i): trained(folder / str(i), seed=5, checkpoint=c) for i, c in enumerate(checkpoints)}
    torch.save(states, folder / f"{task}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
