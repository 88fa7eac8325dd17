"""Programs as people have reported them: cause, place, advice, outcome, and the headline of the report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import (
    GradientNormMonitor,
    NaNRollback,
    TrainingDiagnosis,
    TrainingDivergedError,
    default_callbacks,
)
from lightning_gradguard.cli.main import main
from lightning_gradguard.report.readers.runs import read_run
from lightning_gradguard.report.run_report import RunReport, report_on
from tests.tasks import fit

FILE = Path(__file__).name
ROWS, BAD = 8, 85  # the bad sample is row 5 of batch 10


class Program(pl.LightningModule):
    """A program whose step the test writes."""

    def __init__(self, step: Callable[..., Tensor], net: nn.Module, optimizer: Any = None) -> None:
        super().__init__()
        self.net, self.step, self.optimizer = net, step, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.step(self, batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        make = self.optimizer or (lambda weights: torch.optim.Adam(weights, lr=3e-3))
        return make(self.parameters())


class Outcome:
    """The end of a run, with all that was told of it."""

    def __init__(self, module: pl.LightningModule, error: Exception | None, printed: str) -> None:
        self.module, self.error = module, error
        self.console = " ".join(printed.split())
        file = Path("logs/run/incidents.jsonl")
        lines = file.read_text().splitlines() if file.is_file() else []
        self.incidents: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.report: RunReport = report_on(read_run("run", Path("logs/run")))

    def first(self, kind: str) -> dict[str, Any]:
        return next(i for i in self.incidents if i["kind"] == kind)

    @property
    def headline(self) -> str:
        return self.report.verdict.headline

    @property
    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.module.state_dict().values())


@pytest.fixture
def run(caplog: pytest.LogCaptureFixture) -> Callable[..., Outcome]:
    def train(module: pl.LightningModule, *tensors: Tensor, callbacks: Any = None, **more: Any) -> Outcome:
        loader = DataLoader(TensorDataset(*tensors), batch_size=more.pop("batch_size", ROWS))
        chosen = default_callbacks() if callbacks is None else callbacks
        error = None
        try:
            options = {"log_every_n_steps": 1, "logger": CSVLogger(".", name="logs", version="run"), **more}
            fit(module, (), chosen, loader=loader, **options)
        except Exception as raised:
            error = raised
        return Outcome(module, error, caplog.text)

    return train


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(*sizes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def sgd(lr: float) -> Any:
    return lambda weights: torch.optim.SGD(weights, lr=lr)


def regression(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(module.net(x).float(), y.float())


def columns(n: int = 240) -> tuple[Tensor, Tensor]:
    x = draw(n, 6)
    return x, x[:, :1] + x[:, 1:2] * x[:, 2:3]


class Pose(Program):
    """Two views are compared by the angle between them, of duplicates too."""

    def __init__(self) -> None:
        super().__init__(Pose.angle, mlp(6, 16, 4))

    def angle(self, batch: Any) -> Tensor:
        a, b = (F.normalize(self.net(x), dim=-1) for x in batch)
        return torch.acos((a * b).sum(-1).clamp(-1, 1)).square().mean()


def test_acos_at_1(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = draw(160, 6), draw(160, 6, seed=1)
    b[80:88] = a[80:88]
    told = run(Pose(), a, b)
    found = told.first("nonfinite_gradient")
    line = rf"{FILE}:\d+ in angle"
    assert (found["cause"], found["action"], found["step"]) == ("backward_pass", "skipped", 10)
    assert re.search(line, found["where"][0])
    assert "torch.acos((a * b).sum(-1).clamp(-1, 1).clamp(-1 + 1e-6, 1 - 1e-6))" in found["advice"]
    assert told.is_finite
    assert told.headline == "recovered from nonfinite gradients (cause: backward pass)"
    # the line is in all four places
    page = Path("logs/run") / found["dossier"]
    main(["report", "logs/run"])
    report = " ".join(capsys.readouterr().out.split())
    main(["replay", str(page), "--model", f"{__name__}.Pose"])
    replay = capsys.readouterr().out
    for text in (told.console, report, replay, (page / "index.html").read_text()):
        assert re.search(line, text)
        assert "clamp(-1 + 1e-6, 1 - 1e-6)" in text


def test_a_transcript_that_is_too_long(run: Any) -> None:
    def transcript(module: Any, batch: Any) -> Tensor:
        sound, letters, n = batch
        scores = module.net(sound).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(scores, letters, torch.full((len(n),), 10), n)

    letters = torch.randint(1, 4, (160, 12), generator=torch.Generator().manual_seed(0))
    n = torch.full((160,), 3)
    n[BAD] = 12
    told = run(Program(transcript, mlp(6, 16, 4)), draw(160, 10, 6), letters, n)
    found = told.first("nonfinite_loss")
    assert (found["cause"], found["step"], found["action"]) == ("bad_input", 10, "skipped")
    assert "in row 5" in found["detail"]
    assert f"index in the data set: {BAD}" in found["detail"]
    assert "zero_infinity=True" in found["advice"]
    assert told.is_finite
    assert told.headline == "recovered from nonfinite loss (cause: bad input)"


@pytest.mark.parametrize("make", [torch.optim.Adamax, torch.optim.NAdam])
def test_an_epsilon_of_0_in_float32(run: Any, make: Any) -> None:
    x, y = columns(160)
    x[:, 2] = 0  # a column whose weights get no gradient
    told = run(Program(regression, mlp(6, 16, 1), lambda w: make(w, lr=1e-3, eps=0.0)), x, y)
    found = next(i for i in told.incidents if i["cause"])
    assert (found["cause"], found["where"]) == ("optimizer_epsilon", ["net.0.weight"])
    assert "1e-8 is enough for weights in float32" in str(told.error)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RMSprop])
def test_an_epsilon_of_0_in_half_precision(run: Any, make: Any) -> None:
    x, y = columns(160)
    program = Program(regression, mlp(6, 16, 1, activation=nn.ReLU), lambda w: make(w, lr=1e-3))
    told = run(program, x, 0.1 * y.tanh(), precision="16-true", max_epochs=3)
    assert isinstance(told.error, TrainingDivergedError)
    assert "eps=1e-4" in str(told.error)
    found = next(i for i in told.incidents if i["cause"])
    assert found["cause"] == "optimizer_epsilon"
    assert "A lower learning rate and clipping do not help" in found["advice"]
    assert told.is_finite
    assert "optimizer epsilon" in told.headline
    assert not any("Give the optimizer a lower" in step for step in told.report.next_steps)
    assert not any("lower" in i["advice"] for i in told.incidents if i["kind"] == "rollback")
    assert not any(i["kind"] == "learning_rate_backoff" for i in told.incidents)


@pytest.mark.parametrize(("fill", "at"), [(1e20, 15), (1e9, 15), (-9999.0, 15), (1e9, 0)])
def test_a_fill_value_leaves_statistics_alone(run: Any, fill: float, at: int) -> None:
    x = draw(320, 6)
    y = x[:, :1].clone()
    x[at * ROWS + 5, 2] = fill
    net = nn.Sequential(nn.BatchNorm1d(6), *mlp(6, 16, 1, activation=nn.ReLU))
    told = run(Program(regression, net, sgd(0.1)), x, y)
    found = told.first("nonfinite_buffers")
    assert (found["where"], found["cause"], found["step"]) == (["batch[0]"], "bad_input", at)
    assert f"index in the data set: {at * ROWS + 5}" in found["detail"]
    assert "0.running_var" in found["detail"]
    assert told.module.net[0].running_var.max() < 10
    assert told.headline == "recovered from corrupted buffers (cause: bad input)"


class RunningNorm(nn.Module):
    """As of observations: statistics of the user's own, from a variance of 0 on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("mean").lerp_(x.mean(0), 0.1)
        self.get_buffer("var").lerp_(x.var(0), 0.1)
        return (x - self.get_buffer("mean")) / (self.get_buffer("var") + 1e-5).sqrt()


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_fill_value_leaves_statistics_of_the_users_own_alone(run: Any, scale: float) -> None:
    x = draw(320, 6)
    y = x[:, :1].clone()
    x *= scale
    x[15 * ROWS + 5, 2] = 1e9 * scale
    net = nn.Sequential(RunningNorm(), *mlp(6, 16, 1, activation=nn.ReLU))
    told = run(Program(regression, net, sgd(0.1)), x, y)
    found = told.first("nonfinite_buffers")
    assert (found["where"], found["cause"], found["step"]) == (["batch[0]"], "bad_input", 15)
    assert "0.var" in found["detail"]
    assert told.module.net[0].var.max() < 10 * scale**2
    assert len([i for i in told.incidents if i["kind"] == "nonfinite_buffers"]) == 1


