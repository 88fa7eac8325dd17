"""A callback that receives every incident, posts it as one line of JSON, and stops after the third skip.

Callbacks of the Trainer and the LightningModule receive incidents if they have `on_training_incident`. Run it
as `python examples/incident_listener.py`; replace `post` by a webhook of yours.
"""

import json
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradguard import Incident, NaNRollback


class IncidentPoster(pl.Callback):
    """Posts incidents, and stops training after too many skips.

    Args:
        post: Receives one line of JSON.
        stop_after: Skips after which training stops.
    """

    def __init__(self, post: Callable[[str], object], stop_after: int = 3) -> None:
        self.post = post
        self.stop_after = stop_after
        self.skips = 0

    def on_training_incident(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, incident: Incident
    ) -> None:
        if trainer.is_global_zero:  # every rank receives the same incidents
            message = {"kind": incident.kind, "step": incident.step, "text": incident.describe()}
            self.post(json.dumps(message))
        self.skips += incident.action == "skipped"
        if self.skips == self.stop_after:
            trainer.should_stop = True


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch), batch.sum(1, keepdim=True))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main(max_steps: int = 100) -> list[str]:
    pl.seed_everything(0, verbose=False)
    batches = [torch.randn(64, 8) for _ in range(max_steps)]
    for bad in batches[9::10]:
        bad[0] = torch.inf
    posted: list[str] = []
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[NaNRollback(), IncidentPoster(posted.append)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Regression(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    print(*posted, sep="\n")
    print(f"{len(posted)} incidents posted; stopped after {trainer.global_step} of {max_steps} steps")
    return posted


if __name__ == "__main__":
    auto_cli(main, description=__doc__)
