"""Small modules, data and runs that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradguard import Incident, LearningRateBackoff
from lightning_gradguard.core.snapshots import Snapshot

Batch = tuple[Tensor, Tensor]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "sgd, tensor rate": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05), momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "adam fused": lambda p: torch.optim.Adam(p, lr=3e-3, fused=True),
    "adam fused, tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(3e-3), fused=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


class Classifier(pl.LightningModule):
    """The 20-64-64-4 network of most tests."""

    def __init__(
        self, optimizer: str = "sgd", norm: bool = False, dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(20, 64),
            nn.BatchNorm1d(64) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 4),
        )
        self.optimizer = optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        inputs, target = batch
        loss = nn.functional.cross_entropy(self.net(inputs), target)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


def batches(n: int, size: int = 32, seed: int = 0) -> list[Batch]:
    """Inputs, and the class that a fixed linear teacher gives them."""
    teacher = torch.randn(20, 4, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, 20, generator=generator) for _ in range(n)]
    return [(x, (x @ teacher).argmax(1)) for x in inputs]


def clusters(n: int, size: int = 32, seed: int = 0) -> list[Batch]:
    """Four classes, each around a centre of its own, far enough apart to be classified without an error."""
    centres = 2 * torch.randn(4, 20, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    targets = [torch.randint(4, (size,), generator=generator) for _ in range(n)]
    return [(centres[y] + torch.randn(size, 20, generator=generator), y) for y in targets]


def poisoned(data: Sequence[Batch], nan: Collection[int] = (), spikes: Collection[int] = ()) -> list[Batch]:
    """The same batches, some with NaN inputs, some a thousand times too large."""
    return [
        (x * float("nan"), y) if i in nan else (x * 1000, y) if i in spikes else (x, y)
        for i, (x, y) in enumerate(data)
    ]


def insert(data: Sequence[Batch], at: int, *more: Batch) -> list[Batch]:
    return [*data[:at], *more, *data[at:]]


NOT_A_NUMBER = poisoned(batches(1, seed=3), nan=[0])[0]


def plain_loader(data: Sequence[Batch]) -> DataLoader[Batch]:
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


class ResumableLoader:
    """Resumes in mid-epoch at the batch of the checkpoint, as torchdata's StatefulDataLoader does."""

    def __init__(self, data: Sequence[Batch]) -> None:
        self.data = data
        self.position = 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        start, self.position = self.position, 0
        for i in range(start, len(self.data)):
            self.position = i + 1
            yield self.data[i]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def fit(
    module: pl.LightningModule,
    data: Sequence[Batch],
    callbacks: Sequence[pl.Callback] = (),
    folder: Path | None = None,
    ckpt_path: str | None = None,
    loader: Any = None,
    validation: Sequence[Batch] | None = None,
    **trainer_arguments: Any,
) -> pl.Trainer:
    """A real fit on the CPU, quiet, without files unless a folder is given."""
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "log_every_n_steps": 10,
    }
    trainer = pl.Trainer(callbacks=list(callbacks), **{**arguments, **trainer_arguments})
    held_out = None if validation is None else plain_loader(validation)
    trainer.fit(module, loader or plain_loader(data), held_out, ckpt_path=ckpt_path)
    return trainer


class LateStream:
    """The side stream of a GPU at its slowest: copies are made on synchronization."""

    device = "cpu"

    def __init__(self) -> None:
        self.pending: list[tuple[list[Tensor], list[Tensor]]] = []

    def synchronize(self) -> None:
        for targets, sources in self.pending:
            torch._foreach_copy_(targets, sources)
        self.pending.clear()


def copy_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delays the copies of snapshots as a GPU may delay them."""
    copy_out = Snapshot._copy_out

    def late(snapshot: Any, targets: list[Tensor], sources: list[Tensor]) -> None:
        if snapshot._device == "same":
            copy_out(snapshot, targets, sources)
            return
        snapshot._stream = snapshot._stream or LateStream()
        snapshot._stream.pending.append((targets, sources))

    class Current:
        def wait_stream(self, other: LateStream) -> None:
            other.synchronize()

    monkeypatch.setattr(Snapshot, "_copy_out", late)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current())


def exponential_averages() -> list[pl.Callback]:
    """An average of weights beside the guard, where Lightning has one: it is new in 2.6."""
    kind = getattr(pl.callbacks, "EMAWeightAveraging", None)
    return [] if kind is None else [kind(decay=0.9)]


def averaged(callbacks: Sequence[Any]) -> list[Tensor]:
    """Returns the averaged weights."""
    models = [callback._average_model for callback in callbacks if hasattr(callback, "_average_model")]
    return [tensor for model in models for tensor in weights(model)]


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()] + [b.clone() for b in module.buffers()]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


def optimizer_state(trainer: pl.Trainer) -> list[Tensor]:
    states = [state for o in trainer.optimizers for state in o.state.values()]
    return [v for state in states for v in state.values() if isinstance(v, Tensor)]


def accuracy(module: Classifier) -> float:
    inputs, target = clusters(1, size=2000, seed=7)[0]
    return float((module.eval().net(inputs).argmax(1) == target).float().mean())


class Adversaries(pl.LightningModule):
    """A generator and a critic, each with its optimizer, under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 20))
        self.critic = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 1))

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.critic.parameters(), 1e-3),
            torch.optim.Adam(self.generator.parameters(), 1e-3),
        ], []


class Listener(pl.Callback):
    """Keeps the incidents of a run."""

    def __init__(self) -> None:
        self.found: list[Incident] = []

    def on_training_incident(self, trainer: Any, pl_module: Any, incident: Incident) -> None:
        self.found.append(incident)


class RateSpy(pl.Callback):
    """Records learning rates that are tensors: in use, and scheduled. Comes after the backoff."""

    def __init__(self, backoff: LearningRateBackoff) -> None:
        self.backoff = backoff
        self.scheduled: list[Tensor] = []
        self.used: list[Tensor] = []
        self.scales: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        (self.group,) = trainer.optimizers[0].param_groups
        trainer.optimizers[0].register_step_pre_hook(self.look)

    def look(self, *_: Any) -> None:
        self.used.append(self.group["lr"].clone())
        self.scales.append(self.backoff.scale)

    def on_train_batch_end(self, *_: Any) -> None:
        self.scheduled.append(self.group["lr"].clone())


class StateRecorder(pl.Callback):
    """The state ahead of each step, by `global_step`, and the one that a rollback restored."""

    def __init__(self) -> None:
        self.at: dict[int, list[Tensor]] = {}
        self.restored: tuple[int, list[Tensor]] | None = None

    def state(self, trainer: pl.Trainer) -> list[Tensor]:
        state = (*weights(trainer.lightning_module), *optimizer_state(trainer))
        return [tensor.clone() for tensor in state]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step not in self.at:
            self.at[trainer.global_step] = self.state(trainer)

    def on_training_incident(self, trainer: pl.Trainer, module: Any, incident: Incident) -> None:
        if incident.kind == "rollback":
            self.restored = int(incident.value or 0), self.state(trainer)
