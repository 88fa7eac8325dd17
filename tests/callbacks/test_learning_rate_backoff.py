"""The learning rate is scaled exactly, only while the optimizer steps, under every scheduler."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from lightning_gradguard import (
    AdaptiveGradientClipping,
    Incident,
    LearningRateBackoff,
    NaNRollback,
    ZScoreClipping,
    default_callbacks,
)
from lightning_gradguard.core import tags
from lightning_gradguard.core.backoff import ScaledLearningRate, pending_rate_scale
from tests.tasks import OPTIMIZERS, Batch, Classifier, Listener, RateSpy, batches, fit, poisoned

Make = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, Make] = {
    "none": lambda o: None,
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.95),
    "step": lambda o: schedulers.StepLR(o, 4),
    "multistep": lambda o: schedulers.MultiStepLR(o, [3, 9]),
    "constant": lambda o: schedulers.ConstantLR(o, 0.5, 6),
    "linear": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 10),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 15),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 15),
    "cosine with floor": lambda o: schedulers.CosineAnnealingLR(o, 15, eta_min=0.01),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 4),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.2, total_steps=25),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 4), schedulers.ExponentialLR(o, 0.9)]
    ),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 5), schedulers.CosineAnnealingLR(o, 15)], [5]
    ),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=2),
}


def rates(make: Make, scale: float | None, tensor: bool = False) -> tuple[list[float], list[float]]:
    """Learning rates as asked for and as used, over 20 steps; the scale is set at the sixth."""
    weight = nn.Parameter(torch.zeros(1))
    lr: Any = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    optimizer = torch.optim.SGD([weight], lr=lr, momentum=0.5)
    scheduler = make(optimizer)
    guard = ScaledLearningRate(optimizer) if scale is not None else None
    asked, used = [], []

    def spy(*_: Any) -> None:
        used.append(float(optimizer.param_groups[0]["lr"]))

    optimizer.register_step_pre_hook(spy)
    for step in range(20):
        if guard is not None and step == 5:
            guard.scale = scale or 1.0
        asked.append(float(optimizer.param_groups[0]["lr"]))
        weight.grad = torch.ones(1)
        optimizer.step()
        if scheduler is not None:
            scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
    return asked, used


@pytest.mark.parametrize("name", SCHEDULERS)
def test_exact_under_every_scheduler(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice on the order of its own schedulers
        reference, _ = rates(SCHEDULERS[name], None)
        asked, used = rates(SCHEDULERS[name], 0.25)
    assert asked == reference
    assert used == reference[:5] + [0.25 * lr for lr in reference[5:]]


def test_tensor_rate_is_restored_bit_for_bit() -> None:
    asked, used = rates(SCHEDULERS["none"], 0.3, tensor=True)
    assert asked == [0.1] * 20
    assert used[5:] == [0.1 * 0.3] * 15


def test_several_groups() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.5}])
    guard = ScaledLearningRate(optimizer)
    guard.scale = 0.5
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert (a.item(), b.item()) == (-0.5, -0.25)
    assert guard.scheduled() == [1.0, 0.5]


def test_a_closure_that_raises_costs_no_rate() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = ScaledLearningRate(optimizer)
    guard.scale = 0.5

    def fails() -> float:
        raise RuntimeError("out of memory")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(fails)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == -0.5
    guard.remove()
    assert optimizer.param_groups[0]["lr"] == 1.0
    optimizer.step()
    assert weight.item() == -1.5


def test_a_rate_set_by_the_closure_stays() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = ScaledLearningRate(optimizer)
    guard.scale = 0.5

    def sets() -> float:
        optimizer.param_groups[0]["lr"] = 0.125
        return 0.0

    optimizer.step(sets)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_backoff_follows_rollbacks_but_not_skips() -> None:
    lone = poisoned(batches(30), nan=[5, 10, 15, 20])
    backoff = LearningRateBackoff()
    fit(Classifier(), lone, [backoff, NaNRollback()])
    assert backoff.scale == 1.0
    storm = poisoned(batches(40), nan=[20, 21, 22])
    fit(Classifier(), storm, [backoff := LearningRateBackoff(), rollback := NaNRollback()])
    assert (rollback.rollbacks, backoff.scale) == (1, 1.0), "the data are at fault"
    backoff = LearningRateBackoff(factor=0.25, rewarm_steps=10)
    unexamined = NaNRollback(max_dossiers=0, snapshot_every_n_steps=5)
    module = Classifier()
    used: list[float] = []

    said: list[Incident] = []

    class Spy(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            (optimizer,) = trainer.optimizers
            optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))

        def on_training_incident(self, trainer: pl.Trainer, pl_module: Any, incident: Incident) -> None:
            said.append(incident)

    trainer = fit(module, storm, [backoff, unexamined, Spy()])
    assert [i.value for i in said if i.kind == "learning_rate_backoff"] == [0.25]  # not where it re-warms
    assert used[:23] == [0.05] * 23
    assert used[23] == pytest.approx(0.05 * 0.25 * 0.1)
    assert used[-1] == pytest.approx(0.05 * 0.25)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if "tensor rate" in name])
def test_tensor_rate_is_restored_bit_for_bit_in_a_fit(optimizer: str) -> None:
    backoff = LearningRateBackoff(factor=0.3, rewarm_steps=5)
    spy, asked = RateSpy(backoff), OPTIMIZERS[optimizer]([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]
    rollback = NaNRollback(patience=1, max_dossiers=0)
    fit(Classifier(optimizer), poisoned(batches(31), nan=[15]), [rollback, backoff, spy])
    assert len(spy.used) == len(spy.scheduled) == 31
    assert spy.scales[:16] == [1.0] * 16
    assert spy.scales[-1] == 0.3
    assert all(torch.equal(rate, asked) for rate in spy.scheduled)
    for rate, scale in zip(spy.used, spy.scales, strict=True):
        assert torch.equal(rate, asked * scale)


def test_exception_in_training_restores_the_rate() -> None:
    class Fails(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            if batch_idx == 30:
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    module = Fails()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, poisoned(batches(40), nan=[20, 21, 22]), [LearningRateBackoff(), NaNRollback()])
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize(("name", "value"), [("factor", 1.5), ("min_scale", 0), ("cooldown_steps", -1)])
def test_bad_arguments_are_quoted(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        LearningRateBackoff(**{name: value})


def test_several_scales_of_one_optimizer_multiply_and_leave_the_rate_as_it_was() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    rates = [ScaledLearningRate(optimizer) for _ in range(2)]
    rates[0].scale, rates[1].scale = 0.5, 0.25
    weight.grad = torch.ones(1)
    assert pending_rate_scale(optimizer) == 0.125
    optimizer.step()
    assert weight.item() == pytest.approx(-0.0125)
    assert optimizer.param_groups[0]["lr"] == 0.1
    rates[1].remove()
    assert pending_rate_scale(optimizer) == 0.5
    rates[0].remove()
    assert not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_without_a_rate_is_left_alone_and_named() -> None:
    class Descent(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.data -= 0.05 * parameter.grad
            return loss

    class Module(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Descent(self.parameters(), {"step_size": 0.05})

    listener, backoff = Listener(), LearningRateBackoff()
    callbacks = [backoff, NaNRollback(max_dossiers=0, snapshot_every_n_steps=5), listener]
    with pytest.warns(UserWarning, match="LearningRateBackoff does not act: the parameter groups of Descent"):
        fit(Module(), poisoned(batches(40), nan=[20, 21, 22]), callbacks)
    seen = [incident.kind for incident in listener.found]
    assert "rollback" in seen
    assert "learning_rate_backoff" not in seen
    assert dict(backoff.final_counts())["summary/unscaled_rollbacks"] == seen.count("rollback")


@pytest.mark.parametrize("max_dossiers", [10, 1])
def test_an_operation_that_fails_again_after_one_cut_costs_no_further_one(
    max_dossiers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor once no further step is examined, if all before had one cause."""

    class Roots(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            assert loss is not None
            return loss + (0 * loss if batch_idx % 10 > 6 else loss).sqrt()

    rollback = NaNRollback(snapshot_every_n_steps=5, max_dossiers=max_dossiers)
    backoff = LearningRateBackoff()
    fit(Roots(), batches(60), [rollback, backoff])
    assert rollback.rollbacks > 3
    assert backoff.state_dict()["level"] == 0.5
    counts = dict(backoff.final_counts())
    assert counts[tags.ROLLBACKS_AT_ANY_RATE] == rollback.rollbacks - 1
    summary = capsys.readouterr().err
    assert f"unchanged by {rollback.rollbacks - 1} of the rollbacks, whose cause is not the rate" in summary
    assert "Learning rate backed off to 0.5x" in summary


class Stuck(pl.LightningModule):
    """Its weight is moved by every step, and its loss is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.incidents: list[Incident] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return 2 + 3 * (self.weight - self.weight.detach()).sum()

    def on_training_incident(self, trainer: pl.Trainer, pl_module: Any, incident: Incident) -> None:
        self.incidents.append(incident)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("is_clipped", [True, False])
def test_without_progress_a_run_that_is_clipped_goes_back_to_its_start_and_keeps_the_lower_rate(
    is_clipped: bool,
) -> None:
    module, backoff = Stuck(), LearningRateBackoff()
    clipping = AdaptiveGradientClipping(ZScoreClipping(max_norm=1.0 if is_clipped else 2.0))
    fit(module, batches(60), [clipping, NaNRollback(), backoff])
    found = {i.kind: i.value for i in module.incidents}
    if not is_clipped:  # to less than half: the weights are not far enough for a divergence by that alone
        assert "rollback" not in found
        return
    assert (found["divergence"], found["rollback"]) == (None, 0)  # no loss has risen
    assert backoff.scale == 1 / 16  # it would be taken back if the loss had risen with the data


class Relative(torch.optim.Optimizer):
    """Steps of a length of its own, with a rate of `None`, as Adafactor with relative steps."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Goes along the gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)
        return loss


def test_an_optimizer_with_a_rate_of_none_is_guarded_without_cuts() -> None:
    class Module(Classifier):
        def configure_optimizers(self) -> Any:
            return Relative(self.parameters())

    callbacks = default_callbacks()
    with pytest.warns(UserWarning, match="the parameter groups of Relative have no 'lr'"):
        trainer = fit(Module(), poisoned(batches(12), nan=[5]), callbacks)
    assert trainer.callback_metrics["rollback/skips"] == 1


def test_a_rate_that_is_a_tensor_of_one_element_is_logged(tmp_path: Path) -> None:
    class Rated(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=torch.tensor([1e-3]))

    logger = CSVLogger(tmp_path)
    fit(Rated(), batches(4), default_callbacks(), logger=logger, log_every_n_steps=1)
    assert "lr_backoff/lr" in (Path(logger.log_dir) / "metrics.csv").read_text()
