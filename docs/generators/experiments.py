"""The experiments of the guide: networks, remedies and results."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import nn

from docs.generators.networks import CharacterModel, DigitClassifier, pretrained
from examples.digits import Digits
from lightning_gradguard import (
    AdaptiveGradientClipping,
    GlobalNormClipping,
    GradientNormMonitor,
    Incident,
    InitializationCheck,
    TrainingDiagnosis,
    default_callbacks,
)
from lightning_gradguard.cli.demo_task import Characters

#: Steps whose mean loss is called that at the end.
LAST = 20
Callbacks = Sequence[pl.Callback]
Experiments = dict[str, Callable[[int, int], "Run"]]


class Memory(Logger):
    """Keeps logged scalars, by tag."""

    def __init__(self) -> None:
        super().__init__()
        self.series: dict[str, list[float]] = {}

    @property
    def name(self) -> str:
        """The name of the logger."""
        return "memory"

    @property
    def version(self) -> int:
        """The only version."""
        return 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keeps scalars."""
        for tag, value in metrics.items():
            self.series.setdefault(tag, []).append(float(value))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Ignores hyperparameters."""


@dataclass
class Run(pl.Callback):
    """The result of a training run.

    Args:
        losses: Of every step, until one is nonfinite, with which the run ends.
        incidents: Kinds of incidents, in the order of their first.
        series: Logged values, by tag.
        accuracy: Accuracy on held-out digits.
    """

    losses: list[float] = field(default_factory=list)
    incidents: list[str] = field(default_factory=list)
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    accuracy: float = math.nan

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the loss; stops a run with nonfinite weights."""
        self.losses.append(float(outputs["loss"]))
        weights = [p.detach().norm() for p in pl_module.parameters()]
        trainer.should_stop = not torch.stack(weights).isfinite().all()

    def on_training_incident(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, incident: Incident
    ) -> None:
        """Keep what kind it is of."""
        if incident.kind not in self.incidents:
            self.incidents.append(incident.kind)

    @property
    def survived(self) -> int:
        """Batches until the loss became nonfinite."""
        return sum(map(math.isfinite, self.losses))

    @property
    def trains(self) -> bool:
        """True if the accuracy on digits is at least 0.8, or the loss on text at most 2.3 nats."""
        return self.final_loss <= 2.3 if math.isnan(self.accuracy) else self.accuracy >= 0.8

    @property
    def final_loss(self) -> float:
        """Mean loss of the last batches; NaN for a failed run."""
        last = self.losses[-LAST:]
        return sum(last) / len(last)

    @property
    def largest_norm(self) -> float:
        """Largest total norm of the gradients, before clipping; infinite if one was not finite."""
        return max(norm if math.isfinite(norm) else math.inf for norm in self.series["grad_norm/total"])

    def first_norms(self) -> list[float]:
        """Norms of the gradients of hidden weights in the first step, first layer first."""
        return [v[0] for tag, v in self.series.items() if re.fullmatch(r"grad_norm/hidden.*\.0\.weight", tag)]


def train(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    callbacks: Callbacks,
    *,
    max_steps: int = -1,
    max_epochs: int | None = None,
) -> Run:
    """Train on a CPU, with every step logged."""
    run, memory = Run(), Memory()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            max_epochs=max_epochs,
            callbacks=[run, *callbacks],
            logger=memory,
            log_every_n_steps=1,
            limit_val_batches=0,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, data)
    run.series = memory.series
    return run


def watched(*callbacks: pl.Callback) -> Callbacks:
    """The monitor, the diagnosis, and other callbacks."""
    monitor = GradientNormMonitor(level="parameter", figure_every_n_steps=0)
    return [monitor, TrainingDiagnosis(), *callbacks]


def suite() -> Callbacks:
    """All six callbacks, with repair of the initialization."""
    return default_callbacks(
        initialization_check=InitializationCheck(on_failure="repair"),
        gradient_norm_monitor=GradientNormMonitor(level="parameter", figure_every_n_steps=0),
    )


def clipped() -> Callbacks:
    """The same with clipping to a global norm of 1."""
    return watched(AdaptiveGradientClipping(GlobalNormClipping(1.0)))


def digits(
    *arguments: Any,
    build: Callable[..., DigitClassifier] = DigitClassifier,
    callbacks: Callable[[], Callbacks] = watched,
    **options: Any,
) -> Callable[[int, int], Run]:
    """Returns an experiment on digits, of so many steps, with its accuracy on held-out digits."""

    def run(steps: int, seed: int) -> Run:
        pl.seed_everything(seed, verbose=False)
        data, module = Digits(), build(*arguments, **options)
        outcome = train(module, data, callbacks(), max_steps=steps)
        images, target = data.held_out.tensors
        outcome.accuracy = float((module.eval()(images).argmax(1) == target).float().mean())
        return outcome

    return run