@pytest.mark.parametrize(("begin", "at"), [(1.0, 0), (0.0, 1)])
def test_an_outlier_is_no_jump_of_a_variance_that_no_batch_has_set(run: Any, begin: float, at: int) -> None:
    x = draw(320, 6)
    y = x[:, :1].clone()
    x[: at * ROWS] = 0.0
    x[at * ROWS + 5, 2] = 1e4
    norm = RunningNorm()
    norm.get_buffer("var").fill_(begin)
    told = run(Program(regression, nn.Sequential(norm, *mlp(6, 16, 1)), sgd(0.1)), x, y)
    assert not [i for i in told.incidents if i["kind"] == "nonfinite_buffers"]


def test_inputs_that_a_normalization_scales_are_accepted(run: Any) -> None:
    x, y = columns()
    net = nn.Sequential(nn.BatchNorm1d(6), *mlp(6, 16, 1, activation=nn.ReLU))
    told = run(Program(regression, net), x * 1e9, y)
    assert told.incidents == []
    assert told.module.net[0].running_var.max() > 1e17


def test_data_of_another_scale_are_accepted(run: Any) -> None:
    x, y = columns()
    x[120:] *= 1e4
    net = nn.Sequential(nn.BatchNorm1d(6), *mlp(6, 16, 1, activation=nn.ReLU))
    told = run(Program(regression, net), x, y)
    assert [i["step"] for i in told.incidents if i["kind"] == "nonfinite_buffers"] == [15]
    assert told.module.net[0].running_var.max() > 1e6


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_lower_rate_is_used_after_a_stop(run: Any) -> None:
    x, y = columns(400)
    callbacks = lambda: default_callbacks(  # noqa: E731
        nan_rollback=NaNRollback(max_rollbacks=1), adaptive_gradient_clipping=None, learning_rate_backoff=None
    )
    program = lambda lr: Program(regression, mlp(6, 16, 16, 1, activation=nn.ReLU), sgd(lr))  # noqa: E731
    told = run(program(1.0), 30 * x, y, callbacks=callbacks())
    assert "cause: update too large" in told.headline
    saved = re.search(r"ckpt_path='(.*?)'", str(told.error))
    assert saved is not None
    resumed = run(
        program(1e-5), 30 * x, y, callbacks=callbacks(), ckpt_path=saved[1], max_epochs=2, logger=False
    )
    assert resumed.error is None
    assert "continues with lr=1e-05" in resumed.console
    assert resumed.module.trainer.optimizers[0].param_groups[0]["lr"] == 1e-5


