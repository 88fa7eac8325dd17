"""The shared step: measured once, checked once, and logged with one transfer."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard import AdaptiveGradientClipping, GradientNormMonitor, NaNRollback, ZScoreClipping
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.step_callback import StepCallback
from tests.tasks import Batch, Classifier, batches, fit


class Spy(StepCallback):
    """Keeps what the step says."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.totals: list[float] = []

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        self.losses.append(float(step.loss))
        self.totals.append(float(step.gradients.total_norm))


class Returned(Classifier):
    """Keeps what `training_step` returned."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.returned: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        self.returned.append(float(loss.detach()))
        return loss


def scaler() -> list[Any]:
    return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw fused"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_loss_and_norm_exclude_scaler_and_accumulation(optimizer: str, accumulate: int) -> None:
    module, spy = Returned(optimizer), Spy()
    fit(module, batches(8), [spy], plugins=scaler(), accumulate_grad_batches=accumulate)
    expected = torch.tensor(module.returned).view(-1, accumulate).mean(1)
    torch.testing.assert_close(torch.tensor(spy.losses), expected, rtol=1e-4, atol=0)
    plain = Spy()
    fit(Returned(optimizer), batches(8), [plain], accumulate_grad_batches=accumulate)
    assert spy.totals[0] == pytest.approx(plain.totals[0], rel=2e-2)


def test_gradients_are_measured_once_for_all_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    measure = torch._foreach_norm

    def counted(tensors: Any, norm_type: float = 2.0, dtype: Any = None) -> Any:
        calls.append(norm_type)
        return measure(tensors, norm_type, dtype)

    monkeypatch.setattr(torch, "_foreach_norm", counted)
    suite = [GradientNormMonitor(), AdaptiveGradientClipping(), NaNRollback(), Spy()]
    fit(Classifier(), batches(5), suite, log_every_n_steps=100)
    assert calls == [2.0] * (5 + 1)  # the default policy weighs the weights once in 50 steps


class _Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += "_local_scalar_dense" in func._schema.name
        return func(*args, **(kwargs or {}))


def test_without_a_check_the_host_never_synchronizes() -> None:
    class Meter(pl.Callback):
        """Around the callbacks' turn: it stands first and last in the list."""

        mode = _Waits()

        def __init__(self, opens: bool) -> None:
            self.opens = opens

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.mode.__enter__() if self.opens else self.mode.__exit__(None, None, None)

    suite = [Meter(True), GradientNormMonitor(), AdaptiveGradientClipping(), Meter(False)]
    fit(Classifier(), batches(5), suite, log_every_n_steps=100)
    assert Meter.mode.count == 0


def test_a_rejected_step_with_finite_gradients_enters_no_history() -> None:
    class Unlucky(Classifier):
        """A loss that is NaN, with gradients that are not."""

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            assert loss is not None
            return loss + float("nan") if batch_idx == 3 else loss

    states = []
    for data, module in (([*batches(4), *batches(6)[4:]], Unlucky()), (batches(6), Classifier())):
        clean = data if isinstance(module, Unlucky) else [*data[:3], *data[4:]]
        clipping, rollback = AdaptiveGradientClipping(ZScoreClipping(max_norm=None)), NaNRollback()
        fit(module, clean, [clipping, rollback])
        assert rollback.skips == isinstance(module, Unlucky)
        states.append(clipping.state_dict()["histories"][0])
    assert states[0]["seen"] == 5
    assert str(states[0]) == str(states[1])
    assert torch.equal(states[0]["warmup"].nan_to_num(-1), states[1]["warmup"].nan_to_num(-1))


def test_parameters_outside_of_the_module_have_a_name() -> None:
    extra = nn.Parameter(torch.ones(3))

    class Outside(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            assert loss is not None
            return loss + extra.square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.parameters(), extra], 0.01)

    class Names(StepCallback):
        def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
            self.names = step.gradients.names

    names = Names()
    fit(Outside(), batches(2), [names, NaNRollback()])
    assert names.names[-1] == "parameter.6"
    assert names.names[0] == "net.0.weight"
