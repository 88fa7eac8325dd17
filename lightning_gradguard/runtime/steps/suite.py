"""One measurement and one verdict for each optimizer step, shared by the callbacks of one Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.core.backoff import total_rate
from lightning_gradguard.core.norms import Measurement
from lightning_gradguard.core.parameter_names import parameter_names
from lightning_gradguard.runtime import distributed, lightning_api
from lightning_gradguard.runtime.incidents.journal import set_aside_earlier_run
from lightning_gradguard.runtime.incidents.run_summary import RunTotals
from lightning_gradguard.runtime.logging.metrics import MetricBuffer
from lightning_gradguard.runtime.optimizer_hooks import FusedStepOverride
from lightning_gradguard.runtime.steps import dispatch
from lightning_gradguard.runtime.steps.measuring import Measured, StepRequest, measure
from lightning_gradguard.runtime.steps.parameters import ParameterLayout, Selection
from lightning_gradguard.runtime.steps.step import Step, StepFlags, StepVerdict
from lightning_gradguard.runtime.steps.step_member import StepMember

#: Sums over local shards, and what takes the sums over all shards.
PendingSums = tuple[Tensor, Callable[[Tensor], None]]


class Suite:
    """The state that the callbacks of one Trainer share.

    Attributes:
        members: In the order in which they joined.
        open: The open step of each optimizer, by its id, and the ids of the members that it waits for.
        losses: Losses since the last step, as they are differentiated.
        metrics: Metrics of the running batch, on their way to the loggers.
        is_running: True from the start of training to its end: outside, callbacks do nothing.
        is_over: True after the end.
        has_stepped: True if an optimizer stepped in the running batch, and gradients did not only accumulate.
        is_logged: True if the running step is one that the Trainer logs.
        clipped: Share of the last steps of each optimizer whose length clipping has set, as far as known.
        rises_with_data: Steps whose losses were as high after a rollback, until the detectors know.
    """

    def __init__(self) -> None:
        self.members: list[StepMember] = []
        self.open: dict[int, tuple[Step | None, set[int]]] = {}
        self.losses: list[Tensor] = []
        self.metrics = MetricBuffer()
        self.is_running = False
        self.is_over = False
        self.has_stepped = False
        self.is_logged = False
        self.clipped: dict[int, float] = {}
        self.rises_with_data: list[int] = []
        self._checkers: list[StepMember] = []
        self._flagging: list[StepMember] = []
        self._weighing: list[StepMember] = []
        self._may_defer = True
        self._wants_units = False
        self._norm_types: tuple[float, ...] = (2.0,)
        self._layout = ParameterLayout({})
        self._has_scaler = True
        self._overrides: list[FusedStepOverride] = []
        self._deferred: Measurement | Callable[[], Measurement] | None = None
        self._pending: list[PendingSums] = []
        self._totals: RunTotals | None = None
        self._began_at = 0
        self._ended_run: set[int] = set()

    def has(self, member: StepMember) -> bool:
        """True if a member has joined."""
        return any(member is other for other in self.members)

    def join(self, member: StepMember) -> None:
        """Adds a member; what it declares is measured from now on."""
        self.members.append(member)
        for hook, group in (
            ("check_step", self._checkers),
            ("step_flags", self._flagging),
            ("wants_weight_norms", self._weighing),
        ):
            if member.overrides(hook):
                group.append(member)
        self._may_defer = all(checker.defers_check for checker in self._checkers)
        self._wants_units |= member.wants_units
        self._norm_types = tuple(dict.fromkeys((*self._norm_types, *member.norm_types)))

    def begin(self, trainer: pl.Trainer) -> None:
        """Reads the constants of a fit: the sharding of parameters, the GradScaler."""
        set_aside_earlier_run(trainer)
        self._layout = ParameterLayout(lightning_api.flat_shards(trainer), trainer.lightning_module.device)
        self._has_scaler = lightning_api.gradient_scaler(trainer) is not None
        self._began_at = lightning_api.batches_that_stepped(trainer)
        self.is_running = True

    def end(self) -> None:
        """Ends training: the callbacks no longer act, and the optimizers are as before."""
        self.is_running = False
        self.is_over = True
        self.end_overrides()
        for member in self.members:
            dispatch.separate(member)

    @property
    def has_one_checker(self) -> bool:
        """True if the verdict of one member is the verdict on a step."""
        return len(self._checkers) == 1

    def open_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> Step | None:
        """Measures and checks a step; `None` without a gradient: then there is no number either."""
        number = lightning_api.batches_that_stepped(trainer)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self.is_logged = every > 0 and (number + 1) % every == 0
        scaler = lightning_api.gradient_scaler(trainer) if self._has_scaler else None
        losses, self.losses = lightning_api.unscaled_losses(trainer, self.losses, scaler), []
        if self._totals is None:
            self._totals = RunTotals(self._began_at, number, has_all_norms=bool(self._checkers))
        self._totals.last_step = number
        if self._overrides:
            self.end_overrides()
        if self._deferred is not None and self.resolve(trainer, pl_module) == "skip":
            return None
        selection = self._layout.with_gradient(optimizer, partial(parameter_names, pl_module))
        if not selection.names and not losses:
            return None
        if selection.has_dtensors:
            distributed.complete_gradients(selection.parameters)
        flags = StepFlags()
        for i, member in enumerate(self._flagging):
            found = member.step_flags()
            flags = found if i == 0 else StepFlags.merged([flags, found])
        weights = False
        for member in self._weighing:
            weights |= member.wants_weight_norms(trainer)
        pending, self._pending = self._pending, []
        request = StepRequest(
            losses=losses,
            flags=(flags.nonfinite_weights, flags.nonfinite_buffers, flags.repeats_lost_batch),
            norm_types=self._norm_types,
            weights=weights,
            units=self._wants_units,
            rate=total_rate(optimizer) if selection.n_ranks > 1 else 0.0,
            loss_scale=lightning_api.scale_of_gradients(trainer, optimizer) if self._has_scaler else 1.0,
            pending=torch.cat([sums for sums, _ in pending]) if pending else None,
        )
        measured = measure(selection, request)
        if measured.pending is not None:
            _deliver(pending, measured.pending)
        step = self._checked_step(trainer, optimizer, selection, measured, flags)
        self.has_stepped = True
        return step

    def end_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the metrics of the batch, after the last member has ended it."""
        if self._overrides:
            self.end_overrides()
        self.open.clear()
        self.has_stepped = False
        self.metrics.flush(trainer, pl_module)

    def on_host_numbers(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: None, numbers: list[float]
    ) -> None:
        """Takes the total norm of a logged step that no member checks into the totals of the run."""
        self._add_norm(trainer, numbers[0])

    def end_run(self, member: StepMember) -> RunTotals | None:
        """Returns the totals of the run when the last member ends it, once; `None` if it had no step."""
        self._ended_run.add(id(member))
        if len(self._ended_run) < len(self.members):
            return None
        totals, self._totals = self._totals, None
        return totals

    def override_fused_step(
        self, step: Step, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """Has the optimizer's kernel scale its gradients, or skip, in this step; see `FusedStepOverride`."""
        self._overrides.append(FusedStepOverride(step.optimizer, grad_scale=grad_scale, found_inf=found_inf))

    def end_overrides(self) -> None:
        """Restores the optimizers' attributes."""
        for override in self._overrides:
            override.end()
        self._overrides.clear()

    def resolve(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> StepVerdict:
        """Checks the step whose check was deferred, if there is one, and passes the verdict on."""
        deferred, self._deferred = self._deferred, None
        if deferred is None:
            return "accept"
        found = deferred if isinstance(deferred, Measurement) else deferred()
        measurement, verdict = self._check(trainer, found)
        if verdict == "skip":  # losses since then are of weights that are about to be restored
            self.losses = []
        for checker in self._checkers:
            checker.on_deferred_verdict(trainer, pl_module, measurement, verdict)
        return verdict

    def discard_deferred(self) -> None:
        """Drops a deferred check: its step was undone with others."""
        self._deferred = None

    def reduce_over_shards(self, sums: Tensor, selection: Selection, then: Callable[[Tensor], None]) -> None:
        """Adds sums over local shards: in the next step's collective, or at once if none is sharded."""
        if selection.is_sharded:
            self._pending.append((sums * selection.replica_factors, then))
        else:
            then(sums)

    def sum_in_next_step(self, values: Tensor, then: Callable[[Tensor], None]) -> None:
        """Adds up values of all ranks, shape `(n,)`, float64, in the next step's collective."""
        self._pending.append((values, then))

    def flush_pending(self) -> None:
        """Adds up pending sums in a collective of their own, as no further step will include them."""
        pending, self._pending = self._pending, []
        if pending:
            _deliver(pending, distributed.sum_over_ranks(torch.cat([sums for sums, _ in pending])))

    def _check(self, trainer: pl.Trainer, measurement: Measurement) -> tuple[Measurement, StepVerdict]:
        """Returns the strictest verdict; the measurement has the names of those who reject a finite step."""
        verdict: StepVerdict = "accept"
        rejected_by: tuple[str, ...] = ()
        for checker in self._checkers:
            own = checker.check_step(trainer, measurement)
            if own == "skip":
                verdict, rejected_by = own, (*rejected_by, type(checker).__name__)
            elif own == "ignore" and verdict == "accept":
                verdict = own
        if verdict == "accept":
            self._add_norm(trainer, measurement.total_norm)
        elif rejected_by and not measurement.must_skip:
            measurement = replace(measurement, rejected_by=rejected_by)
        return measurement, verdict

    def _add_norm(self, trainer: pl.Trainer, total_norm: float) -> None:
        """Takes the total norm of an accepted step into the totals of the run."""
        if self._totals is None:
            return
        if math.isfinite(total_norm):
            self._totals.largest_norm = max(self._totals.largest_norm, total_norm)
            self._totals.explosion.add(total_norm)
        elif self._totals.nonfinite_since is None:
            self._totals.nonfinite_since = {"step": self._totals.last_step, "epoch": trainer.current_epoch}

    def _checked_step(
        self,
        trainer: pl.Trainer,
        optimizer: Optimizer,
        selection: Selection,
        measured: Measured,
        flags: StepFlags,
    ) -> Step:
        """Returns a measured step with its verdict; `"accept"` while the check is deferred."""
        optimizers = trainer.optimizers
        index = optimizers.index(optimizer) if optimizer in optimizers else 0
        repeats = isinstance(optimizer, lightning_api.REPEATS_CLOSURE)
        # a GradScaler and a closure that is called repeatedly synchronize anyway
        is_exact = repeats or self._has_scaler or flags.check_now or not self._may_defer
        checks_now = bool(self._checkers) and is_exact
        measurement: Measurement | None = None
        verdict: StepVerdict = "accept"
        if checks_now:
            measurement, verdict = self._check(trainer, measured.packed.measurement(index))
        else:
            if measured.packed.is_on_host:
                measurement = measured.packed.measurement(index)
            if self._checkers:
                self._deferred = measurement or partial(measured.packed.measurement, index)
        if measurement is not None:
            measured.gradients.known_norm = measurement.total_norm
        step = Step(
            optimizer=optimizer,
            optimizer_index=index,
            gradients=measured.gradients,
            selection=selection,
            other_norms=measured.other_norms,
            weight_norms=measured.weight_norms,
            is_checked=bool(self._checkers),
            is_deferred=self._deferred is not None,
            packed=measured.packed,
            measurement=measurement,
            verdict=verdict,
            accepted=verdict == "accept",
            inside_closure=repeats,
        )
        if not self._checkers and self._totals is not None:
            self._totals.has_all_norms = measurement is not None
            if measurement is not None:
                self._add_norm(trainer, measurement.total_norm)
            elif self.is_logged:
                self.metrics.add_numbers(self, None, step.gradients.total_norm.reshape(1))
        return step


def _deliver(pending: Sequence[PendingSums], total: Tensor) -> None:
    for (_, then), part in zip(pending, torch.split(total, [len(sums) for sums, _ in pending]), strict=True):
        then(part)


_suites: WeakKeyDictionary[pl.Trainer, Suite] = WeakKeyDictionary()


def suite_of(trainer: pl.Trainer) -> Suite:
    """Returns the suite of a Trainer, a new one if it has none."""
    suite = _suites.get(trainer)
    if suite is None:
        suite = _suites[trainer] = Suite()
    return suite


def forget_suite(trainer: pl.Trainer) -> None:
    """Ends the suite of a Trainer: the next fit begins a new one."""
    suite = _suites.pop(trainer, None)
    if suite is not None:
        suite.end()


def is_logging_step(trainer: pl.Trainer, every_n_steps: int | None = None) -> bool:
    """True if the running step is logged; `None` follows `trainer.log_every_n_steps`."""
    every = trainer.log_every_n_steps if every_n_steps is None else every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (lightning_api.batches_that_stepped(trainer) + 1) % every == 0
