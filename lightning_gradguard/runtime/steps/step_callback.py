"""The base class of callbacks in the shared step: their place in a Trainer, and their turns."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gradguard.core import tags
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.incidents.evaluation import EvaluationWatch
from lightning_gradguard.runtime.incidents.journal import begin_journal
from lightning_gradguard.runtime.incidents.run_summary import summarize
from lightning_gradguard.runtime.logging.hyperparameters import Configured
from lightning_gradguard.runtime.steps import dispatch
from lightning_gradguard.runtime.steps.step_member import StepMember
from lightning_gradguard.runtime.steps.suite import Suite, forget_suite, suite_of

#: Of a callback whose Trainer does not fit; nothing is written to it.
_NO_SUITE = Suite()
_UNOPENED: tuple[None, set[int]] = None, set()


class StepCallback(StepMember, lightning_api.Callback, Configured):
    """Takes part in the shared step: gradients are measured and checked once for all such callbacks.

    Subclass it for your own callback that reads or writes gradients. Declare what is to be measured
    (`norm_types`, `wants_units`, `wants_weight_norms`), then override hooks of `StepMember`: `on_begin`,
    `on_batch_end`, and `on_step`, which is called for each optimizer step after it was measured and
    checked and before it takes place. In any order of the callbacks all of them get the same numbers.
    Where another hook of Lightning is overridden, `super()` has to be called.

    Attributes:
        suite: What the callbacks of the running fit share; read it, and call its methods. Outside of
            training, where `suite.is_running` is false, no hook acts.
        is_single: True if a second one in a Trainer is rejected with any arguments; one that has a state
            always is if it has the same `state_arguments`.
        state_arguments: Arguments that distinguish two instances in a checkpoint.
        verbose: False to print only interventions of the Trainer's callbacks, none of their findings.

    Example:
        >>> import torch
        >>> from lightning_gradguard import Step, StepCallback
        >>> class LargestNorm(StepCallback):
        ...     largest = torch.zeros(())
        ...
        ...     def on_step(self, trainer, pl_module, step: Step):
        ...         if step.accepted:  # a tensor: `float` would make the host wait for the device
        ...             self.largest = torch.maximum(self.largest, step.gradients.total_norm)
        >>> LargestNorm().state_key
        'LargestNorm{}'
    """

    is_single: bool = False
    state_arguments: Mapping[str, Any] = {}
    suite: Suite = _NO_SUITE

    @cached_property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint; Lightning asks for it ahead of every hook."""
        # until `setup`: Lightning would reject two with one key, and `setup` has a better message
        return self._state_key() + f" {id(self):x}" * self._has_state

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy has of this callback; the key that `state_key` made is of one object."""
        return {name: value for name, value in dispatch.own_attributes(self).items() if name != "state_key"}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Joins the suite of this Trainer, and opens the journal of its incidents."""
        self._reject_second(trainer)
        self.state_key = self._state_key()
        if stage == "fit":
            lightning_api.reject_unsupported(trainer, self)
            callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
            if self.overrides("check_step") and not any(
                isinstance(other, StepCallback) and other.skips_steps for other in callbacks
            ):
                raise MisconfigurationException(
                    f"{type(self).__name__}.check_step may reject a step, and no callback skips it: "
                    "add NaNRollback() to those of the Trainer."
                )
            if suite_of(trainer).is_over:  # an exception ended the fit before, without a teardown
                forget_suite(trainer)
            self.suite = suite_of(trainer)
            if not self.suite.has(self):
                self.suite.join(self)
            begin_journal(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        suite = self.suite
        if suite.members and self is suite.members[0] and not suite.is_over:
            suite.begin(trainer)
            dispatch.join(trainer, suite.members, of_first=StepCallback.on_before_backward)
        if suite.is_running:
            self.on_begin(trainer, pl_module)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keeps the loss for the step that it leads to."""
        suite = self.suite
        if suite.is_running and self is suite.members[0]:
            suite.losses.append(loss.detach())

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Takes the callback's turn in the shared step."""
        suite = self.suite
        if not suite.is_running:  # a loop driven by hand, before or after the fit
            return
        step, waiting = suite.open.get(id(optimizer), _UNOPENED)
        if id(self) not in waiting:  # the first to arrive, or the first that arrives again
            step, waiting = suite.open_step(trainer, pl_module, optimizer), set(map(id, suite.members))
            suite.open[id(optimizer)] = step, waiting
        waiting.discard(id(self))
        if not waiting:  # no other member needs it
            del suite.open[id(optimizer)]
        if step is not None:
            self.on_step(trainer, pl_module, step)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Acts after the step is closed; the last callback of the suite sends the metrics."""
        suite = self.suite
        if not suite.is_running:
            return
        self.on_batch_end(trainer, pl_module, batch_idx)
        if self is suite.members[-1]:
            suite.end_batch(trainer, pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Watches for nonfinite metrics, once for all callbacks."""
        if self._is_first_of(trainer) and not trainer.sanity_checking:
            self._evaluation.on_batch_end(trainer, outputs, batch_idx, dataloader_idx)

    on_test_batch_end = on_validation_batch_end

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publishes nonfinite metrics; not before the first step, which names the cause."""
        if self._is_first_of(trainer) and not trainer.sanity_checking:
            self._evaluation.publish(trainer, pl_module, "nonfinite_validation")

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_first_of(trainer):
            self._evaluation.publish(trainer, pl_module, "nonfinite_test")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Completes pending sums, as no step follows."""
        if self.suite.members:
            self.suite.end()
            self.suite.flush_pending()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Restores the optimizers, also if the callback was rejected before it joined; call it last."""
        suite = suite_of(trainer)
        suite.end()
        if suite.has(self):
            self._end_run(trainer, suite)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the suite."""
        if stage == "fit" and self.suite.members:
            forget_suite(trainer)
            suite = self.suite
            del self.suite
            self._end_run(trainer, suite)

    @cached_property
    def _evaluation(self) -> EvaluationWatch:
        return EvaluationWatch()

    def _state_key(self) -> str:
        return f"{type(self).__qualname__}{dict(self.state_arguments)!r}"

    @property
    def _has_state(self) -> bool:
        return type(self).state_dict is not lightning_api.Callback.state_dict

    def _reject_second(self, trainer: pl.Trainer) -> None:
        kind = next((base for base in type(self).__mro__ if "is_single" in vars(base)), StepCallback)
        kind = kind if self.is_single else type(self)
        callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
        alike: list[Any] = [c for c in callbacks if isinstance(c, kind)]
        why = "which would act on each other"
        if not self.is_single:
            alike = [c for c in alike if c._has_state and c.state_arguments == self.state_arguments]
            why = "whose states have one name in a checkpoint"
        if any(other is not self for other in alike):
            of_suite = " default_callbacks takes yours in place of its own."
            raise MisconfigurationException(
                f"The Trainer has {len(alike)} {kind.__name__} callbacks, {why}: keep one of them."
                + of_suite * type(self).__module__.startswith("lightning_gradguard.")
            )

    def _is_first_of(self, trainer: pl.Trainer) -> bool:
        callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return self is next((other for other in callbacks if isinstance(other, StepCallback)), None)

    def _end_run(self, trainer: pl.Trainer, suite: Suite) -> None:
        totals = suite.end_run(self)
        if totals is None or trainer.barebones or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            counts = {tag: n for member in suite.members for tag, n in member.final_counts().items()}
            if totals.largest_norm:
                tag = tags.LARGEST_NORM if totals.has_all_norms else tags.LARGEST_LOGGED_NORM
                counts[tag] = totals.largest_norm
            last = {tag: counts[tag] for tag in (tags.SKIPS, tags.ROLLBACKS) if tag in counts}
            lightning_api.set_callback_metrics(trainer, last)  # of a batch that ended, it was published
            since = max(member.counts_since for member in suite.members)
            summarize(trainer, counts, totals, suite.metrics.last_logged, since)
        except Exception as error:  # of a device that an exception has left unusable, for one
            warnings.warn(f"the run summary could not be written: {error!r}", stacklevel=2)
