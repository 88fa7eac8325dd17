"""Rates are tried before step 1 of a real fit, at the peak of their schedule."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_gradguard import InitializationCheck
from lightning_gradguard.runtime.optimizer_hooks import largest_usual_rate
from tests.tasks import Batch, Classifier, batches, fit, same, weights


class AtRate(Classifier):
    def __init__(self, rate: float, schedule: Any = None, kind: Any = torch.optim.SGD, **how: Any) -> None:
        super().__init__(**how)
        self.rate, self.schedule, self.kind = rate, schedule, kind

    def configure_optimizers(self) -> Any:
        optimizer = self.kind(self.parameters(), self.rate)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def test_a_rate_that_is_too_high_is_an_incident_with_a_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check, logger = InitializationCheck(rate_trial=True), CSVLogger(tmp_path)
    fit(AtRate(300.0), batches(20), [check], logger=logger, max_steps=1, enable_progress_bar=True)
    (finding,) = check.findings
    assert (finding.criterion, finding.severity) == ("learning_rate_too_high", "fail")
    assert finding.module == "optimizer.param_groups[0]"
    assert 0.1 < check.values["largest_stable_rate"] < 10
    lines = (Path(logger.log_dir) / "incidents.jsonl").read_text().splitlines()
    (record,) = [r for r in map(json.loads, lines) if r["where"] == ["optimizer.param_groups[0]"]]
    assert (record["kind"], record["cause"]) == ("exploding_gradient", "update_too_large")
    assert record["advice"].startswith("Cure: lr=0.")
    assert "# of SGD, in place of 300" in record["advice"]
    printed = capsys.readouterr()
    assert "learning_rate_too_high of optimizer.param_groups[0]: 300" in printed.out + printed.err
    # the cure, pasted
    rate = float(record["advice"].split("lr=")[1].split()[0])
    cured = InitializationCheck(rate_trial=True)
    module = AtRate(rate)
    trainer = fit(module, batches(100), [cured])
    assert cured.findings == []
    assert float(trainer.callback_metrics["train_loss_step"]) < 1.0


class Millimetres(AtRate):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, target = batch
        return nn.functional.mse_loss(self.net(inputs)[:, 0], target)


def test_targets_in_the_thousands_are_standardized_before_the_rate_is_lowered() -> None:
    generator = torch.Generator().manual_seed(0)
    data = []
    for inputs, _ in batches(40):
        depth = inputs[:, 0] + 0.1 * torch.randn(len(inputs), generator=generator)
        data.append((inputs, 5000 + 2000 * depth))
    check = InitializationCheck(rate_trial=True)
    fit(Millimetres(0.05), data, [check], max_steps=1)
    (finding,) = check.findings
    assert finding.criterion == "learning_rate_too_high"
    assert finding.cure.startswith("standardize batch[1], (t - t.mean(0)) / t.std(0): rms 5")
    cured = InitializationCheck(rate_trial=True)
    fit(Millimetres(0.05), [(x, (y - 5000) / 2000) for x, y in data], [cured], max_steps=1)
    assert cured.findings == []


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("rate", [1e-3, 0.05])
def test_a_usual_rate_is_none_and_the_run_is_as_without_the_trial(kind: Any, rate: float) -> None:
    bare, module = (AtRate(rate, kind=kind, norm=True, dropout=0.2) for _ in range(2))
    check = InitializationCheck(rate_trial=True)
    torch.manual_seed(1)
    fit(bare, batches(20))
    torch.manual_seed(1)
    fit(module, batches(20), [check])
    assert same(weights(bare), weights(module))
    assert check.findings == []
    assert check.values["learning_rate"] == rate


SCHEDULES: dict[str, Any] = {
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 5)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 40.0, total_steps=20, pct_start=0.5),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.01, 1.0, 5), lr_scheduler.CosineAnnealingLR(o, 15)], [5]
    ),
}


@pytest.mark.parametrize(("name", "peak"), [("warm-up", 40.0), ("one cycle", 40.0), ("sequential", 40.0)])
def test_the_peak_of_the_schedule_counts(name: str, peak: float) -> None:
    check, module = InitializationCheck(rate_trial=True), AtRate(40.0, SCHEDULES[name])
    twin = AtRate(40.0, SCHEDULES[name])
    fit(module, batches(20), [check], max_steps=20)
    fit(twin, batches(20), max_steps=20)
    assert check.values["learning_rate"] == pytest.approx(peak, rel=0.2)
    assert [f.criterion for f in check.findings] == ["learning_rate_too_high"]
    assert ("max_lr=" if name == "one cycle" else "lr=") in check.findings[0].cure
    torch.testing.assert_close(weights(module), weights(twin), rtol=0, atol=0, equal_nan=True)


def test_a_rate_that_moves_nothing_is_too_low() -> None:
    check = InitializationCheck(rate_trial=True)
    fit(AtRate(1e-9), batches(20), [check])
    assert [(f.criterion, f.severity) for f in check.findings] == [("learning_rate_too_low", "warn")]
    assert check.findings[0].cure.startswith("lr=")
    assert check.findings[0].expected.startswith(f"about {check.findings[0].cure.split()[0][3:]} (")


@pytest.mark.parametrize(("kind", "rate"), [(torch.optim.Adam, 1e6), (torch.optim.SGD, 1e30)])
def test_the_rate_that_is_advised_is_one_that_is_in_use_and_lowers_the_loss(kind: Any, rate: float) -> None:
    check = InitializationCheck(rate_trial=True)
    fit(AtRate(rate, kind=kind), batches(20), [check], max_steps=1)
    (finding,) = check.findings
    advised = float(finding.cure.split()[0].removeprefix("lr="))
    assert finding.expected == f"about {advised:g} (36 steps on a copy)"
    assert 1e-4 < advised <= largest_usual_rate(kind([nn.Parameter(torch.zeros(1))]))


def test_a_higher_rate_is_not_advised_where_none_lowers_the_loss() -> None:
    check = InitializationCheck(rate_trial=True)
    data = [(torch.zeros_like(x), torch.arange(len(y)) % 4) for x, y in batches(20)]
    fit(AtRate(1e-9), data, [check], max_steps=1)
    assert not [f for f in check.findings if f.criterion.startswith("learning_rate")]


class PostNorm(AtRate):
    """Normalizes after each layer of a transformer, which a high rate without warm-up kills."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate, kind=torch.optim.Adam)
        torch.manual_seed(0)
        self.embed = nn.Linear(1, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)
        self.net = nn.Identity()  # type: ignore[assignment]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        answers = self.head(self.body(self.embed(batch[0].unsqueeze(2))).mean(1))
        return nn.functional.cross_entropy(answers, batch[1])


