"""The suite, and what people use in its place, each as its users use it."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import grad_norm
from torch import Tensor, nn

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GradientNormMonitor,
    InitializationCheck,
    LearningRateBackoff,
    NaNRollback,
    TrainingDiagnosis,
    default_callbacks,
)

#: Of the Trainer: every so many steps one is logged; the others are hot.
LOG_EVERY = 5
#: Steps until policies that learn a threshold have one: their cost is measured from then on.
WARM_UP = 3


@dataclass(frozen=True)
class Variant:
    """A Trainer with something added to it.

    Args:
        offers: Its function.
        source: Origin of the code.
        callbacks: Called for each run.
        arguments: Of the Trainer.
        acts_on_hot_steps: True if it acts at every step, not at logged steps only.
        needs_graph: True if its cost depends on the forward and backward pass.
        logger: Called with a folder.
    """

    offers: str
    source: str
    callbacks: Callable[[], list[pl.Callback]] = list
    arguments: Mapping[str, Any] = field(default_factory=OrderedDict)
    acts_on_hot_steps: bool = True
    needs_graph: bool = False
    logger: Callable[[Path], Logger] = TensorBoardLogger


def gradients(module: nn.Module) -> list[tuple[str, nn.Parameter, Tensor]]:
    """Name, parameter and gradient of those that have one."""
    return [(name, p, p.grad) for name, p in module.named_parameters() if p.grad is not None]


class GradNorm(pl.Callback):
    """Lightning's utility, as its documentation shows it."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class NormLoop(pl.Callback):
    """The total norm as tutorials compute it."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.total = sum(gradient.norm(2).item() ** 2 for _, _, gradient in gradients(pl_module)) ** 0.5


class ZClip(pl.Callback):
    """The package, called as its callback calls it."""

    def __init__(self) -> None:
        # zclip imports `lightning`: only after lightning_gradguard has chosen a Lightning package
        from zclip import ZClip

        self._clip = ZClip(warmup_steps=WARM_UP)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._clip.step(pl_module)


class AutoClip(pl.Callback):
    """The package's clipper of the total norm, at the paper's percentile."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from autoclip.torch import QuantileClip

        self._clip = QuantileClip(pl_module.parameters(), quantile=0.1, global_threshold=True)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._clip.step()


class AdaptiveClipping(pl.Callback):
    """Brock et al.: no unit's gradient is longer than a share of its weights.

    Args:
        by_choice: Choose between the gradient and a clipped copy, as timm does; otherwise multiply by a
            coefficient, as Composer does.
    """

    def __init__(self, *, by_choice: bool) -> None:
        self._by_choice = by_choice

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        for _, parameter, gradient in gradients(pl_module):
            allowed = unit_norm(parameter.detach()).clamp_(min=1e-3).mul_(0.01)
            norm = unit_norm(gradient)
            coefficient = allowed / norm.clamp(min=1e-6)
            if self._by_choice:
                gradient.copy_(torch.where(norm > allowed, gradient * coefficient, gradient))
            else:
                gradient.mul_(coefficient.clamp_(max=1.0))


def unit_norm(tensor: Tensor) -> Tensor:
    """The norm of each row; of a vector, the norm of it all."""
    units = tuple(range(1, tensor.ndim)) or None
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=units, keepdim=units is not None)
    return norm


def is_logged(trainer: pl.Trainer) -> bool:
    """True if the running step is logged."""
    return (trainer.global_step + 1) % LOG_EVERY == 0


class OptimizerMonitor(pl.Callback):
    """Composer's: the norm of each gradient and of all, to the logger."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if not is_logged(trainer):
            return
        norms = {f"l2_norm/grad/{name}": gradient.norm() for name, _, gradient in gradients(pl_module)}
        total = sum(norm**2 for norm in norms.values())
        norms["l2_norm/grad/global"] = torch.as_tensor(total) ** 0.5
        for logger in trainer.loggers:
            logger.log_metrics({name: norm.item() for name, norm in norms.items()}, trainer.global_step)


class Histograms(pl.Callback):
    """A histogram of each gradient."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if is_logged(trainer):
            for name, _, gradient in gradients(pl_module):
                trainer.logger.experiment.add_histogram(name, gradient, trainer.global_step)  # type: ignore[union-attr]


class Watch(pl.Callback):
    """`wandb.watch`, by way of Lightning's logger."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.logger.watch(pl_module, log_freq=LOG_EVERY)  # type: ignore[union-attr]


class DetectAnomaly(pl.Callback):
    """`Trainer(detect_anomaly=True)`, which is on for the whole process, limited to this Trainer's steps."""

    def on_train_batch_start(self, *_: Any) -> None:
        torch.autograd.set_detect_anomaly(True)

    def on_train_batch_end(self, *_: Any) -> None:
        torch.autograd.set_detect_anomaly(False)


