"""Injects the classes of faults into a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.faults.tasks import BUGS, CLASSES, Batch
from lightning_gradguard.core.backoff import ScaledLearningRate

#: Faults of the data; all others are done to the state of a run.
OF_DATA = frozenset(
    {"NaN input", "Inf input", "huge input", "ignored labels", "masked row", "fp16 overflow"}
    | {"label out of range", "exception", "index", "statistics of 1e9", "compiled only", *BUGS}
    | {"outlier of 200 sigma", "outlier of 400 sigma"}
)
#: Faults that need a step to have been made before.
OF_STATE = frozenset({"flip in a weight", "flip in the optimizer", "small flip on one rank"})


def corrupted(batch: Batch, kind: str) -> Batch:
    """Returns a copy of a batch with a fault of the data."""
    batch = {name: value.clone() for name, value in batch.items()}
    match kind:
        case "NaN input":
            batch["x"][3, 7] = torch.nan
        case "Inf input":
            batch["x"][3, 7] = torch.inf
        case "huge input":
            batch["x"] *= 1e20
        case "fp16 overflow":
            batch["x"] *= 1e5
        case "ignored labels":
            batch["y"][:] = -100
        case "exception":
            batch["location"] = torch.tensor(torch.nan)
        case "statistics of 1e9":
            batch["x"][3, 7] = 1e9
        case "compiled only":
            batch["compiled"] = torch.ones(())
        case "outlier of 200 sigma" | "outlier of 400 sigma":
            size = float(kind.split()[2])
            batch["x"][3] *= size
            batch["exponent"] = torch.zeros(len(batch["x"]))
            batch["exponent"][3] = 0.44 * size
        case "label out of range" | "index":
            batch["y"][3] = CLASSES
        case "masked row":
            batch["hidden"][3] = True
        case _:
            batch["bugs"][BUGS.index(kind)] = 1
    return batch


def flip(tensor: Tensor, element: int, bit: int = 30) -> None:
    """Flips one bit of a float32 tensor in place; 30 is the highest of the exponent."""
    flat = tensor.detach().view(-1)
    bits = flat[element].clone().view(torch.int32) ^ (1 << bit)
    flat[element] = bits.view(torch.float32)


class Fault(pl.Callback):
    """Injects one fault into the state of a run, once, ahead of every other callback.

    Args:
        kind: A key of `FAULTS`.
        epoch: When.
        batch_idx: The batch of that epoch.
        seed: Of which tensor and element are hit.
        rank: The only rank that it is done on; all of them if `None`.
    """

    def __init__(self, kind: str, epoch: int, batch_idx: int, seed: int, rank: int | None = None) -> None:
        self.done = False
        self._kind = kind
        self._when = (epoch, batch_idx)
        self._generator = torch.Generator().manual_seed(seed)
        self._rank = rank
        self._rates: list[ScaledLearningRate] = []
        self._is_now = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        here = self._rank is None or trainer.global_rank == self._rank
        self._is_now = here and not self.done and (trainer.current_epoch, batch_idx) == self._when
        if not self._is_now:
            return
        if self._kind == "learning rate":
            for optimizer in trainer.optimizers:
                rate = ScaledLearningRate(optimizer)
                rate.scale = 1e4
                self._rates.append(rate)
            self.done = True
        elif self._kind in ("flip in a weight", "flip before the first step", "small flip on one rank"):
            weights = [p for p in pl_module.parameters() if p.ndim > 1]
            bit = 10 if self._kind == "small flip on one rank" else 30
            self._hit(weights, bit)
        elif self._kind == "flip in the optimizer":
            states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
            self._hit([next(v for v in state.values() if v.ndim > 0) for state in states])

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._is_now or self.done or "gradient" not in self._kind:
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if self._kind == "NaN in a gradient":
            gradients[0].view(-1)[0] = torch.nan
            self.done = True
        else:
            self._hit(gradients)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for rate in self._rates:
            rate.remove()
        self._rates = []

    def _hit(self, tensors: Sequence[Tensor], bit: int = 30) -> None:
        tensor = tensors[self._draw(len(tensors))]
        flip(tensor, self._draw(tensor.numel()), bit)
        self.done = True

    def _draw(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self._generator))