@pytest.mark.parametrize(("rate", "found"), [(0.03, ["learning_rate_too_high"]), (1e-3, [])])
def test_a_rate_that_cuts_the_first_layers_off_is_too_high(rate: float, found: list[str]) -> None:
    check = InitializationCheck(rate_trial=True)
    fit(PostNorm(rate), batches(20), [check], max_steps=1)
    findings = [f for f in check.findings if f.criterion.startswith("learning_rate")]
    assert [f.criterion for f in findings] == found
    assert all(f.severity == "warn" and float(f.cure.split()[0][3:]) <= rate / 10 for f in findings)


class Sampling(AtRate):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        answers = torch.distributions.Categorical(logits=self.net(batch[0]))
        loss: Tensor = -answers.log_prob(batch[1]).mean()
        return loss


def test_a_step_that_raises_at_a_high_rate_is_unstable_there() -> None:
    check = InitializationCheck(rate_trial=True)
    fit(Sampling(0.1), batches(20), [check], max_steps=1)
    assert check.findings == []
    assert 0.1 < check.values["largest_stable_rate"] < 1e3


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()
        return None


class Own(Classifier):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        optimizer.step(closure=closure)


class Quasi(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Manual, "manual optimization"),
        (Own, "an optimizer_step of the module's own"),
        (Quasi, "LBFGS, which"),
    ],
)
def test_where_no_trial_is_possible_one_line_has_the_reason(
    module: type[Classifier], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check = InitializationCheck(rate_trial=True)
    fit(module(), batches(2), [check], enable_progress_bar=True)
    printed = capsys.readouterr()
    assert f"Learning rates were not tried, because of {reason}" in printed.out + printed.err
    assert "largest_stable_rate" not in check.values


class Bounded(AtRate):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return torch.exp(-self.net(batch[0]).square().sum(1)).mean()


class Round(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round()


class Untrained(AtRate):
    def configure_optimizers(self) -> None:
        return None


class Rounded(AtRate):
    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        layers = [nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), Round(), nn.Linear(16, 16), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(16, 4))


@pytest.mark.filterwarnings("ignore:.*no optimizer")
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Bounded(0.1), "There is no largest stable learning rate: numbers overflow before the loss rises."),
        (AtRate(0.0), "There is no largest stable learning rate: the learning rate is 0."),
        (Untrained(0.1), "There is no largest stable learning rate: there is no optimizer."),
        (Rounded(0.1), "Learning rates were not tried, because of criteria that fail."),
    ],
)
def test_without_a_largest_stable_rate_one_line_has_the_reason(
    module: AtRate, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check = InitializationCheck(rate_trial=True)
    fit(module, batches(20), [check], max_steps=1)
    assert "largest_stable_rate" not in check.values
    assert reason in capsys.readouterr().err


class Sigmoids(AtRate):
    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        torch.manual_seed(0)
        hidden = [layer for _ in range(9) for layer in (nn.Linear(16, 16), nn.Sigmoid())]
        self.net = nn.Sequential(nn.Linear(20, 16), nn.Sigmoid(), *hidden, nn.Linear(16, 4))


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0.05, "learning rates are stable up to about 0."),
        (1e4, r"train with lr=[\d.]+  # of SGD, in place of 1"),
    ],
)
def test_rates_are_tried_with_the_cure_of_criteria_that_fail(rate: float, text: str) -> None:
    check, module, bare = InitializationCheck(rate_trial=True), Sigmoids(rate), Sigmoids(rate)
    fit(module, batches(20), [check], max_steps=1)
    fit(bare, batches(20), max_steps=1)
    assert check.findings[0].severity == "fail"
    (note,) = check.notes
    assert re.match(f"With the cure of what fails in place, {text}", note)
    assert not [f for f in check.findings if f.criterion.startswith("learning_rate")]
    assert same(weights(module), weights(bare))


