"""The shared step keeps its promises where callbacks, optimizers and fits are combined in unusual ways."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GlobalNormClipping,
    GradientNormMonitor,
    LearningRateBackoff,
    NaNRollback,
    PerTensorClipping,
    StepCallback,
    default_callbacks,
)
from lightning_gradguard.core.norms import PackedMeasurement
from lightning_gradguard.runtime.steps import trainer_state
from lightning_gradguard.runtime.steps.step import Step
from tests.tasks import NOT_A_NUMBER, Batch, Classifier, Listener, batches, fit, insert, plain_loader


def is_finite(module: nn.Module) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())


class Steps(StepCallback):
    """Records the optimizer of each step that it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[int] = []

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        self.indices.append(step.optimizer_index)


def deferred() -> NaNRollback:
    return NaNRollback(check="deferred")


@pytest.mark.parametrize(
    "suite",
    [
        lambda: [deferred()],
        lambda: [deferred(), LearningRateBackoff()],
        lambda: [AdaptiveGradientClipping(GlobalNormClipping(0.1)), deferred()],
        lambda: [GradientNormMonitor(every_n_steps=1), deferred()],
        lambda: default_callbacks(nan_rollback=deferred()),
    ],
    ids=["alone", "backoff", "clipping", "monitor", "all"],
)
def test_fused_kernel_skips_beside_other_callbacks(
    monkeypatch: pytest.MonkeyPatch, suite: Callable[[], Sequence[pl.Callback]]
) -> None:
    """On a device, only the first step, in which the optimizer's state is created, copies the training state.

    A host that knows the numbers of a good step copies nothing.
    """
    copies: list[bool] = []
    capture = trainer_state.capture

    def counted(*args: Any, **kwargs: Any) -> None:
        copies.extend([kwargs["stepped"]] if "stepped" in kwargs else [])
        capture(*args, **kwargs)

    monkeypatch.setattr(trainer_state, "capture", counted)
    fit(Classifier("adamw fused"), batches(8), suite())
    assert copies == []
    monkeypatch.setattr(PackedMeasurement, "is_on_host", False)
    fit(Classifier("adamw fused"), batches(8), suite())
    assert copies == [True] + [False] * 7


class _Raises(pl.Callback):
    """Raises once at the end of the fourth batch, and from `on_exception` if told to."""

    def __init__(self, *, from_on_exception: bool) -> None:
        self.batches = 0
        self.from_on_exception = from_on_exception

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1
        if self.batches == 4:
            raise ValueError("from a callback of the user")

    def on_exception(self, *_: Any) -> None:
        if self.from_on_exception:
            raise RuntimeError("from on_exception")


@pytest.mark.lightning("2.6", "EMAWeightAveraging is new")
@pytest.mark.parametrize("from_on_exception", [False, True])
def test_averages_update_in_a_fit_after_an_exception(from_on_exception: bool, tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import EMAWeightAveraging

    average, raises = EMAWeightAveraging(decay=0.5), _Raises(from_on_exception=from_on_exception)
    module = Classifier()
    bad = insert(insert(batches(8), 2, NOT_A_NUMBER), 3, NOT_A_NUMBER)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        callbacks=[raises, NaNRollback(patience=2), average],
    )
    with pytest.raises((ValueError, RuntimeError)):
        trainer.fit(module, plain_loader(bad))
    trainer.fit(module, plain_loader(batches(8)))
    assert average._average_model is not None
    assert int(average._average_model.n_averaged) >= 8


class _AdamThenLBFGS(pl.LightningModule):
    """Two networks, of which one is stepped by LBFGS."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(20, 4), nn.Linear(20, 4)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        adam, lbfgs = optimizers
        loss = nn.functional.cross_entropy(self.one(batch[0]), batch[1])
        adam.zero_grad()
        self.manual_backward(loss * (math.nan if batch_idx == 3 else 1.0))
        adam.step()

        def closure() -> Tensor:
            lbfgs.zero_grad()
            other = nn.functional.cross_entropy(self.other(batch[0]), batch[1])
            self.manual_backward(other)
            return other

        lbfgs.step(closure=closure)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.one.parameters(), lr=1e-2),
            torch.optim.LBFGS(self.other.parameters(), lr=0.1, max_iter=4),
        ]


def test_a_skip_ahead_of_lbfgs_counts_once() -> None:
    rollback, incidents = NaNRollback(patience=3), Listener()
    fit(_AdamThenLBFGS(), batches(10), [rollback, incidents])
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert [incident.action for incident in incidents.found].count("skipped") == 1


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_good_steps_beside_lbfgs_count_once(check: Any) -> None:
    rollback = NaNRollback(check=check)
    fit(_AdamThenLBFGS(), batches(3), [rollback])
    assert rollback.state_dict()["recovery"]["good_steps"] == 6


class _Change(pl.Callback):
    """Changes the Trainer's list of callbacks in mid-run."""

    def __init__(self, change: Callable[[list[Any]], Any], at: int) -> None:
        self.change, self.at = change, at

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.at:
            self.change(trainer.callbacks)