@pytest.mark.parametrize("size", [400.0, 200.0])
def test_exp_of_an_outlier(run: Any, size: float) -> None:
    def variational(module: Any, batch: Any) -> Tensor:
        mu, log_variance = module.net(batch[0]).chunk(2, -1)
        kl: Tensor = 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
        return kl

    x = draw(160, 6)
    x[BAD] = size
    net = mlp(6, 4)
    nn.init.constant_(net[0].weight, 0.09)  # type: ignore[arg-type]
    told = run(Program(variational, net, sgd(1e-6)), x)
    (found,) = (i for i in told.incidents if i["action"] == "skipped")
    assert (found["step"], found["cause"]) == (10, "loss")
    assert re.search(rf"{FILE}:\d+ in variational", found["location"])
    assert "times larger there" in found["detail"]
    assert "torch.exp(log_variance.clamp(max=20))" in found["advice"]
    assert told.is_finite
    assert "cause: loss" in told.headline


def likelihood(module: Any, batch: Any) -> Tensor:
    mu, sigma = module.net(batch[0]).chunk(2, -1)
    normal: Any = torch.distributions.Normal(mu, F.softplus(sigma) + 1e-3, validate_args=True)
    loss: Tensor = -normal.log_prob(batch[1]).mean()
    return loss