def characters(callbacks: Callable[[], Callbacks] = watched, **options: Any) -> Callable[[int, int], Run]:
    """Returns an experiment on text, of so many batches."""

    def run(n_batches: int, seed: int) -> Run:
        pl.seed_everything(seed, verbose=False)
        data = Characters(n_batches=n_batches, seed=seed)
        return train(CharacterModel(len(data.alphabet), **options), data, callbacks(), max_epochs=1)

    return run


def _layer_by_layer(activation: type[nn.Module], lr: float) -> DigitClassifier:
    images, target = Digits().data.tensors
    return pretrained(images, target, activation, lr, steps=150)


_he = partial(nn.init.kaiming_normal_, nonlinearity="relu")
_xavier = nn.init.xavier_normal_
_orthogonal = partial(nn.init.orthogonal_, gain=nn.init.calculate_gain("tanh"))
_huge = partial(nn.init.normal_, std=0.4)

#: Twelve hidden layers, by remedy for gradients that vanish on the way to the first.
VANISHING: Experiments = {
    "sigmoid": digits(nn.Sigmoid),
    "sigmoid, Xavier": digits(nn.Sigmoid, _xavier),
    "sigmoid, batch norm": digits(nn.Sigmoid, batch_norm=True),
    "sigmoid, residual": digits(nn.Sigmoid, residual=True),
    "sigmoid, layer by layer": digits(nn.Sigmoid, 0.1, build=_layer_by_layer),
    "tanh": digits(nn.Tanh),
    "tanh, Xavier": digits(nn.Tanh, _xavier),
    "tanh, orthogonal": digits(nn.Tanh, _orthogonal),
    "ReLU": digits(nn.ReLU),
    "ReLU, He": digits(nn.ReLU, _he),
    "ReLU, batch norm": digits(nn.ReLU, batch_norm=True),
    "ReLU, residual": digits(nn.ReLU, residual=True),
    "ReLU, layer by layer": digits(nn.ReLU, 0.03, build=_layer_by_layer),
    "ReLU, clipping": digits(nn.ReLU, callbacks=clipped),
    "ReLU, the suite with `repair`": digits(nn.ReLU, callbacks=suite),
}

#: The same with ReLU and weights that are far too large, by remedy.
HUGE_WEIGHTS: Experiments = {
    "weights from N(0, 0.4)": digits(nn.ReLU, _huge),
    "L2": digits(nn.ReLU, _huge, weight_decay=0.01),
    "max-norm": digits(nn.ReLU, _huge, max_norm=1.5),
    "clipping": digits(nn.ReLU, _huge, callbacks=clipped),
    "clipping, L2": digits(nn.ReLU, _huge, weight_decay=0.01, callbacks=clipped),
    "clipping, max-norm": digits(nn.ReLU, _huge, max_norm=1.5, callbacks=clipped),
    "He": digits(nn.ReLU, _he),
}

#: A recurrent ReLU network over a hundred characters, by remedy for gradients that explode.
THROUGH_TIME: Experiments = {
    "ReLU, gain 1.1": characters(),
    "clipping to norm 1": characters(clipped),
    "learning rate / 10": characters(lr=0.05),
    "learning rate / 100": characters(lr=0.005),
    "orthogonal, gain 1": characters(gain=1.0),
    "orthogonal, gain 0.8": characters(gain=0.8),
    "L2": characters(weight_decay=0.01),
    "max-norm": characters(max_norm=0.8),
    "truncated BPTT": characters(chunk=20),
    "truncated BPTT, clipping": characters(clipped, chunk=20),
    "LSTM": characters(cell=nn.LSTM, gain=None),
    "LSTM, learning rate * 10": characters(cell=nn.LSTM, gain=None, lr=5.0),
    "GRU": characters(cell=nn.GRU, gain=None),
    "the suite": characters(suite),
}

#: The same with tanh and too high a learning rate: finite, and of no use.
ERRATIC: Experiments = {
    "tanh, gain 1.1, learning rate 2": characters(cell=nn.RNN, lr=2.0),
    "learning rate / 4": characters(cell=nn.RNN, lr=0.5),
    "clipping to norm 1": characters(clipped, cell=nn.RNN, lr=2.0),
    "orthogonal, gain 1": characters(cell=nn.RNN, lr=2.0, gain=1.0),
    "max-norm": characters(cell=nn.RNN, lr=2.0, max_norm=0.8),
    "truncated BPTT": characters(cell=nn.RNN, lr=2.0, chunk=20),
    "LSTM": characters(cell=nn.LSTM, gain=None, lr=2.0),
    "the suite": characters(suite, cell=nn.RNN, lr=2.0),
}