@pytest.mark.parametrize(
    "change",
    [lambda callbacks: callbacks.pop(0), lambda callbacks: callbacks.reverse()],
    ids=["pop", "reverse"],
)
def test_a_bad_step_is_skipped_after_callbacks_have_changed(change: Callable[[list[Any]], Any]) -> None:
    module, rollback = Classifier(), NaNRollback()
    suite = [GradientNormMonitor(), rollback, _Change(change, at=2)]
    fit(module, insert(batches(10), 6, NOT_A_NUMBER), suite)
    assert rollback.skips == 1
    assert is_finite(module)


def test_a_bad_step_is_skipped_beside_a_callback_that_is_listed_twice() -> None:
    module, rollback, twice = Classifier(), NaNRollback(), Steps()
    trainer_callbacks = [twice, GradientNormMonitor(), rollback]

    class Twice(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.callbacks.append(twice)

    fit(module, insert(batches(10), 6, NOT_A_NUMBER), [Twice(), *trainer_callbacks])
    assert rollback.skips == 1
    assert is_finite(module)


class _TwoOptimizers(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(20, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        one, other = optimizers
        for optimizer, loss in (
            (one, nn.functional.cross_entropy(self.net(batch[0]), batch[1])),
            (other, self.critic(batch[0]).square().mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss * (math.nan if batch_idx == 5 else 1.0))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net.parameters(), lr=0.05),
            torch.optim.SGD(self.critic.parameters(), lr=0.05),
        ]


def test_a_step_within_a_step_hides_neither() -> None:
    class Nested(pl.Callback):
        """Steps the second optimizer from within the step of the first."""

        is_nested = False

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if optimizer is trainer.optimizers[0] and not self.is_nested:
                self.is_nested = True
                second = module.optimizers()[1]
                second.zero_grad()
                module.manual_backward(module.critic(torch.ones(2, 20)).square().mean())
                second.step()
                self.is_nested = False

    module, rollback, steps = _TwoOptimizers(), NaNRollback(), Steps()
    fit(module, batches(8), [GradientNormMonitor(), Nested(), rollback, steps])
    assert steps.indices == [1, 0, 1] * 8
    assert rollback.skips == 2
    assert is_finite(module)


def test_optimizers_that_are_rebuilt_keep_their_index() -> None:
    class Rebuild(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.strategy.setup_optimizers(trainer)

    steps = Steps()
    fit(_TwoOptimizers(), batches(3), [Rebuild(), NaNRollback(), steps], max_epochs=2)
    assert steps.indices == [0, 1] * 6


def test_of_two_clippers_the_value_on_the_host_is_logged() -> None:
    class Logged(pl.loggers.Logger):
        name, version = "logged", 0

        def __init__(self) -> None:
            super().__init__()
            self.coefficients: list[float] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.coefficients += [metrics["clip/coefficient"]] if "clip/coefficient" in metrics else []

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            """Not of interest."""

    class Coefficients(GlobalNormClipping):
        seen: list[float] = []

        def coefficients(self, gradients: Any) -> Any:
            found = super().coefficients(gradients)
            self.seen.append(float(found))
            return found

    logged = Logged()
    clippers = [
        AdaptiveGradientClipping(PerTensorClipping()),
        AdaptiveGradientClipping(Coefficients(0.05)),
    ]
    fit(Classifier(), batches(4), [*clippers, NaNRollback()], logger=logged, log_every_n_steps=1)
    assert logged.coefficients == pytest.approx(Coefficients.seen)


def test_two_callbacks_whose_states_have_one_name_are_rejected() -> None:
    for callbacks in (
        [GradientNormMonitor(), GradientNormMonitor(every_n_steps=3)],
        [AdaptiveGradientClipping(), AdaptiveGradientClipping()],
    ):
        words = (
            f"The Trainer has 2 {type(callbacks[0]).__name__} callbacks, .*keep one .* in place of its own"
        )
        with pytest.raises(MisconfigurationException, match=words):
            fit(Classifier(), batches(1), callbacks)
    total = GradientNormMonitor(level="total", every_n_steps=1)
    parts = [GradientNormMonitor(include=[name]) for name in ("net.0", "net.6")]
    fit(Classifier(), batches(1), [total, GradientNormMonitor(level="module"), *parts, _Plain(), _Plain()])


def test_a_copy_of_a_callback_that_has_been_in_a_trainer_is_rejected_likewise() -> None:
    rollback = NaNRollback()
    pl.Trainer(callbacks=[rollback], accelerator="cpu", logger=False, enable_checkpointing=False)
    for other in (copy.deepcopy(rollback), pickle.loads(pickle.dumps(rollback))):
        with pytest.raises(MisconfigurationException, match="The Trainer has 2 NaNRollback callbacks"):
            fit(Classifier(), batches(1), [rollback, other])


class _Plain(StepCallback):
    """Has no state."""
