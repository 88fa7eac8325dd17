"""One optimizer step as a transaction: measured once, checked once, for every callback."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.core.norms import Gradients, Measurement
from lightning_gradguard.core.parameter_names import parameter_names
from lightning_gradguard.core.tags import LARGEST_LOGGED_NORM, LARGEST_NORM
from lightning_gradguard.runtime import distributed, lightning_api
from lightning_gradguard.runtime.fused_optimizer import FusedStepOverride
from lightning_gradguard.runtime.incidents import run_summary
from lightning_gradguard.runtime.logging.hyperparameters import Configured
from lightning_gradguard.runtime.logging.metrics import MetricBuffer
from lightning_gradguard.runtime.steps.measuring import Numbers, Wanted, measure
from lightning_gradguard.runtime.steps.parameters import ParameterLayout, Selection
from lightning_gradguard.runtime.steps.step import Step, Verdict


class StepCallback(lightning_api.Callback, Configured):
    """A callback of the suite: takes part in the shared step and leaves the Trainer as it found it.

    Subclasses override `on_step`, `on_batch_end` and what else they need; `super()` keeps the books.
    """

    #: Norm types that the callback wants measured in addition to 2.
    norm_types: tuple[float, ...] = ()
    #: Whether the callback wants the norms of single units.
    wants_units: bool = False
    #: Whether `judge` is content to be asked one step late: then nobody waits for the device.
    judges_late: bool = False
    #: What tells two instances apart in a checkpoint.
    state_arguments: Mapping[str, Any] = {}

    @cached_property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint."""
        return f"{type(self).__qualname__}{dict(self.state_arguments)!r}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the suite of this Trainer."""
        if stage == "fit":
            lightning_api.reject_unsupported(trainer, self)
            if suite_of(trainer).has(self):  # an exception ended the fit before, without a teardown
                suite_of(trainer).end_overrides()
                del _suites[trainer]
            #: What the callback shares with the others of this Trainer.
            self.suite = suite_of(trainer)
            self.suite.join(self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learn how the strategy has spread the parameters, which it has by now."""
        self.suite.begin(self, trainer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Remember the loss for the step that it leads to."""
        self.suite.observe_loss(self, trainer, loss)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the callback's turn in the shared step."""
        step = self.suite.enter(self, trainer, pl_module, optimizer)
        if step is not None:
            self.on_step(trainer, pl_module, step)
            self.suite.leave(step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Act after the step is closed; the last callback of the suite sends the report."""
        self.on_batch_end(trainer, pl_module, batch_idx)
        self.suite.depart(self, trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave optimizers as they were, also if the callback was refused before it joined; come last."""
        suite = suite_of(trainer)
        suite.end_overrides()
        if suite.has(self):
            suite.end(self, trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the suite."""
        if stage == "fit":
            suite_of(trainer).end_overrides()
            del _suites[trainer]
            self.suite.end(self, trainer)

    def final_counts(self) -> Mapping[str, float]:
        """What the callback has counted in the run, by tag; asked at its end, each rank by itself."""
        return {}

    def judge(self, trainer: pl.Trainer, measurement: Measurement) -> Verdict:
        """What the callback says of a step. Pure, and asked only of callbacks that override it."""
        raise NotImplementedError

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let nothing wait for a step that does not come."""
        suite_of(trainer).deliver()

    def on_late_verdict(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        measurement: Measurement,
        verdict: Verdict,
    ) -> None:
        """Hears, as a judge that is asked late, what became of the step before.

        Args:
            trainer: The Trainer that runs.
            pl_module: The module in training.
            measurement: Of the step before.
            verdict: On the step before, which has taken place meanwhile. If it is `"drop"`, a step that is
                about to be measured does not take place either: its gradients were taken at sick weights.
        """

    def wants_weight_norms(self, trainer: pl.Trainer) -> bool:
        """Whether the step about to be measured is measured for its weights as well; asked if overridden."""
        return False

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """The callback's turn: the step is measured and judged, the optimizer has not stepped."""

    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """After the optimizers stepped, before checkpoints and validation."""


class Suite:
    """What the callbacks of one Trainer share.

    Attributes:
        metrics: Numbers of the running batch.
        nonfinite_weights: Set by whoever looked at the weights, a flag of shape `()` on the device; rides in
            the next step's reduction.
        nonfinite_buffers: The same of buffers, by whoever looked at them after a forward pass.
        serves_lost_batch: Set by whoever knows the batch, until a step was made with it; rides along as well.
        judges_at_once: Set, on all ranks alike, where the next step is not to be judged late.
        has_stepped: Whether an optimizer stepped in the running batch; not so while gradients accumulate.
        is_logged: Whether the running step is one that the Trainer logs.
        largest_norm: The largest total norm of accepted gradients that came to the host.
    """

    def __init__(self) -> None:
        self.metrics = MetricBuffer()
        self.nonfinite_weights: Tensor | None = None
        self.nonfinite_buffers: Tensor | None = None
        self.serves_lost_batch = False
        self.judges_at_once = False
        self.has_stepped = False
        self.is_logged = False
        self.largest_norm = 0.0
        self._first_step = 0
        self._last_step: int | None = None
        self._ended: set[int] = set()
        self._wants_units = False
        self._weighing: list[StepCallback] = []
        self._layout = ParameterLayout({})
        self._overrides: list[FusedStepOverride] = []
        self._unread: tuple[Numbers, int] | None = None
        self._carried: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        self._members: list[StepCallback] = []
        self._judges: list[StepCallback] = []
        self._norm_types: tuple[float, ...] = (2.0,)
        self._open: dict[int, tuple[Step, set[int]]] = {}
        self._departed: set[int] = set()
        self._losses: list[Tensor] = []

    def has(self, member: StepCallback) -> bool:
        """Whether a callback has joined."""
        return any(member is other for other in self._members)

    def join(self, member: StepCallback) -> None:
        """Take a callback in; what it declares is measured from now on."""
        self._members.append(member)
        if type(member).judge is not StepCallback.judge:
            self._judges.append(member)
        if type(member).wants_weight_norms is not StepCallback.wants_weight_norms:
            self._weighing.append(member)
        self._wants_units |= member.wants_units
        self._norm_types = tuple(dict.fromkeys((*self._norm_types, *member.norm_types)))

    def begin(self, member: StepCallback, trainer: pl.Trainer) -> None:
        """Learn, once for all, how the strategy has spread the parameters."""
        if member is self._members[0]:
            self._layout = ParameterLayout(
                lightning_api.flat_shards(trainer), trainer.lightning_module.device
            )

    @property
    def has_one_judge(self) -> bool:
        """Whether what one callback says is the verdict."""
        return len(self._judges) == 1

    def observe_norm(self, total_norm: float) -> None:
        """Takes the total norm of an accepted step, on the host, for the largest one of the run."""
        self.largest_norm = max(self.largest_norm, total_norm)

    def ride(self, step: Step, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Have the optimizer scale its gradients, or skip, in the running step; see `FusedStepOverride`."""
        self._overrides.append(FusedStepOverride(step.optimizer, grad_scale=grad_scale, found_inf=found_inf))

    def end_overrides(self) -> None:
        """Leave the optimizers as they were."""
        for ride in self._overrides:
            ride.end()
        self._overrides.clear()

    def observe_loss(self, member: StepCallback, trainer: pl.Trainer, loss: Tensor) -> None:
        """Remember a loss, once, whichever callbacks there are."""
        if member is self._members[0]:
            self._losses.append(lightning_api.unscaled_loss(trainer, loss))

    def enter(
        self,
        member: StepCallback,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer,
    ) -> Step | None:
        """The open step of an optimizer; the first to arrive opens it, a second arrival opens the next.

        Returns:
            The step, or `None` if there is no gradient: then there is no number either.
        """
        step, arrived = self._open.get(id(optimizer), (None, set()))
        if step is None or id(member) in arrived:
            self.is_logged = is_logging_step(trainer)
            step, arrived = self._measure(trainer, pl_module, optimizer), set()
            if step is not None:
                self.has_stepped = True
                self._open[id(optimizer)] = (step, arrived)
        arrived.add(id(member))
        return step

    def leave(self, step: Step) -> None:
        """Close the step when every callback had its turn: references to gradients are let go."""
        _, arrived = self._open[id(step.optimizer)]
        if len(arrived) == len(self._members):
            del self._open[id(step.optimizer)]

    def depart(self, member: StepCallback, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a callback's part in the batch; with the last one the report goes out."""
        self._open.clear()
        self._departed.add(id(member))
        if len(self._departed) == len(self._members):
            self._departed.clear()
            self.end_overrides()
            if self.has_stepped:
                self.has_stepped = self.serves_lost_batch = self.judges_at_once = False
            self.metrics.flush(trainer, pl_module)

    def end(self, member: StepCallback, trainer: pl.Trainer) -> None:
        """End a callback's part in the run; with the last one, what the run came to is told."""
        self._ended.add(id(member))
        if len(self._ended) < len(self._members) or self._last_step is None:
            return
        step, self._last_step = self._last_step, None
        if trainer.barebones or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            counts = {tag: count for other in self._members for tag, count in other.final_counts().items()}
            if self.largest_norm:
                # without a judge, it is logged steps that came to the host
                counts[LARGEST_NORM if self._judges else LARGEST_LOGGED_NORM] = self.largest_norm
            run_summary.summarize(trainer, counts, self._first_step, step, self.metrics.last_logged)
        except Exception as error:  # of a device that an exception has left unusable, for one
            warnings.warn(f"what the run came to could not be told: {error!r}", stacklevel=2)

    def settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Verdict:
        """Judge the step that has not been judged yet, if there is one, and tell the judges."""
        unread, self._unread = self._unread, None
        if unread is None:
            return "accept"
        numbers, index = unread
        measurement = numbers.read(index)
        verdict = self._ask(trainer, measurement)
        if verdict == "drop":  # what was seen since then was seen of what is undone now
            self._losses = []
            self.nonfinite_weights = self.nonfinite_buffers = None
        for judge in self._judges:
            judge.on_late_verdict(trainer, pl_module, measurement, verdict)
        return verdict

    def forget(self) -> None:
        """Do not judge the step that has not been judged yet: it was undone with others."""
        self._unread = None

    def _ask(self, trainer: pl.Trainer, measurement: Measurement) -> Verdict:
        verdicts = [judge.judge(trainer, measurement) for judge in self._judges]
        order: tuple[Verdict, ...] = ("drop", "ignore")
        verdict: Verdict = next((v for v in order if v in verdicts), "accept")
        if verdict == "accept":
            self.observe_norm(measurement.total_norm)
        return verdict

    def _measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> Step | None:
        losses, self._losses = self._losses, []
        step = lightning_api.batches_that_stepped(trainer)
        self._first_step = step if self._last_step is None else self._first_step
        self._last_step = step
        self.end_overrides()
        if self.settle(trainer, pl_module) == "drop":
            return None
        naming = partial(parameter_names, pl_module)
        selection = self._layout.with_gradient(optimizer, naming)
        if not selection.names and not losses:
            return None
        if selection.is_sharded:
            distributed.complete_gradients(selection.parameters)
        carried, self._carried = self._carried, []
        seen = measure(
            selection,
            losses,
            (self.nonfinite_weights, self.nonfinite_buffers, self.serves_lost_batch),
            wanted=Wanted(
                norm_types=self._norm_types,
                weights=any(member.wants_weight_norms(trainer) for member in self._weighing),
                units=self._wants_units,
                loss_scale=lightning_api.scale_of_gradients(trainer, optimizer),
            ),
            carried=torch.cat([sums for sums, _ in carried]) if carried else None,
        )
        self.nonfinite_weights = self.nonfinite_buffers = None
        if seen.carried is not None:
            self._hand_out(carried, seen.carried)
        index = next((i for i, o in enumerate(trainer.optimizers) if o is optimizer), 0)
        repeats = lightning_api.calls_closure_repeatedly(optimizer)
        measurement: Measurement | None = None
        verdict: Verdict = "accept"
        if self._judges:
            # a GradScaler and a closure that is called repeatedly wait for the device anyway
            waits = repeats or lightning_api.gradient_scaler(trainer) is not None or self.judges_at_once
            if waits or not all(judge.judges_late for judge in self._judges):
                measurement = seen.numbers.read(index)
                verdict = self._ask(trainer, measurement)
            else:
                self._unread = (seen.numbers, index)
        return Step(
            optimizer=optimizer,
            optimizer_index=index,
            gradients=Gradients(
                names=selection.names,
                parameters=selection.parameters,
                tensors=seen.tensors,
                norms=seen.tensor_norms[2.0],
                total_norm=seen.total_norm,
                units=seen.units,
                known_norm=None if measurement is None else measurement.total_norm,
            ),
            selection=selection,
            tensor_norms=seen.tensor_norms,
            weight_norms=seen.weight_norms,
            is_judged=bool(self._judges),
            numbers=seen.numbers,
            measurement=measurement,
            verdict=verdict,
            inside_closure=repeats,
        )

    def add_over_shards(self, sums: Tensor, selection: Selection, then: Callable[[Tensor], None]) -> None:
        """Have sums over local shards added up: with the next step's collective, or at once if none are cut.

        Args:
            sums: By parameter, shape `(n,)`, float64.
            selection: The parameters.
            then: Called with the sums over all shards.
        """
        if selection.is_cut:
            self._carried.append((sums * selection.shares, then))
        else:
            then(sums)

    def deliver(self) -> None:
        """Add up what still waits for a step, which does not come."""
        carried, self._carried = self._carried, []
        if carried:
            self._hand_out(carried, distributed.sum_over_ranks(torch.cat([sums for sums, _ in carried])))

    def _hand_out(self, carried: Sequence[tuple[Tensor, Callable[[Tensor], None]]], total: Tensor) -> None:
        for (_, then), part in zip(
            carried, torch.split(total, [len(sums) for sums, _ in carried]), strict=True
        ):
            then(part)


_suites: WeakKeyDictionary[pl.Trainer, Suite] = WeakKeyDictionary()


def suite_of(trainer: pl.Trainer) -> Suite:
    """What the callbacks of this Trainer share."""
    suite = _suites.get(trainer)
    if suite is None:
        suite = _suites[trainer] = Suite()
    return suite


def is_logging_step(trainer: pl.Trainer, every_n_steps: int | None = None) -> bool:
    """Whether the running step is logged; `None` follows `trainer.log_every_n_steps`."""
    every = trainer.log_every_n_steps if every_n_steps is None else every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (lightning_api.batches_that_stepped(trainer) + 1) % every == 0
