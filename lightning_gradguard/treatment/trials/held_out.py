"""Records the held-out loss of a run, beside that of the best constant answer, and its incidents."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradguard.core.detectors.best_constant import LEARNS
from lightning_gradguard.core.detectors.diagnosis import LossBaselines, Sample, StepTrace
from lightning_gradguard.core.incidents import Incident
from lightning_gradguard.core.snapshots import preserve_state
from lightning_gradguard.runtime.diagnosis.permutation import target_of
from lightning_gradguard.runtime.incidents.replay import loss_without_trace, without_logging
from lightning_gradguard.runtime.lightning_api import Callback

#: Evaluations of a run, the last at its end, and of one that ends once it has learned.
N_EVALUATIONS, N_EVALUATIONS_UNTIL_ENOUGH = 10, 30
#: Nonfinite evaluations in a row, and losses of batches, that end a run; low evaluations in a row that do.
MAX_NONFINITE, N_ENOUGH = 3, 2
#: Share of the first held-out loss above which little is learned: with momentum, the first steps are slow.
LITTLE_FALLEN = 0.98
#: Losses of the last batches that are compared with it.
N_RECENT = 10
#: Losses whose exponential is one over the probability of the right class.
LIKELIHOODS = frozenset(
    {"cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"}
)


@dataclass(frozen=True)
class Evaluation:
    """The held-out loss at one moment.

    Args:
        loss: Mean over the held-out batches; NaN if one is nonfinite.
        over_constant: Loss over that of the best constant answer, the largest of several losses; NaN if
            unknown.
        over_permuted: Loss over that with permuted targets; NaN if unknown.
        is_likelihood: True if all of the losses are negative logarithms of probabilities of classes.
    """

    loss: float
    over_constant: float = math.nan
    over_permuted: float = math.nan
    is_likelihood: bool = False


def evaluate(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batches: Sequence[Any], *, in_full: bool
) -> Evaluation:
    """Returns the mean loss of `training_step` on held-out batches, in evaluation mode and without a trace.

    In full, it is compared with the best constant answer and with permuted targets.
    """
    baselines, samples, losses, permuted = LossBaselines(), [], [], []
    with ExitStack() as stack:
        stack.enter_context(preserve_state(pl_module))
        stack.enter_context(without_logging(pl_module))
        # a trace recognizes the answers of the network by their graph
        stack.enter_context(torch.set_grad_enabled(in_full))
        stack.enter_context(trainer.precision_plugin.train_step_context())
        torch.manual_seed(0)
        pl_module.eval()
        for i, batch in enumerate(batches):
            on_device = trainer.strategy.batch_to_device(copy.deepcopy(batch))
            if not in_full:
                losses.append(float(loss_without_trace(pl_module, on_device, i)))
                continue
            trace = StepTrace(pl_module, on_device, baselines)
            with trace:
                losses.append(float(loss_without_trace(pl_module, on_device, i)))
            samples.append(trace.sample(0, trace.close(pl_module.device).tolist()))
            target = target_of(on_device)
            if target is not None:
                order = torch.randperm(len(target), generator=torch.Generator().manual_seed(i))
                target.copy_(target[order.to(target.device)])
                permuted.append(float(loss_without_trace(pl_module, on_device, i)))
    loss = _mean(losses)
    functions = {call.function for sample in samples for call in sample.calls}
    is_likelihood = bool(functions) and functions <= LIKELIHOODS
    return Evaluation(loss, _over_constant(samples, loss), _ratio(loss, _mean(permuted)), is_likelihood)


class HeldOutLoss(Callback):
    """Records the held-out loss of a run, its losses and its incidents, and ends it at a deadline.

    Args:
        batches: The held-out batches.
        steps: Batches of the run.
        deadline: On the clock of `time.monotonic`.
        every: Batches between evaluations; a tenth of the run, or a thirtieth with `enough`, if `None`.
        enough: Held-out loss at which the run ends; `None` for a run of all its steps.
        patience: Batches after which the run ends if the held-out loss has not fallen; `None` for all.

    Attributes:
        curve: Step and held-out loss.
        training: Step and loss of the batch.
        last: The last evaluation.
        incidents: Of the run, in their order.
        is_out_of_time: True if the deadline has ended the run.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        steps: int,
        deadline: float,
        every: int | None = None,
        enough: float | None = None,
        patience: int | None = None,
    ) -> None:
        super().__init__()
        self.curve: list[tuple[int, float]] = []
        self.training: list[tuple[int, float]] = []
        self.last = Evaluation(math.nan)
        self.incidents: list[Incident] = []
        self.is_out_of_time = False
        self._batches = batches
        self._deadline = deadline
        self._enough = enough
        self._patience = math.inf if patience is None else patience
        self._steps = steps
        n = N_EVALUATIONS if enough is None else N_EVALUATIONS_UNTIL_ENOUGH
        self._every = max(steps // n if every is None else every, 1)
        self._seen = 0
        self._began = 0.0
        self._durations: list[float] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluates the module as it is initialized."""
        self._evaluate(trainer, pl_module)

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        """Begins to measure the time of a batch."""
        self._began = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Records the loss of the batch, evaluates where that is due, and ends the run at the deadline."""
        self._durations.append(time.perf_counter() - self._began)
        self._seen += 1
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self.training.append((self._seen, float(loss)))
        if self._seen % self._every == 0 and self._seen < self._steps:
            self._evaluate(trainer, pl_module)
            if self._enough is not None and max(loss for _, loss in self.curve[-N_ENOUGH:]) <= self._enough:
                trainer.should_stop = True
            if self._seen >= self._patience and self._is_stuck():
                trainer.should_stop = True
        # running statistics of normalization may need more steps than the loss in training mode
        recent = [value for curve in (self.curve, self.training) for _, value in curve[-MAX_NONFINITE:]]
        if len(self.curve) >= MAX_NONFINITE and not any(map(math.isfinite, recent)):
            trainer.should_stop = True
        if time.monotonic() > self._deadline:
            self.is_out_of_time = trainer.should_stop = True

    def learns_nothing(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """True if the held-out loss is not below that of the best constant answer, and no longer falls."""
        before = next(loss for step, loss in self.curve if 2 * step >= self.curve[-1][0])
        if self.curve[-1][1] <= LITTLE_FALLEN * before:
            return False
        now = evaluate(trainer, pl_module, self._batches, in_full=True)
        return (now.over_constant if math.isfinite(now.over_constant) else now.over_permuted) > LITTLE_FALLEN

    def _is_stuck(self) -> bool:
        """True if the held-out loss has not fallen, and in training mode that of the last batches has not."""
        first, last = self.curve[0][1], self.curve[-1][1]
        # running statistics of normalization settle after what is learned
        of_batches = fmean([loss for _, loss in self.training[-N_RECENT:]] or [math.nan])
        return last > LITTLE_FALLEN * first and not of_batches < LEARNS * first

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluates the trained module, beside the best constant answer."""
        self.last = evaluate(trainer, pl_module, self._batches, in_full=True)
        self._add(self.last)

    def on_training_incident(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, incident: Incident
    ) -> None:
        """Keeps an incident."""
        self.incidents.append(incident)

    def outcome(self) -> dict[str, Any]:
        """Returns what was recorded, by the names that a trial has for it."""
        return {
            "curve": self.curve,
            "training": _thinned(self.training),
            "over_constant": self.last.over_constant,
            "over_permuted": self.last.over_permuted,
            "is_likelihood": self.last.is_likelihood,
            "incidents": dict(Counter(incident.kind for incident in self.incidents)),
            "seconds_per_step": median(self._durations) if self._durations else math.nan,
        }

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._add(evaluate(trainer, pl_module, self._batches, in_full=False))

    def _add(self, evaluation: Evaluation) -> None:
        self.curve.append((self._seen, evaluation.loss))


def _thinned(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Returns at most 200 points of a curve, the last among them."""
    every = max(-(-len(curve) // 200), 1)
    return [*curve[::-1][::every]][::-1]


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses) if losses and all(map(math.isfinite, losses)) else math.nan


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference > 0 else math.nan


def _over_constant(samples: Sequence[Sample], loss: float) -> float:
    """Returns the ratio of the worst of the losses to the best constant, each over all batches."""
    if not samples or not math.isfinite(loss):
        return math.nan
    ratios = []
    for i, last in enumerate(samples[-1].calls):
        values = [s.calls[i].value for s in samples if i < len(s.calls)]
        ratio = _ratio(_mean(values), last.constant)
        if math.isfinite(ratio):
            ratios.append(ratio)
    return max(ratios, default=math.nan)