@pytest.mark.parametrize("skips", [False, True])
def test_a_distribution_that_raises(run: Any, skips: bool) -> None:
    x, y = draw(320, 6), draw(320, 1, seed=1) / 9
    x[BAD, 2] = math.nan
    callbacks = default_callbacks(nan_rollback=NaNRollback(skip_invalid_batches=skips))
    told = run(Program(likelihood, mlp(6, 16, 2), sgd(0.05)), x, y, callbacks=callbacks)
    found = told.first("nonfinite_loss" if skips else "exception_in_step")
    assert (found["where"], found["cause"], found["step"]) == (["batch[0]"], "bad_input", 10)
    assert f"index in the data set: {BAD}" in found["detail"]
    assert (told.error is None) is skips
    assert Path("logs/run/last_good.ckpt").is_file() is not skips
    title = "recovered from nonfinite loss" if skips else "exception in the step"
    assert told.headline == f"{title} (cause: bad input)"


def test_a_parameter_that_a_distribution_rejects(run: Any) -> None:
    def negative(module: Any, batch: Any) -> Tensor:
        scale = module.net(batch[0]).abs() + 0.1 - 9 * batch[1]
        normal: Any = torch.distributions.Normal(0.0, scale, validate_args=True)
        loss: Tensor = -normal.log_prob(batch[0][:, :1]).mean()
        return loss

    is_bad = (torch.arange(160) == BAD).float()[:, None]
    told = run(Program(negative, mlp(6, 8, 1)), draw(160, 6), is_bad)
    found = told.first("exception_in_step")
    assert "softplus" in found["advice"]
    assert "in row 5" in found["detail"]
    assert found["cause"] == "forward_pass"


