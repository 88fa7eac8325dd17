"""Clipping by default: invisible on healthy programs, a rescue of failing ones, in real fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_gradguard import (
    AdaptiveGradientClipping,
    Change,
    GlobalNormClipping,
    LearningRateBackoff,
    NaNRollback,
    RelativeNormClipping,
    ZScoreClipping,
    callbacks_of,
    default_callbacks,
)
from lightning_gradguard.core import tags
from lightning_gradguard.runtime.incidents.journal import incident_now, publish
from tests.tasks import Batch, Classifier, Listener, accuracy, batches, clusters, fit, same, weights


class Regression(Classifier):
    """Targets in the hundreds, from zero weights."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.net = nn.Linear(20, 1)  # type: ignore[assignment]
        nn.init.zeros_(self.net.weight)  # type: ignore[arg-type]
        self.rate = rate

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0])[:, 0], 100 + 50 * batch[0][:, 0])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.rate)


class TooFast(Classifier):
    """The usual network at a rate of one's own."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


HEALTHY: dict[str, Callable[[], pl.LightningModule]] = {
    "regression": lambda: Regression(0.004),
    "momentum": Classifier,
    "adam": lambda: Classifier("adam"),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_runs_are_not_changed(kind: str) -> None:
    bare, guarded, clipping = HEALTHY[kind](), HEALTHY[kind](), AdaptiveGradientClipping()
    fit(bare, clusters(100))
    fit(guarded, clusters(100), default_callbacks(adaptive_gradient_clipping=clipping))
    assert clipping.final_counts() == {tags.CLIPPED_FRACTION: 0.0}
    assert same(weights(bare), weights(guarded))


class Convolutions(Classifier):
    """Convolutions on digits, which leave a plateau at step 60 with norms a hundred times as large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        layers: list[nn.Module] = []
        for n_in in (1, 16, 16):
            layers += [nn.Conv2d(n_in, 16, 3, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def test_plateau_is_left_as_without_the_suite() -> None:
    images, digits = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(11)
    chosen = [torch.randint(len(images), (32,), generator=generator) for _ in range(80)]
    data = [(images[i].float().reshape(-1, 1, 8, 8) / 8 - 0.6, digits[i]) for i in chosen]
    bare, guarded, clipping = Convolutions(), Convolutions(), AdaptiveGradientClipping()
    fit(bare, data)
    fit(guarded, data, default_callbacks(adaptive_gradient_clipping=clipping))
    assert clipping.final_counts() == {tags.CLIPPED_FRACTION: 0.0}
    assert same(weights(bare), weights(guarded))


FAILING: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 20.0),
    "momentum": lambda p: torch.optim.SGD(p, 5.0, momentum=0.9),
}


@pytest.mark.parametrize("kind", FAILING)
def test_rates_far_too_high_are_survived(kind: str) -> None:
    bare, guarded, alone = (TooFast(FAILING[kind]) for _ in range(3))
    fit(bare, clusters(200))
    fit(guarded, clusters(200), default_callbacks())
    fit(alone, clusters(200), [AdaptiveGradientClipping()])
    assert accuracy(bare) < 0.6
    assert accuracy(guarded) > 0.95
    assert accuracy(alone) > 0.95


def test_decisions_are_the_same_with_and_without_a_checker() -> None:
    data = [(x * 100 if i in (30, 80) else x, y) for i, (x, y) in enumerate(clusters(120))]
    alone, exact, deferred = Classifier(), Classifier(), Classifier()
    fit(alone, data, [AdaptiveGradientClipping()])
    fit(exact, data, [AdaptiveGradientClipping(), NaNRollback()])
    fit(deferred, data, [AdaptiveGradientClipping(), NaNRollback(check="deferred")])
    for one, two, three in zip(weights(alone), weights(exact), weights(deferred), strict=True):
        torch.testing.assert_close(one, two)
        assert torch.equal(one, three)


