"""The networks and runs of the CPU suite, on one GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_gradguard import Incident
from tests.tasks import Batch, Classifier, fit, optimizer_state, weights

ACCELERATOR = "gpu"
DEVICE = "cuda"

Make = Callable[[Any], torch.optim.Optimizer]
#: Made when the weights are on the device: `capturable` and rates that are tensors require it.
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "plain sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "adam fused": lambda p: torch.optim.Adam(p, lr=3e-3, fused=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "adam capturable": lambda p: torch.optim.Adam(p, lr=3e-3, capturable=True),
    "sgd, rate on the device": lambda p: torch.optim.SGD(p, lr=on_device(0.05), momentum=0.9),
    "adam fused, rate on the device": lambda p: torch.optim.Adam(p, lr=on_device(3e-3), fused=True),
    "adam capturable, rate on the device": lambda p: torch.optim.Adam(p, lr=on_device(3e-3), capturable=True),
}


def on_device(number: float) -> Tensor:
    return torch.tensor(number, device=DEVICE)


class Network(Classifier):
    """The classifier of the CPU suite with an optimizer of this suite, and an optional schedule."""

    def __init__(
        self, optimizer: str = "adamw fused", *, norm: bool = True, dropout: float = 0.0, decay: float = 1.0
    ) -> None:
        super().__init__(optimizer, norm=norm, dropout=dropout)
        self.decay = decay

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        if self.decay == 1:
            return optimizer
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Observer(pl.Callback):
    """Records incidents, logged totals and final weights.

    Attributes:
        received: Kind and step of every incident.
        restored: Steps that a rollback restored.
        totals: `grad_norm/total` after each batch, where a monitor shows it at every step.
        final: Weights and buffers at the end, before the strategy takes them down.
    """

    def __init__(self) -> None:
        self.received: list[tuple[str, int]] = []
        self.restored: list[int] = []
        self.totals: list[float] = []
        self.final: list[Tensor] = []

    def on_training_incident(self, trainer: Any, pl_module: Any, incident: Incident) -> None:
        self.received.append((incident.kind, incident.step))
        if incident.kind == "rollback":
            self.restored.append(int(incident.value or 0))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if "grad_norm/total" in trainer.callback_metrics:
            self.totals.append(float(trainer.callback_metrics["grad_norm/total"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.final = [tensor.cpu() for tensor in weights(pl_module)]


def fit_there(
    module: pl.LightningModule, data: Sequence[Batch], callbacks: Sequence[pl.Callback] = (), **arguments: Any
) -> pl.Trainer:
    """A real fit on the device; batches travel there one by one."""
    torch.manual_seed(1)
    settings = {"accelerator": ACCELERATOR, "deterministic": True, **arguments}
    return fit(module, data, callbacks, **settings)


def everything(trainer: pl.Trainer) -> list[Tensor]:
    """Weights, buffers, optimizer state with its counters of steps, and learning rates."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [torch.as_tensor(group["lr"]).detach().cpu() for group in groups]
    return [t.cpu() for t in (*weights(trainer.lightning_module), *optimizer_state(trainer))] + rates


def finite(trainer: pl.Trainer) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in everything(trainer))