@pytest.mark.parametrize("at", [3, BAD])
def test_a_label_that_does_not_exist(run: Any, at: int) -> None:
    labels = torch.randint(0, 4, (160,), generator=torch.Generator().manual_seed(0))
    labels[at] = -1
    told = run(Program(lambda m, b: F.cross_entropy(m.net(b[0]), b[1]), mlp(6, 8, 4)), draw(160, 6), labels)
    found = told.first("exception_in_step")
    assert (found["where"], found["cause"], found["step"]) == (["batch[1]"], "bad_input", at // ROWS)
    assert f"index in the data set: {at}" in found["detail"]
    assert "ignore_index=-1" in found["advice"]
    assert "huge" not in found["advice"]


class Manual(Program):
    """Clips by itself, while gradients carry the loss scale."""

    def __init__(self, clip: Callable[..., Any]) -> None:
        super().__init__(regression, mlp(6, 16, 1), sgd(0.05))
        self.automatic_optimization = False
        self.clip = clip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        loss = regression(self, batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip(self, optimizer)
        optimizer.step()
        self.log("loss", loss)
        return loss


def by_lightning(module: Any, optimizer: Any) -> None:
    module.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")


def by_value(module: Any, optimizer: Any) -> None:
    nn.utils.clip_grad_value_(module.parameters(), 0.5)


def by_small_value(module: Any, optimizer: Any) -> None:
    nn.utils.clip_grad_value_(module.parameters(), 0.005)


@pytest.mark.parametrize("clip", [by_lightning, by_value, by_small_value])
def test_scaled_gradients_that_are_clipped(run: Any, clip: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    told = run(Manual(clip), *columns(), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    (found,) = told.incidents
    assert (found["kind"], found["cause"]) == ("constant_clipping", "scaled_gradients_clipped")
    assert "on_before_optimizer_step" in found["advice"]
    assert "clipped before they were unscaled" in found["detail"]
    assert told.headline == "clipping of most steps (cause: scaled gradients clipped)"


@pytest.mark.parametrize("alone", [False, True])
def test_a_clip_value_that_is_too_small(run: Any, alone: bool) -> None:
    callbacks = [GradientNormMonitor()] if alone else None
    program = Program(regression, mlp(6, 16, 1, activation=nn.ReLU), sgd(0.02))
    told = run(program, *columns(960), callbacks=callbacks, gradient_clip_val=0.01)
    if not alone:
        assert [i["cause"] for i in told.incidents] == ["clip_value_too_small"]
        assert "gradient_clip_val=0.01 of the Trainer" in told.incidents[0]["detail"]
    symptom = "clipping of most steps" if alone else "weight stagnation"
    assert told.headline == f"{symptom} (cause: clip value too small)"
    assert "Raise the value to which gradients are clipped" in " ".join(told.report.next_steps)
    assert not any("the learning rate 10 times" in step for step in told.report.next_steps)


def test_a_clip_value_of_the_modules_own_code(run: Any) -> None:
    class Clipped(Program):
        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            nn.utils.clip_grad_norm_(self.parameters(), 1e-3)

    x, y = columns(960)
    told = run(Clipped(regression, mlp(6, 16, 1, activation=nn.ReLU), sgd(0.02)), x, 3 * y + 2)
    (found,) = told.incidents
    assert "clipped to 0.001 by Clipped.configure_gradient_clipping" in found["detail"]
    assert "or that of your own code" in found["advice"]


@pytest.mark.filterwarnings("ignore:std")
def test_a_rate_is_not_cut_before_any_update(run: Any) -> None:
    told = run(Program(lambda m, b: m.net(b[0]).std(1).mean(), mlp(6, 8, 1)), *columns(160))
    assert str(told.error).startswith("No step was ever finite. aten::std")
    assert "of a dimension of one: leave it out" in told.first("training_diverged")["advice"]
    assert not any(i["kind"] == "learning_rate_backoff" for i in told.incidents)


def test_a_column_of_times_is_not_healthy(run: Any) -> None:
    x, y = columns(1600)
    x[:, 3] = 1.6e9 + 1e6 * x[:, 3]
    told = run(Program(regression, mlp(6, 16, 16, 1, activation=nn.ReLU)), x, y)
    assert told.headline == "stuck loss (cause: input scale)"


def test_one_bad_batch_is_not_what_keeps_a_network_from_learning(run: Any) -> None:
    x, y = columns(800)
    x[BAD + 400, 1] = math.inf
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(1.0), nn.Linear(16, 1))
    told = run(Program(regression, net), x, y)
    assert told.first("nonfinite_loss")["cause"] == "bad_input"
    assert "bad input" not in told.headline
    assert "zero gradient" in " ".join(s.cause.replace("_", " ") for s in told.report.verdict.symptoms)
    assert not any("the learning rate 10 times" in step for step in told.report.next_steps)


@pytest.mark.parametrize("schedule", [None, torch.optim.lr_scheduler.OneCycleLR])
def test_the_rate_that_is_to_be_lowered_is_the_one_in_the_code(run: Any, schedule: Any) -> None:
    def make(weights: Any) -> Any:
        optimizer = torch.optim.SGD(weights, lr=3.0)
        scheduler = schedule and schedule(optimizer, max_lr=30.0, total_steps=100)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}] if schedule else []

    x, y = columns(400)
    limit = NaNRollback(max_rollbacks=1)
    callbacks = default_callbacks(
        nan_rollback=limit, adaptive_gradient_clipping=None, learning_rate_backoff=None
    )
    told = run(Program(regression, mlp(6, 16, 16, 1), make), 30 * x, 1e3 * y, callbacks=callbacks)
    assert ("it was max_lr=30; try max_lr=0.3" if schedule else "it was lr=3; try lr=0.3") in str(told.error)


def one_cycle(optimizer: Any, top: float) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=top, total_steps=90)


def by_function(optimizer: Any, top: float) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 30 else 100 * top)


