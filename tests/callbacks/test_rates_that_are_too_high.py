"""A rate that is too high is brought to one that trains; a stopped run resumes at the rate of the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from lightning_gradguard import (
    AdaptiveGradientClipping,
    Incident,
    LearningRateBackoff,
    NaNRollback,
    TrainingDivergedError,
    ZScoreClipping,
    default_callbacks,
)
from lightning_gradguard.cli.main import main
from lightning_gradguard.core import tags
from lightning_gradguard.runtime.incidents.journal import incident_now, publish

Data = list[tuple[Tensor, Tensor]]


def regression(n: int, level: float = 1.0) -> Data:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(16, 10, generator=generator) for _ in range(n)]
    return [(x, level * (3 * x[:, :1] + x[:, 1:2] * x[:, 2:3])) for x in inputs]


class Regression(pl.LightningModule):
    def __init__(self, lr: float, gamma: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        self.lr, self.gamma = lr, gamma
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        if self.gamma is None:
            return optimizer
        schedule = schedulers.ExponentialLR(optimizer, self.gamma)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class IncidentKinds(pl.Callback):
    def __init__(self) -> None:
        self.found: list[str] = []

    def on_training_incident(self, trainer: pl.Trainer, pl_module: Any, incident: Incident) -> None:
        self.found.append(incident.kind)


def fit(module: Regression, data: Data, callbacks: list[Any], folder: Path, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(module, DataLoader(data, batch_size=None), **options)  # type: ignore[arg-type]
    return trainer


def recorded(folder: Path, kind: str) -> list[float]:
    lines = (folder / "incidents.jsonl").read_text().splitlines() if folder.is_dir() else []
    return [r["value"] for r in map(json.loads, lines) if r["kind"] == kind]


@pytest.mark.parametrize("clips", [False, True])
def test_rate_two_hundred_times_too_high_is_brought_to_one_that_trains(
    clips: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clipping = AdaptiveGradientClipping(ZScoreClipping(max_norm=None)) if clips else None
    module = Regression(lr=10.0)
    suite = default_callbacks(adaptive_gradient_clipping=clipping)
    fit(module, regression(240), suite, tmp_path)
    (rate,) = recorded(tmp_path, "learning_rate_found")
    assert 0.01 <= rate <= 0.3
    assert sum(module.losses[-10:]) / 10 < 1.0  # 12 in the beginning
    (backoff,) = (c for c in suite if isinstance(c, LearningRateBackoff))
    assert backoff.final_counts()[tags.FOUND_LR] == rate  # in the table at the end
    main(["report", str(tmp_path)])
    printed = capsys.readouterr()
    assert f"1. Train with lr={rate:.3g}" in printed.out
    assert f"The loss fell over 60 steps with lr={rate:.3g}, at step " in printed.err
    assert ("followed, and with the clipping of this run" in printed.err) == clips
    assert len(recorded(tmp_path, "rollback")) == len(recorded(tmp_path, "learning_rate_backoff")) <= 5


class Summed(Regression):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return 1e9 * super().training_step(batch, batch_idx)


def test_a_rate_that_fits_a_loss_out_of_scale_is_none_to_train_with(tmp_path: Path) -> None:
    module, backoff = Summed(lr=1e-8), LearningRateBackoff()
    fit(module, regression(240), [NaNRollback(), backoff], tmp_path)
    assert backoff.scale < 0.1
    assert sum(module.losses[-10:]) / 10 < 12.0  # it trains
    assert not recorded(tmp_path, "learning_rate_found")
    assert tags.FOUND_LR not in backoff.final_counts()


def test_harder_data_causes_no_rollback_and_no_cut(tmp_path: Path) -> None:
    module, backoff, rollback = Regression(lr=0.001), LearningRateBackoff(), NaNRollback()
    data = [batch for stage in range(3) for batch in regression(80, level=3.0**stage)]
    fit(module, data, [rollback, backoff], tmp_path)
    assert (rollback.rollbacks, rollback.skips, backoff.scale) == (0, 0, 1.0)
    assert max(module.losses[80:]) > 10 * max(module.losses[:80])


class Adder(Regression):
    """Sums short sequences, then long ones, on which its loss rises before it falls."""

    def __init__(self, seed: int) -> None:
        super().__init__(lr=0.01)
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.GRU(1, 32, batch_first=True), nn.Linear(32, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net[1](self.net[0](batch[0])[0][:, -1]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


@pytest.mark.parametrize("seed", [0, 4])
def test_a_curriculum_on_which_weights_fall_behind_first_is_no_lost_progress(
    seed: int, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = [5] * 150 + [30] * 100
    sequences = [torch.randn(32, length, 1, generator=generator) for length in lengths]
    kinds = IncidentKinds()
    fit(Adder(seed), [(x, x.sum(1)) for x in sequences], [*default_callbacks(), kinds], tmp_path)
    assert {"rollback", "learning_rate_backoff"}.isdisjoint(kinds.found)


class Forgetful(Regression):
    """Has other weights from step 65 on."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 65:
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter.copy_(parameter.flip(0) if parameter.ndim == 1 else parameter.flip(1))
            self.trainer.optimizers[0].param_groups[0]["lr"] = 1e-6


def test_weights_that_have_lost_what_they_had_learned_are_those_of_before(tmp_path: Path) -> None:
    module, rollback = Forgetful(lr=0.03), NaNRollback()
    fit(module, regression(150), [rollback], tmp_path)
    lost = module.losses[66:76]
    assert 0.5 * module.losses[0] < min(lost) < max(lost) < 3 * module.losses[0]
    assert rollback.rollbacks == 1
    assert max(module.losses[-60:]) < 0.5 * min(lost)