class DeepCopy(pl.Callback):
    """Copies weights and optimizer state, as is common without the suite.

    Args:
        every_n_steps: Steps between two copies, each made after the first of them.
    """

    def __init__(self, every_n_steps: int) -> None:
        self._every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % self._every_n_steps == 1:
            self.copied = copy.deepcopy(
                (pl_module.state_dict(), [o.state_dict() for o in trainer.optimizers])
            )


class Idle(pl.Callback):
    """Overrides the hooks that the suite overrides in a training step, and does nothing."""

    def on_train_batch_start(self, *_: Any) -> None: ...
    def on_before_backward(self, *_: Any) -> None: ...
    def on_before_optimizer_step(self, *_: Any) -> None: ...
    def on_train_batch_end(self, *_: Any) -> None: ...


def suite(**rollback: Any) -> list[pl.Callback]:
    """All six callbacks with their defaults.

    Args:
        **rollback: Arguments of `NaNRollback`.
    """
    return default_callbacks(nan_rollback=NaNRollback(**rollback))


def offline(folder: Path) -> Logger:
    """Weights & Biases without a server."""
    os.environ["WANDB_SILENT"] = "true"
    return WandbLogger(save_dir=folder, offline=True)


BARE, AGAIN, IDLE, EXACT, DEFERRED, CLIP = (
    "bare",
    "bare, again",
    "six callbacks that do nothing",
    "suite",
    "suite, deferred",
    "`gradient_clip_val=1.0`",
)
OURS = "this package"
OWN_WORDS = "the published rule, written here"
_ALL_OF_IT = "logs, clips, skips, rolls back, backs off"

#: By name.
VARIANTS = {
    BARE: Variant("", "Lightning"),
    AGAIN: Variant("nothing: shows the noise", "Lightning"),
    EXACT: Variant(_ALL_OF_IT, OURS, suite),
    DEFERRED: Variant(_ALL_OF_IT, OURS, lambda: suite(check="deferred")),
    CLIP: Variant("clips", "Lightning", arguments={"gradient_clip_val": 1.0}),
    "`grad_norm`, `log_dict`": Variant("logs", "Lightning", lambda: [GradNorm()]),
    "`.norm().item()` loop": Variant("measures", "tutorials", lambda: [NormLoop()]),
    "ZClip": Variant("clips", "PyPI, `zclip`", lambda: [ZClip()]),
    "AutoClip": Variant("clips", "PyPI, `autoclip`", lambda: [AutoClip()]),
    "AGC as in timm": Variant("clips", OWN_WORDS, lambda: [AdaptiveClipping(by_choice=True)]),
    "AGC as in Composer": Variant("clips", OWN_WORDS, lambda: [AdaptiveClipping(by_choice=False)]),
    "`detect_anomaly`": Variant("finds NaN", "torch", lambda: [DetectAnomaly()], needs_graph=True),
    "OptimizerMonitor of Composer": Variant(
        "logs", OWN_WORDS, lambda: [OptimizerMonitor()], acts_on_hot_steps=False
    ),
    "histograms in TensorBoard": Variant("logs", "torch", lambda: [Histograms()], acts_on_hot_steps=False),
    "`wandb.watch`": Variant(
        "logs", "PyPI, `wandb`", lambda: [Watch()], acts_on_hot_steps=False, logger=offline, needs_graph=True
    ),
}
PEERS = [name for name, variant in VARIANTS.items() if name not in (BARE, AGAIN, EXACT, DEFERRED)]

#: Timed in addition where a step is all overhead: the calls of hooks alone, and each callback by itself.
SINGLE = {
    IDLE: Variant("nothing: shows the cost of hooks", "Lightning", lambda: [Idle() for _ in range(6)]),
    "`InitializationCheck`": Variant("checks", OURS, lambda: [InitializationCheck()]),
    "`GradientNormMonitor`": Variant("logs norms", OURS, lambda: [GradientNormMonitor()]),
    "`TrainingDiagnosis`": Variant("diagnoses", OURS, lambda: [TrainingDiagnosis()]),
    "`NaNRollback`": Variant("skips, rolls back", OURS, lambda: [NaNRollback()]),
    "`AdaptiveGradientClipping`": Variant("clips", OURS, lambda: [AdaptiveGradientClipping()]),
    "`LearningRateBackoff`": Variant("backs off", OURS, lambda: [LearningRateBackoff()]),
}
EVERY = {**VARIANTS, **SINGLE}