class Watched(RelativeNormClipping):
    """Keeps the contexts that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: list[Any] = []

    def __deepcopy__(self, memo: Any) -> Watched:
        return self

    def coefficients(self, gradients: Any) -> Any:
        self.contexts.append(gradients.context)
        return super().coefficients(gradients)


@pytest.mark.parametrize("manual", [False, True])
def test_the_rate_is_that_after_backoff(manual: bool) -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if not manual or loss is None:
                return loss
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

    policy, backoff = Watched(), LearningRateBackoff(rewarm_steps=0)
    backoff._backoff.reduce()
    fit(Manual(), batches(3), [AdaptiveGradientClipping(policy), backoff, NaNRollback()])
    assert [context.learning_rate for context in policy.contexts] == [0.025] * 3
    assert [context.momentum for context in policy.contexts] == [0.9] * 3
    assert [context.weight_norm is not None for context in policy.contexts] == [True, False, False]
    assert all(context.loss > 0 for context in policy.contexts)


def test_rates_of_parameter_groups_are_weighted_by_their_gradients() -> None:
    def groups(parameters: Any) -> torch.optim.Optimizer:
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": others, "lr": 0.1}], lr=1.0)

    policy = Watched()
    fit(TooFast(groups), batches(2), [AdaptiveGradientClipping(policy), NaNRollback()])
    rates = [float(context.learning_rate) for context in policy.contexts]
    assert all(0.1 < rate < 0.5 for rate in rates)


def test_resumed_run_decides_as_the_uninterrupted_one(tmp_path: Path) -> None:
    data, path = clusters(40), str(tmp_path / "middle.ckpt")
    whole, first, resumed = (TooFast(FAILING["momentum"]) for _ in range(3))
    fit(whole, data, [AdaptiveGradientClipping()], max_epochs=2)
    fit(first, data, [AdaptiveGradientClipping()]).save_checkpoint(path)
    fit(resumed, data, [AdaptiveGradientClipping()], ckpt_path=path, max_epochs=2)
    assert same(weights(whole), weights(resumed))


@pytest.mark.filterwarnings("ignore:The dataloader")
def test_checkpoint_of_another_policy_starts_the_history_afresh(tmp_path: Path) -> None:
    trainer = fit(Classifier(), batches(20), [AdaptiveGradientClipping(ZScoreClipping(max_norm=1.0))])
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    module, path = Classifier(), str(tmp_path / "first.ckpt")
    with pytest.warns(UserWarning, match="ZScoreClipping"):
        fit(module, batches(20), [AdaptiveGradientClipping()], ckpt_path=path, max_epochs=2)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


def test_clipping_of_most_steps_is_one_incident() -> None:
    incidents = Listener()
    callbacks = [AdaptiveGradientClipping(GlobalNormClipping(1e-4)), incidents]
    fit(Classifier(), clusters(350), callbacks)
    (found,) = incidents.found
    assert (found.kind, found.step, found.action) == ("constant_clipping", 100, "none")
    assert re.search(r"multiply the learning rate by \d[\d.e-]+: steps are as long then", found.advice)
    assert found.describe() == (
        "Clipping of most steps at step 100 (epoch 0): 100% of the steps to less than half of their norm"
    )


def test_bound_that_a_treatment_has_chosen_is_not_to_be_raised(capsys: pytest.CaptureFixture[str]) -> None:
    incidents = Listener()
    fit(Classifier(), clusters(350), [*callbacks_of([Change("clipping", {"max_norm": 1e-4})]), incidents])
    assert not incidents.found
    assert "raise the bound" not in "".join(capsys.readouterr())


def test_clipping_that_follows_from_a_symptom_is_not_named_beside_it(tmp_path: Path) -> None:
    class Symptom(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            publish(trainer, pl_module, incident_now(trainer, "exploding_gradient"))

    incidents, policy = Listener(), GlobalNormClipping(1e-4)
    trainer = fit(Classifier(), clusters(20), [AdaptiveGradientClipping(policy), Symptom(), incidents])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callbacks = [AdaptiveGradientClipping(policy), incidents]
    fit(Classifier(), clusters(150), callbacks, ckpt_path=str(tmp_path / "last.ckpt"), max_epochs=2)
    assert [incident.kind for incident in incidents.found] == ["exploding_gradient"]


def test_usual_clipping_is_no_incident() -> None:
    incidents = Listener()
    fit(Classifier(), clusters(250), [AdaptiveGradientClipping(), NaNRollback(), incidents])
    assert not [incident for incident in incidents.found if incident.kind == "constant_clipping"]