def test_a_rate_little_above_the_largest_stable_one_is_no_finding_and_has_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check = InitializationCheck(rate_trial=True)
    fit(AtRate(0.1), batches(20), [check], max_steps=1)
    assert "is not stable within" not in capsys.readouterr().err
    check = InitializationCheck(rate_trial=True)
    fit(AtRate(2.0), batches(20), [check], max_steps=1)
    assert check.findings == []
    assert check.values["largest_stable_rate"] < 2
    assert (
        "The learning rate, 2, is not stable within 36 steps: the loss rises, or its gradient no longer "
        "reaches the first layer. Those up to 1.41 are" in capsys.readouterr().err
    )


class Huge(AtRate):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 1e12 * (loss - loss.detach())  # type: ignore[operator, union-attr]


def test_a_rate_that_no_network_trains_with_is_no_cure_of_a_loss_out_of_scale() -> None:
    check = InitializationCheck(rate_trial=True)
    fit(Huge(0.1), batches(20), [check], max_steps=1)
    (finding,) = check.findings
    assert finding.criterion == "learning_rate_too_high"
    assert "lr=" not in finding.cure
    assert "or its gradient is out of scale" in finding.cure
    assert not finding.is_tried


class Reciprocal(AtRate):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = (1 / (self.net(batch[0]).square() + 1e-12)).mean()
        return loss


def test_a_higher_rate_is_no_cure_of_one_that_is_too_high() -> None:
    check = InitializationCheck(rate_trial=True)
    fit(Reciprocal(1e-3, kind=torch.optim.Adam), batches(20), [check], max_steps=1)
    for finding in check.findings:
        advised = re.match(r"lr=(\S+)", finding.cure)
        assert advised is None or (float(advised[1]) < 1e-3) == finding.criterion.endswith("too_high")
