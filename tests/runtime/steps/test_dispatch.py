"""Lightning calls one hook for callbacks that are neighbours, none that does nothing, and all others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.profilers import SimpleProfiler

from lightning_gradguard import GradientNormMonitor, InitializationCheck, NaNRollback, default_callbacks
from lightning_gradguard.runtime.steps.dispatch import HOOKS
from tests.tasks import Classifier, batches, fit, poisoned

Called = list[tuple[str, str]]


class Counts(GradientNormMonitor):
    """Overrides a hook that does nothing, and one that only the first callback needs."""

    n = 0

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        super().on_after_backward(trainer, pl_module)
        self.n += 1

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        self.n += 1


class Looks(pl.Callback):
    """Keeps the hooks that Lightning would call in the last batch, and what it has of the others by then."""

    def __init__(self) -> None:
        self.called: Called = []
        self.copies: list[Any] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        others = [callback for callback in trainer.callbacks if callback is not self]
        self.called = [
            (type(callback).__name__, hook)
            for hook in HOOKS
            for callback in others
            if callable(getattr(callback, hook))
        ]
        self.copies = [copy.copy(callback) for callback in others if isinstance(callback, Counts)]


def test_neighbours_share_a_hook_while_training_runs() -> None:
    callbacks, looks = default_callbacks(gradient_norm_monitor=Counts()), Looks()
    counts = callbacks[1]
    assert isinstance(counts, Counts)
    for n in (1, 2):  # the second fit goes on where the first has ended
        fit(Classifier(), batches(6), [*callbacks, looks])
        assert looks.called == [
            ("TrainingDiagnosis", "on_train_batch_start"),
            ("NaNRollback", "on_train_batch_start"),
            ("Counts", "on_before_backward"),
            ("Counts", "on_after_backward"),
            ("Counts", "on_before_optimizer_step"),
            ("Counts", "on_train_batch_end"),
        ]
        assert counts.n == n * 2 * 6
        assert all(callable(getattr(c, hook)) for c in (*callbacks, *looks.copies) for hook in HOOKS)


def test_another_callback_in_between_has_its_turn() -> None:
    monitor, looks, others = default_callbacks()[1], Looks(), default_callbacks()[2:]
    fit(Classifier(), batches(3), [monitor, looks, *others])
    assert [name for name, hook in looks.called if hook == "on_before_optimizer_step"] == [
        "GradientNormMonitor",
        "TrainingDiagnosis",
    ]


@pytest.mark.parametrize("place", range(6))
def test_neighbours_are_joined_anew_after_one_was_removed(place: int) -> None:
    class Removes(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, i: int) -> None:
            if i == 1:
                removed.append(trainer.callbacks.pop(place))

    removed: list[Any] = []
    suite, looks = default_callbacks(), Looks()
    rollback = next(callback for callback in suite if isinstance(callback, NaNRollback))
    module = Classifier()
    fit(module, poisoned(batches(8), nan=[5]), [*suite, Removes(), looks])
    left = [type(callback).__name__ for callback in suite[1:] if callback not in removed]
    assert [name for name, hook in looks.called if hook == "on_before_optimizer_step"] == [left[0], "Removes"]
    assert rollback.skips == (rollback not in removed)
    assert all(callable(getattr(c, hook)) for c in suite if c not in removed for hook in HOOKS)


def test_rollback_after_another_callback_has_come_to_the_front() -> None:
    class Comes(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, i: int) -> None:
            if i == 3:
                trainer.callbacks = [pl.Callback(), *trainer.callbacks]
                next(pl_module.parameters()).data.fill_(float("nan"))

    suite, module = default_callbacks(), Classifier()
    rollback = next(callback for callback in suite if isinstance(callback, NaNRollback))
    fit(module, batches(8), [*suite, Comes()])
    assert rollback.rollbacks == 1
    assert all(bool(weight.isfinite().all()) for weight in module.parameters())


def test_a_profiler_sees_every_hook() -> None:
    callbacks, profiler = default_callbacks(), SimpleProfiler()
    fit(Classifier(), batches(3), callbacks, profiler=profiler)
    for callback in callbacks:
        for hook in HOOKS:
            assert len(profiler.recorded_durations[f"[Callback]{callback.state_key}.{hook}"]) == 3


def test_a_callback_that_another_one_calls_keeps_its_hooks() -> None:
    class Wrapper(pl.Callback):
        def __init__(self, wrapped: pl.Callback) -> None:
            for hook in ("setup", "on_train_start", *HOOKS, "on_train_end", "teardown"):
                vars(self)[hook] = getattr(wrapped, hook)

    check, monitor = InitializationCheck(), Counts()
    fit(Classifier(), batches(3), [Wrapper(check), Wrapper(monitor)])
    assert check.values
    assert monitor.n == 2 * 3


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_is_set_on_an_object_stays_and_is_called(name: str) -> None:
    callbacks, calls = default_callbacks(), []
    hook = getattr(callbacks[2], name)

    def counting(*arguments: Any, **named: Any) -> None:
        calls.append(name)
        hook(*arguments, **named)

    setattr(callbacks[2], name, counting)
    fit(Classifier(), batches(4), callbacks)
    assert calls == [name] * 4
    assert vars(callbacks[2])[name] is counting


def test_hooks_are_called_again_after_an_exception() -> None:
    class Raises(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    callbacks = default_callbacks()
    with pytest.raises(ZeroDivisionError):
        fit(Classifier(), batches(3), [*callbacks, Raises()])
    assert all(callable(getattr(callback, hook)) for callback in callbacks for hook in HOOKS)


def test_another_list_without_the_suite_ends_its_part_and_not_the_fit() -> None:
    class Leaves(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
            if i == 3:
                trainer.callbacks = [self]

    trainer = fit(Classifier(), batches(8), [Leaves(), *default_callbacks()])
    assert trainer.global_step == 8