@pytest.mark.parametrize("schedule", [one_cycle, by_function])
def test_a_schedule_that_raises_the_rate_too_far(run: Any, schedule: Any) -> None:
    def configured(top: float) -> Any:
        def make(weights: Any) -> Any:
            optimizer = torch.optim.SGD(weights, lr=0.01, momentum=0.9)
            return [optimizer], [{"scheduler": schedule(optimizer, top), "interval": "step"}]

        return make

    net = mlp(6, 32, 32, 1, activation=nn.ReLU)
    told = run(Program(regression, net, configured(20.0)), *columns(), max_epochs=3)
    raised = [i for i in told.incidents if i["cause"] == "update_too_large"]
    assert raised
    assert all("has raised the learning rate from" in i["advice"] for i in raised)
    name = "OneCycleLR" if schedule is one_cycle else "LambdaLR"
    what = "max_lr" if schedule is one_cycle else f"{FILE}:"
    assert any(name in step and what in step for step in told.report.next_steps)
    cured = Program(regression, mlp(6, 32, 32, 1, activation=nn.ReLU), configured(0.01))
    assert run(cured, *columns(), max_epochs=3, logger=False).error is None
    assert regression(cured, columns()) < 0.8 * regression(told.module, columns())


def test_a_loss_module_of_ones_own(run: Any) -> None:
    class Selected(nn.Module):
        def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
            return scores.square()[mask].mean()

    mask = draw(160, 4, seed=1) > 0
    mask[80:88] = False
    program = Program(lambda m, b: m.criterion(m.net(b[0]), b[1]), mlp(6, 16, 4))
    program.criterion = Selected()
    told = run(program, draw(160, 6), mask)
    found = told.first("nonfinite_loss")
    assert (found["cause"], found["where"], found["step"]) == ("loss", ["criterion"], 10)
    assert re.search(rf"{FILE}:\d+ in forward", found["location"])
    assert "empty selection" in found["advice"]
    assert "epsilon" not in found["advice"]
    assert told.headline == "recovered from nonfinite loss (cause: loss)"


def test_one_unit_on_the_wrong_side(run: Any) -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
    nn.init.constant_(net[0].weight, -10.0)  # type: ignore[arg-type]
    x = draw(3200, 1)
    told = run(Program(regression, net, sgd(0.05)), x, x.relu(), batch_size=16)
    (found,) = told.incidents
    assert (found["kind"], found["cause"], found["where"]) == ("dead_units", "inactive_output", ["net.0"])
    assert "LeakyReLU" in found["advice"]
    assert "A higher learning rate does not help" in found["advice"]
    assert told.headline == "dead units (cause: inactive output)"