def stopped(folder: Path, backoff: LearningRateBackoff | None = None, gamma: float | None = None) -> str:
    """Trains until the run is stopped; returns the message."""
    callbacks = [NaNRollback(max_rollbacks=2, max_dossiers=0), *([backoff] if backoff else [])]
    with pytest.raises(TrainingDivergedError) as error:
        fit(Regression(30.0, gamma), regression(100), callbacks, folder)
    return str(error.value)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize("gamma", [None, 0.99])
def test_stopped_run_resumes_at_the_rate_of_the_code(gamma: float | None, tmp_path: Path) -> None:
    message = stopped(tmp_path / "first", gamma=gamma)
    path = tmp_path / "first" / "last_good.ckpt"
    assert f"it was lr=30; try lr=0.3) and call trainer.fit(module, ckpt_path='{path}')" in message
    module = Regression(0.03, gamma)
    trainer = fit(module, regression(100), [NaNRollback()], tmp_path / "second", ckpt_path=str(path))
    steps = trainer.global_step
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(0.03 * (gamma or 1.0) ** steps)
    assert module.losses[-1] < module.losses[0] / 2


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_stopped_run_resumes_with_its_cuts_unless_the_rate_is_changed(tmp_path: Path) -> None:
    first = LearningRateBackoff()
    stopped(tmp_path / "first", first)
    path = str(tmp_path / "first" / "last_good.ckpt")
    assert first.state_dict()["level"] == 2**-3
    for rate, level in [(30.0, 2**-3), (0.03, 1.0)]:
        backoff = LearningRateBackoff()
        fit(Regression(rate), regression(16), [backoff, NaNRollback()], tmp_path / f"{rate}", ckpt_path=path)
        assert backoff.state_dict()["level"] == level


class Classifier(Regression):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]) * torch.tensor([1.0, 0.0, -1.0]), batch[1])


@pytest.mark.parametrize("scale", [0.0, 0.01])
def test_weights_that_grow_from_near_zero_are_neither_a_divergence_nor_an_explosion(
    scale: float, tmp_path: Path
) -> None:
    module = Classifier(lr=0.1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(scale)
    generator = torch.Generator().manual_seed(0)
    unrelated = [(x, torch.randint(3, (16,), generator=generator)) for x, _ in regression(240)]
    kinds = IncidentKinds()
    fit(module, unrelated, [*default_callbacks(), kinds], tmp_path)
    found = set(kinds.found)
    assert found
    assert not found & {"divergence", "rollback", "exploding_gradient"}


class DeepClassifier(Regression):
    def __init__(self, lr: float) -> None:
        super().__init__(lr)
        torch.manual_seed(1)
        layers = [nn.Linear(10 if i == 0 else 64, 64) for i in range(8)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.net = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Linear(64, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr)


def test_first_update_of_adam_that_blows_the_loss_up_is_undone(tmp_path: Path) -> None:
    module = DeepClassifier(lr=0.1)
    fit(module, regression(100), default_callbacks(initialization_check=None), tmp_path)
    assert recorded(tmp_path, "rollback") == [0]
    assert recorded(tmp_path, "learning_rate_found") == [0.1 / 16]
    assert len([loss for loss in module.losses if loss > 2 * module.losses[0]]) <= 3


class Ramped(Regression):
    """A loss that is switched on in 20 steps."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return min(1.0, 1e-3 + batch_idx / 20) * super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr)


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_a_loss_that_the_data_raise_is_no_divergence(check: Any, tmp_path: Path) -> None:
    module, rollback = Ramped(lr=0.02), NaNRollback(check=check)
    fit(module, regression(40), [LearningRateBackoff(), rollback], tmp_path)
    plain = Ramped(lr=0.02)
    fit(plain, regression(40), [], tmp_path / "plain")
    assert rollback.rollbacks == 0
    assert not (tmp_path / "incidents.jsonl").exists()
    assert module.losses == plain.losses  # a step that was run again leaves no trace


def test_a_cut_is_taken_back_where_the_loss_is_as_high_with_earlier_weights(tmp_path: Path) -> None:
    backoff, rollback = LearningRateBackoff(), NaNRollback(max_dossiers=0)  # keeps no batch to run again
    fit(Ramped(lr=0.02), regression(40), [backoff, rollback], tmp_path)
    assert rollback.rollbacks == len(recorded(tmp_path, "learning_rate_backoff")) == 1
    assert backoff.scale == 1.0


class Stuck(Regression):
    """A loss that does not fall, at a rate that `found` names as too large."""

    def __init__(self, found: bool) -> None:
        super().__init__(lr=1e-3)
        self.net, self.found = nn.Sequential(), found
        self.weight = nn.Parameter(torch.linspace(0, 1, 200))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.found and batch_idx == 20:
            incident = incident_now(self.trainer, "exploding_gradient", cause="update_too_large")
            publish(self.trainer, self, incident)
        return 3 + (1e4 * self.weight).sin().mean()


@pytest.mark.parametrize("found", [False, True])
def test_a_loss_that_does_not_fall_after_updates_that_were_too_large_has_a_lower_rate(
    found: bool, tmp_path: Path
) -> None:
    backoff, rollback = LearningRateBackoff(), NaNRollback()
    fit(Stuck(found), regression(52), [backoff, rollback], tmp_path)
    assert (rollback.rollbacks, backoff.scale) == ((1, 1 / 16) if found else (0, 1.0))
