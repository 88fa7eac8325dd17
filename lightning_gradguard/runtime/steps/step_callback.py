"""The base class with which a callback takes part in the shared step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gradguard.core import tags
from lightning_gradguard.core.norms import Measurement
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.incidents.run_summary import summarize
from lightning_gradguard.runtime.logging.hyperparameters import Configured
from lightning_gradguard.runtime.steps.step import Step, StepFlags, StepVerdict
from lightning_gradguard.runtime.steps.suite import Suite, forget_suite, suite_of


class StepCallback(lightning_api.Callback, Configured):
    """Takes part in the shared step: gradients are measured and checked once for all such callbacks.

    Subclass it for your own callback that reads or writes gradients. Declare what is to be measured
    (`norm_types`, `wants_units`, `wants_weight_norms`), then override `on_step`, which is called for each
    optimizer step after it was measured and checked and before it takes place, and `on_batch_end`. In any
    order of the callbacks all of them get the same numbers. Where another hook of Lightning is overridden,
    `super()` has to be called.

    Attributes:
        suite: What the callbacks of the running fit share; read it, and call its methods.
        norm_types: Norm types to measure in addition to 2.
        wants_units: True if norms of single units (rows) are to be measured.
        defers_check: True if `check_step` may be called one step late, without a host synchronization.
        state_arguments: Arguments that distinguish two instances in a checkpoint.

    Example:
        >>> from lightning_gradguard import StepCallback
        >>> class LargestNorm(StepCallback):
        ...     largest = 0.0
        ...
        ...     def on_step(self, trainer, pl_module, step):
        ...         if step.accepted:
        ...             self.largest = max(self.largest, float(step.gradients.total_norm))
        >>> LargestNorm().state_key
        'LargestNorm{}'
    """

    norm_types: tuple[float, ...] = ()
    wants_units: bool = False
    defers_check: bool = False
    state_arguments: Mapping[str, Any] = {}
    suite: Suite

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """Called when a step was measured and checked, and the optimizer has not stepped.

        Args:
            trainer: The Trainer that runs.
            pl_module: The module in training.
            step: The step; `step.gradients` has names, tensors, norms, and the total norm.
        """

    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Called after the optimizers stepped, before checkpoints and validation."""

    def check_step(self, trainer: pl.Trainer, measurement: Measurement) -> StepVerdict:
        """Returns the callback's verdict on a step; called only if overridden, and has no side effect."""
        raise NotImplementedError

    def on_deferred_verdict(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        measurement: Measurement,
        verdict: StepVerdict,
    ) -> None:
        """Called with the verdict on the step before, if every check of it was deferred.

        Args:
            trainer: The Trainer that runs.
            pl_module: The module in training.
            measurement: Measurement of the step before.
            verdict: On the step before, which has taken place. If it is `"skip"`, a step that is
                about to be measured does not take place either: its gradients are those of bad weights.
        """

    def step_flags(self) -> StepFlags:
        """Returns flags for the reduction of the next step; called only if overridden."""
        raise NotImplementedError

    def wants_weight_norms(self, trainer: pl.Trainer) -> bool:
        """True if the next step is to be measured for norms of the weights; called only if overridden."""
        raise NotImplementedError

    def final_counts(self) -> Mapping[str, float]:
        """Returns counts of the run, by tag; called at its end, on each rank."""
        return {}

    def overrides(self, hook: str) -> bool:
        """True if the callback implements an optional hook."""
        return getattr(type(self), hook) is not getattr(StepCallback, hook)

    @cached_property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint."""
        return f"{type(self).__qualname__}{dict(self.state_arguments)!r}"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Joins the suite of this Trainer."""
        if stage == "fit":
            lightning_api.reject_unsupported(trainer, self)
            if suite_of(trainer).has(self):  # an exception ended the fit before, without a teardown
                forget_suite(trainer)
            self.suite = suite_of(trainer)
            self.suite.join(self)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins the fit: the strategy has sharded the parameters by now."""
        if self is self.suite.members[0]:
            self.suite.begin(trainer)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keeps the loss for the step that it leads to."""
        if self is self.suite.members[0]:
            self.suite.observe_loss(trainer, loss)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Takes the callback's turn in the shared step."""
        suite = self.suite
        step, arrived = suite.open.get(id(optimizer), (None, None))
        if arrived is None or id(self) in arrived:  # the first to arrive, or the first that arrives again
            step, arrived = suite.open_step(trainer, pl_module, optimizer), set()
            suite.open[id(optimizer)] = step, arrived
        arrived.add(id(self))
        if len(arrived) == len(suite.members):  # no other member needs it
            del suite.open[id(optimizer)]
        if step is not None:
            self.on_step(trainer, pl_module, step)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Acts after the step is closed; the last callback of the suite sends the metrics."""
        self.on_batch_end(trainer, pl_module, batch_idx)
        suite = self.suite
        suite.open.clear()
        suite.ended_batch.add(id(self))
        if len(suite.ended_batch) == len(suite.members):
            suite.ended_batch.clear()
            suite.end_batch(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Completes pending sums, as no step follows."""
        suite_of(trainer).flush_pending()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Restores the optimizers, also if the callback was rejected before it joined; call it last."""
        suite = suite_of(trainer)
        suite.end_overrides()
        if suite.has(self):
            self._end_run(trainer, suite)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the suite."""
        if stage == "fit":
            forget_suite(trainer)
            self._end_run(trainer, self.suite)

    def _end_run(self, trainer: pl.Trainer, suite: Suite) -> None:
        suite.ended_run.add(id(self))
        totals = suite.end_run() if len(suite.ended_run) == len(suite.members) else None
        if totals is None or trainer.barebones or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            counts = {tag: n for member in suite.members for tag, n in member.final_counts().items()}
            if totals.largest_norm:
                tag = tags.LARGEST_NORM if totals.checks_steps else tags.LARGEST_LOGGED_NORM
                counts[tag] = totals.largest_norm
            summarize(trainer, counts, totals.first_step, totals.last_step, suite.metrics.last_logged)
        except Exception as error:  # of a device that an exception has left unusable, for one
            warnings.warn(f"the run summary could not be written: {error!r}", stacklevel=2)