@pytest.mark.parametrize("clips", [True, False])
def test_a_rate_that_is_a_thousand_times_too_high(run: Any, clips: bool) -> None:
    more: dict[str, Any] = {} if clips else {"adaptive_gradient_clipping": None}
    program = Program(regression, mlp(6, 16, 16, 1, activation=nn.ReLU), sgd(10.0))
    told = run(program, *columns(1600), callbacks=default_callbacks(**more))
    assert told.error is None
    assert told.is_finite
    assert told.first("exploding_gradient")["cause"] == "update_too_large"
    assert "lower the learning rate" in told.first("exploding_gradient")["advice"]
    assert "cause: update too large" in told.headline
    assert clips or told.first("learning_rate_found")["value"] < 1


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_raw_pixels(run: Any, activation: Any) -> None:
    pixels = torch.randint(0, 256, (960, 1, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    classes = (pixels.mean((1, 2, 3)) > 127).long()
    net = nn.Sequential(nn.Flatten(), *mlp(25, 16, 2, activation=activation))
    step = lambda m, b: F.cross_entropy(m.net(b[0]), b[1])  # noqa: E731
    told = run(Program(step, net, sgd(0.05)), pixels, classes, batch_size=16)
    assert told.incidents[0]["cause"] == "input_scale"
    assert "(x - x.mean(0)) / x.std(0)" in told.incidents[0]["advice"]
    assert re.search(r"rms of 1\d\d", told.incidents[0]["detail"])


class Churn(nn.Module):
    """A category, by its embedding, beside columns of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.plan, self.mlp = nn.Embedding(30, 4), mlp(6, 16, 1, activation=nn.ReLU)

    def forward(self, plan: Tensor, numbers: Tensor) -> Tensor:
        answers: Tensor = self.mlp(torch.cat([self.plan(plan), numbers], 1))
        return answers.squeeze(1)


def churn(module: Any, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(module.net(*batch[:2]), batch[2])


def test_a_time_in_seconds_beside_a_category(run: Any) -> None:
    z = draw(3200, 2)
    times = torch.stack([1.7e9 + 5e6 * z[:, 0], 120 + 40 * z[:, 1]], 1)
    plans = torch.randint(30, (3200,), generator=torch.Generator().manual_seed(0))
    told = run(Program(churn, Churn()), plans, times, (z[:, 0] > 0).float(), batch_size=16)
    found = told.incidents[0]
    assert (found["cause"], found["where"]) == ("input_scale", ["net.mlp.0"])
    assert "a normalization layer before net.mlp.0" in found["advice"]


def test_weights_that_go_to_zero(run: Any) -> None:
    decays = lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=20.0)  # noqa: E731
    told = run(Program(regression, mlp(6, 16, 1), decays), *columns(400))
    assert [i["cause"] for i in told.incidents if i["kind"] == "vanishing_weights"] == ["weight_decay"]
    assert "Lower weight_decay" in told.first("vanishing_weights")["advice"]


def test_an_outlier_of_the_targets(run: Any) -> None:
    x, y = columns()
    y[BAD + 80] = 1e6
    told = run(Program(regression, mlp(6, 16, 1)), x, y)
    found = told.first("loss_spike")
    assert (found["cause"], found["where"]) == ("bad_input", ["batch[1]"])
    assert "in row 5" in found["detail"]
    assert f"(index in the data set: {BAD + 80})" in found["detail"]
    assert "exploding" not in told.headline


def healthy() -> Sequence[tuple[nn.Module, Any]]:
    return [
        (nn.Sequential(nn.BatchNorm1d(6), *mlp(6, 16, 1, activation=nn.ReLU)), sgd(0.05)),
        (mlp(6, 16, 1, activation=nn.ReLU), lambda w: torch.optim.AdamW(w, lr=1e-2, weight_decay=0.01)),
    ]


@pytest.mark.parametrize(("net", "optimizer"), healthy())
def test_a_healthy_run_has_no_incident(run: Any, net: nn.Module, optimizer: Any) -> None:
    x = draw(800, 6)
    told = run(Program(regression, net, optimizer), x, x[:, :1], gradient_clip_val=1.0)
    assert told.incidents == []
    assert told.headline == "healthy"


@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_a_function_that_is_compiled_stays_compiled(run: Any) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(out * 0 + 3 for out in graph(*args))

    compiled = torch.compile(lambda loss: loss * 0 + 1, backend=backend)
    factors = []

    def step(module: Any, batch: Any) -> Tensor:
        factors.append(compiled(regression(module, batch).detach()).item())
        return regression(module, batch)

    run(Program(step, mlp(6, 8, 1)), *columns(80), callbacks=[TrainingDiagnosis()])
    assert factors == [3.0] * 10


def test_the_exponential_of_a_loss_is_trained(run: Any) -> None:
    outcome = run(Program(lambda m, b: regression(m, b).exp(), mlp(6, 8, 1), sgd(1e-2)), *columns())
    assert outcome.error is None


class Overwrites(Program):
    """Weights are written between two steps, as a faulty constraint or a restored average does."""

    by: float

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 10:
            self.net.get_parameter("0.weight").data.mul_(self.by)


@pytest.mark.parametrize("by", [1e22, 1e36])
def test_weights_that_a_hook_makes_huge_are_no_matter_of_the_rate(run: Any, by: float) -> None:
    module = Overwrites(regression, mlp(6, 16, 1))
    module.by = by
    told = run(module, *columns(), max_epochs=3, callbacks=default_callbacks(nan_rollback=often()))
    found = told.first("nonfinite_weights")
    assert (found["cause"], found["where"]) == ("corrupted_weights", ["net.0.weight"])
    assert "farther than Adam can move it at a learning rate of 0.003" in found["detail"]
    assert "Look for code that writes net.0.weight" in found["advice"]
    assert told.is_finite
    assert told.error is None


def often() -> NaNRollback:
    return NaNRollback(snapshot_every_n_steps=20)
