"""The check on a real fit: warns, raises or repairs, and otherwise was never there."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from lightning_gradguard import (
    InitializationCheck,
    InitializationError,
    NaNRollback,
    TrainingDiagnosis,
    default_callbacks,
)
from tests.report.runs import report_of
from tests.tasks import Batch, Classifier, Listener, batches, fit, same, weights


class Deep(Classifier):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        layers = [layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.Dropout(0.1), *layers)
        self.net.append(nn.Linear(64, 4))


def test_warn_changes_nothing_and_reports_all_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, module = Deep(), Deep()
    logger = CSVLogger(tmp_path)
    torch.manual_seed(1)
    fit(bare, batches(5))
    torch.manual_seed(1)
    check = InitializationCheck()
    trainer = fit(module, batches(5), [check], logger=logger, enable_progress_bar=True)
    assert same(weights(bare), weights(module))
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert "nn.init.kaiming_normal_(model.net[i].weight, nonlinearity='relu')" in text
    record = json.loads((Path(logger.log_dir) / "incidents.jsonl").read_text())
    assert record["kind"] == "poor_initialization"
    assert record["action"] == "none"
    assert "net.5" in record["where"]
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "init/gradient_gain" in header
    assert trainer.callback_metrics["train_loss_epoch"].isfinite()


@pytest.mark.parametrize(
    ("act", "bias", "scale", "kind", "cause", "following"),
    [
        (nn.ReLU, -20.0, 1.0, "dead_units", "", "gradient_gain"),
        (nn.ReLU, None, 1.0, "poor_initialization", "", "dead_units"),
        (nn.Tanh, 20.0, 1.0, "poor_initialization", "", "saturated_units"),
        (nn.Tanh, 0.0, 1e4, "saturated_units", "input_scale", ""),
        (nn.Tanh, 0.0, 1e20, "saturated_units", "bad_input", ""),
    ],
)
def test_what_has_one_cause_is_one_incident(
    act: Any, bias: float | None, scale: float, kind: str, cause: str, following: str
) -> None:
    listener = Listener()
    torch.manual_seed(0)
    module = Classifier()
    module.net = nn.Sequential(*(m for i in range(4) for m in (nn.Linear(20, 20), act())), nn.Linear(20, 4))
    if bias is None:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    else:
        nn.init.constant_(module.net[2].bias, bias)  # type: ignore[arg-type]
    data = [(x * scale, y) for x, y in batches(1)]
    fit(module, data, [InitializationCheck(), listener])
    (incident,) = listener.found
    assert (incident.kind, incident.cause) == (kind, cause)
    assert f"with it {following}" in incident.detail or not following


@pytest.mark.parametrize(("first", "cause"), [(nn.Identity(), "input_scale"), (nn.BatchNorm1d(20), "")])
def test_inputs_that_the_network_standardizes_are_no_cause(first: nn.Module, cause: str) -> None:
    listener = Listener()
    torch.manual_seed(0)
    module = Classifier()
    layers = [m for i in range(4) for m in (nn.Linear(20, 20), nn.Tanh())]
    nn.init.normal_(layers[0].weight, std=100.0 if cause == "" else 0.2)  # type: ignore[arg-type]
    module.net = nn.Sequential(first, *layers, nn.Linear(20, 4))
    fit(module, [(x * 1e4, y) for x, y in batches(1)], [InitializationCheck(), listener])
    assert any(one.cause == "input_scale" for one in listener.found) == bool(cause)
    assert listener.found


def test_a_normalization_is_put_before_the_first_layer_and_not_before_the_one_that_saturates() -> None:
    listener = Listener()
    torch.manual_seed(0)
    module = Classifier()
    module.net = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 4))
    fit(module, [(x * 1e4, y) for x, y in batches(1)], [InitializationCheck(), listener])
    (incident,) = (one for one in listener.found if one.cause == "input_scale")
    assert incident.where == ("net.2",)
    assert "a normalization layer before net.0." in incident.advice


def test_raise_stops_before_the_first_step() -> None:
    module = Deep()
    before = weights(module)
    with pytest.raises(InitializationError, match="(?s)will not train.*gradient_gain.*kaiming_normal_"):
        fit(module, batches(5), [InitializationCheck(on_failure="raise")])
    assert same(before, weights(module))


@pytest.mark.parametrize("order", [1, -1])
def test_repaired_weights_are_those_that_a_rollback_returns_to(order: int) -> None:
    check, rollback = InitializationCheck(on_failure="repair"), NaNRollback(patience=1)
    nan = [(x * float("nan"), y) for x, y in batches(1)]
    module, twin = Deep(), Deep()
    fit(module, nan * 1, [check, rollback][::order])
    assert rollback.rollbacks == 0 or rollback.rollbacks == 1
    fit(twin, batches(1), [InitializationCheck(on_failure="repair")], max_steps=0)
    healthy = Deep()
    fit(healthy, [*batches(1), *nan], [InitializationCheck(on_failure="repair"), NaNRollback(patience=1)])
    assert not same(weights(Deep()), weights(healthy))
    assert all(bool(torch.isfinite(w).all()) for w in weights(healthy))


def values(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


class Still(Deep):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("initialize", [nn.init.zeros_, lambda w: nn.init.normal_(w, std=0.8)])
def test_nothing_changed_is_nothing_repaired(
    initialize: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    module = Still()
    for layer in module.net:
        if isinstance(layer, nn.Linear):
            initialize(layer.weight)
    before, logger = values(module), CSVLogger(tmp_path)
    check = InitializationCheck(on_failure="repair")
    fit(module, batches(1), [check], logger=logger, max_steps=1, enable_progress_bar=True)
    assert same(before, values(module))
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert "Nothing was repaired: the weights of net.0, net.3, net.5 and 10 more are not the default" in text
    assert "Repaired" not in text
    records = [*map(json.loads, (Path(logger.log_dir) / "incidents.jsonl").read_text().splitlines())]
    assert {record["action"] for record in records} == {"none"}
    # the argument that the message names repairs them
    made = re.search(r"InitializationCheck\(on_failure='repair', repair_modules=\[.*?\]\)", text)
    assert made
    named = eval(made[0], {"InitializationCheck": InitializationCheck})
    fit(module, batches(1), [named], logger=CSVLogger(tmp_path, version="named"), max_steps=1)
    assert not same(before, values(module))
    (record, *_) = (Path(tmp_path) / "lightning_logs" / "named" / "incidents.jsonl").read_text().splitlines()
    assert json.loads(record)["action"] == "repaired"
    assert [f for f in named.findings if f.severity == "fail"] == []


def test_a_repair_that_betters_nothing_is_undone(capsys: pytest.CaptureFixture[str]) -> None:
    class Tenth(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.1 * x + 0.9 * x.detach()  # a tenth of each gradient, whatever the weights are

    class Attenuated(Still):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*(nn.Sequential(m, Tenth()) for m in self.net))

    module = Attenuated()
    before = values(module)
    fit(module, batches(1), [InitializationCheck(on_failure="repair")], enable_progress_bar=True)
    printed = capsys.readouterr()
    assert "Nothing was repaired: no repair that was tried betters" in printed.out + printed.err
    assert same(before, values(module))


def test_a_gain_through_time_is_advice_and_no_incident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Long(Classifier):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net: Any = nn.RNN(1, 16, batch_first=True)
            self.head = nn.Linear(16, 4)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            states, _ = self.net(batch[0].repeat(1, 3)[..., None])
            return nn.functional.cross_entropy(self.head(states[:, -1]), self.labels(batch))

        def labels(self, batch: Batch) -> Tensor:
            return batch[1]

    class Random(Long):
        def labels(self, batch: Batch) -> Tensor:
            return torch.randint_like(batch[1], 4)

    logger = CSVLogger(tmp_path)
    fit(Long(), batches(1), [InitializationCheck()], logger=logger, enable_progress_bar=True)
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert re.search(r"WARN  net    gain_through_time  -", text)
    assert (
        "cure: model.net = nn.LSTM(1, 16, batch_first=True); nn.init.constant_(model.net.bias_hh_l0" in text
    )
    assert text.count("cure: ") == 1
    assert "Poor initialization" not in text
    assert not (Path(logger.log_dir) / "incidents.jsonl").exists()
    fit(Random(), batches(80), [InitializationCheck(), TrainingDiagnosis()])
    text = capsys.readouterr().err
    assert "Vanishing gradients at step" in text
    assert "paste at the end of __init__, with model = self, what the table of the check has." in text
    assert text.count("model.net = nn.LSTM(") == 1  # the cure, which both have found


@pytest.mark.parametrize("is_normalized", [False, True])
def test_the_part_of_the_batch_that_is_huge_is_named(
    is_normalized: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    class Mixed(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            norm = nn.BatchNorm1d(4) if is_normalized else nn.Identity()
            self.embed, self.numeric = nn.Embedding(9, 8), nn.Sequential(norm, nn.Linear(4, 8))
            self.head = nn.Linear(16, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            parts = self.embed(batch["class"]), self.numeric(batch["age"])
            return nn.functional.cross_entropy(self.head(torch.cat(parts, 1)), batch["y"])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    data: Any = [
        {"class": torch.randint(9, (16,)), "age": torch.randn(16, 4) * 1e9, "y": torch.arange(16) % 3}
    ]
    check = InitializationCheck()
    fit(Mixed(), data, [check], enable_progress_bar=True)
    printed = capsys.readouterr()
    text = printed.out + printed.err
    expected = [] if is_normalized else ["loss_over_guessing", "input_rms"]
    assert [f.criterion for f in check.findings] == expected
    assert text.count("cure: standardize batch['age'], (t - t.mean(0)) / t.std(0): rms ") == len(expected[:1])
    assert "cure: nn.init" not in text


def test_what_is_no_fault_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class EachStep(Classifier):
        """The first steps reach the loss at once, and not through time alone."""

        def __init__(self) -> None:
            super().__init__()
            self.net: Any = nn.LSTM(1, 16, batch_first=True)
            self.head = nn.Linear(16, 1)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            inputs = batch[0].repeat(1, 4)
            return nn.functional.mse_loss(
                self.head(self.net(inputs[..., None])[0])[..., 0], inputs.cumsum(1) / 6
            )

    fit(EachStep(), batches(1), [InitializationCheck()], enable_progress_bar=True)
    printed = capsys.readouterr()
    (line,) = [line for line in (printed.out + printed.err).splitlines() if "gradguard" in line]
    why = r"\(here the loss reaches the first steps by other paths, too\)"
    assert re.search(f"gain_through_time of net: -.* decades, usual: -2.25 .. 3 {why}; healthy", line)


def test_a_plain_convolutional_network_has_advice_and_no_incident(tmp_path: Path) -> None:
    class Plain(Classifier):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layers: list[nn.Module] = []
            for i in range(4):
                layers += [nn.Conv2d(16 if i else 1, 16, 3, padding=1), nn.ReLU()]
            self.net: Any = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4))

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            return nn.functional.cross_entropy(self.net(torch.randn(len(batch[1]), 1, 8, 8)), batch[1])

    check = InitializationCheck()
    logger = CSVLogger(tmp_path)
    fit(Plain(), batches(1), [check], logger=logger)
    assert {f.severity for f in check.findings if f.criterion == "gradient_gain"} == {"warn"}
    assert not (Path(logger.log_dir) / "incidents.jsonl").exists()


def test_a_resumed_run_is_not_checked(tmp_path: Path) -> None:
    trainer = fit(Deep(), batches(3))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    check = InitializationCheck(on_failure="raise")
    fit(Deep(), batches(3), [check], max_epochs=2, ckpt_path=str(tmp_path / "a.ckpt"))
    assert check.findings == []


def test_replaced_training_step_is_called_by_training_alone() -> None:
    module = Classifier()
    training_step, calls = module.training_step, []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return training_step(*arguments)

    module.training_step = counted  # type: ignore[method-assign,assignment]
    fit(module, batches(5), default_callbacks())
    assert len(calls) == 5


@pytest.mark.parametrize("writes", ["pop", "in_place"])
def test_a_step_may_write_to_its_batch(writes: str) -> None:
    class Writing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            target = batch.pop("target")
            if writes == "in_place":
                batch["x"].sub_(batch["x"].mean(0)).mul_(0.5)
            return nn.functional.cross_entropy(self.net(batch["x"]), target)

    def data() -> Any:
        return [{"x": x, "target": y} for x, y in batches(5)]

    bare, module = Writing(), Writing()
    fit(bare, data())
    fit(module, data(), default_callbacks())
    assert same(weights(bare), weights(module))


def test_manual_optimization_is_checked_in_the_first_step() -> None:
    class Manual(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            layers = [layer for _ in range(25) for layer in (nn.Linear(64, 64), nn.Sigmoid())]
            self.net = nn.Sequential(nn.Linear(20, 64), *layers, nn.Linear(64, 4))

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    bare, module, check = Manual(), Manual(), InitializationCheck()
    bare.load_state_dict(module.state_dict())
    fit(bare, batches(3))
    fit(module, batches(3), [check])
    assert same(weights(bare), weights(module))
    assert [f.criterion for f in check.findings] == ["gradient_profile"]
    assert check.findings[0].value > 3


@pytest.mark.parametrize("returned", [None, {"loss": None}, "text"])
def test_a_step_without_a_loss_is_no_harm(returned: Any) -> None:
    calls: list[int] = []  # outside of the module, whose attributes the check puts back

    class Odd(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            calls.append(batch_idx)
            return returned if len(calls) == 1 else super().training_step(batch, batch_idx)

    check, module = InitializationCheck(on_failure="raise"), Odd()
    fit(module, batches(3), [check])
    assert calls == [0, 0, 1, 2]
    assert check.findings == []
    assert all(bool(torch.isfinite(w).all()) for w in weights(module))


@pytest.mark.parametrize("on_failure", ["warn", "raise", "repair"])
def test_a_network_is_not_blamed_for_a_bad_batch(on_failure: Any, capsys: pytest.CaptureFixture[str]) -> None:
    inputs, target = batches(1)[0]
    inputs[3, 0] = torch.nan
    module = Deep()
    before = weights(module)
    check = InitializationCheck(on_failure=on_failure)
    fit(module, [(inputs, target)], [check, NaNRollback()], enable_progress_bar=True)
    assert same(before, weights(module)), "nothing to repair, and the step is skipped"
    assert check.findings == []
    printed = capsys.readouterr()
    assert "Initialization not checked: batch[0] holds nonfinite values in row 3" in printed.out + printed.err


@pytest.mark.parametrize("reported_by_step", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: (x - y).square().sum(1).sqrt().mean(),
        lambda x, y: (x - y).abs().sum(1).pow(0.5).mean(),
        lambda x, y: torch.where(x < y, (y - x).log(), x - y).mean(),
    ],
)
def test_a_gradient_that_is_nonfinite_from_the_start_fails(loss: Any, reported_by_step: bool) -> None:
    class Siamese(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            value: Tensor = loss(self.net(batch[0]), self.net(batch[0]))
            return value

    listener = Listener()
    check, module = InitializationCheck(), Siamese()
    before = weights(module)
    others = [NaNRollback()] if reported_by_step else []
    fit(module, batches(1), [check, *others, listener], max_steps=1)
    assert same(before, weights(module)) or not reported_by_step
    (finding,) = (f for f in check.findings if f.severity == "fail")
    assert (finding.criterion, finding.measured) == ("nonfinite_gradients", "100% of the gradients")
    assert re.search(r"test_initialization_check.py:\d+ in <lambda>: `lambda x, y: ", finding.cure)
    (incident,) = listener.found  # that of the step where a callback reports it
    assert (incident.kind, incident.cause) == ("nonfinite_gradient", "backward_pass")
    assert not incident.advice.startswith("Cure: ")
    assert "test_initialization_check.py" in incident.where[0]
    assert incident.location == incident.where[0]
    assert incident.action == ("skipped" if reported_by_step else "none")


def test_an_undefined_loss_is_called_that(tmp_path: Path) -> None:
    class Undefined(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            assert loss is not None
            return loss + (loss * 0).log()

    logger = CSVLogger(tmp_path)
    check = InitializationCheck()
    fit(Undefined(), batches(1), [check], logger=logger)
    assert [finding.criterion for finding in check.findings if finding.severity == "fail"] == ["loss"]
    (record,) = map(json.loads, (Path(logger.log_dir) / "incidents.jsonl").read_text().splitlines())
    assert record["kind"] == "nonfinite_loss"


@pytest.mark.parametrize("order", [1, -1])
def test_what_the_suite_puts_in_place_of_the_step_forbids_no_extra_pass(order: int) -> None:
    check, rollback = InitializationCheck(), NaNRollback(skip_invalid_batches=True)
    module = Deep()
    fit(module, batches(1), [TrainingDiagnosis(), rollback, check][::order])
    assert check.values
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_a_step_of_the_object_is_that_of_the_user_after_the_fit(order: int, raises: bool) -> None:
    module = Deep()
    step = module.training_step

    def counted(batch: Batch, batch_idx: int) -> Any:
        calls.append(batch_idx)
        if raises and len(calls) == 3:
            raise RuntimeError("of the user's")
        return step(batch, batch_idx)

    calls: list[int] = []
    module.training_step = counted  # type: ignore[method-assign]
    callbacks = [TrainingDiagnosis(), NaNRollback(skip_invalid_batches=True), InitializationCheck()]
    with pytest.raises(RuntimeError, match="of the user") if raises else nullcontext():
        fit(module, batches(4), callbacks[::order])
    assert calls[:3] == [0, 1, 2]  # one that raises is run again, to be examined
    assert module.training_step is counted


@pytest.mark.parametrize("automatic", [True, False])
def test_a_parametrization_that_writes_a_buffer_is_as_without_the_check(automatic: bool) -> None:
    class Spectral(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic
            self.net[4] = nn.utils.parametrizations.spectral_norm(self.net[4])

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            if not automatic:
                optimizer: Any = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    bare, module = Spectral(), Spectral()
    fit(bare, batches(5))
    fit(module, batches(5), [InitializationCheck()])
    assert same(weights(bare), weights(module))


@pytest.mark.parametrize("repairs", [False, True])
def test_the_cure_of_several_layers_is_that_of_all(repairs: bool, tmp_path: Path) -> None:
    module, cured = Deep(), Deep()
    for network in (module, cured):
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    arguments: dict[str, Any] = {"on_failure": "repair", "repair_modules": names} if repairs else {}
    logger = CSVLogger(tmp_path, "", "run")
    fit(module, batches(3), [InitializationCheck(**arguments)], logger=logger)
    incident = json.loads((tmp_path / "run" / "incidents.jsonl").read_text().splitlines()[0])
    assert incident["action"] == ("repaired" if repairs else "none")
    steps = report_of(tmp_path / "run").next_steps
    if repairs:
        assert f"{names[1]} to {names[-2]} (12 layers): He normal, scaled to unit variance" in steps[0]
        return
    exec(steps[0].removeprefix("Cure: "), {"model": cured, "nn": nn})
    check = InitializationCheck()
    fit(cured, batches(1), [check])
    assert not [finding for finding in check.findings if finding.severity != "info"]


class Walk:
    """An environment of the user's, with random numbers of its own."""

    def __init__(self) -> None:
        self.random, self.state = torch.Generator().manual_seed(0), (0.0,)

    def step(self) -> float:
        self.state = (self.state[0] + torch.randn(1, generator=self.random).item(),)
        return self.state[0]


def test_an_environment_that_the_step_moves_is_where_it_would_be_without_the_check() -> None:
    class Walker(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.walk = Walk()

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            x, y = batch
            return super().training_step((x + self.walk.step(), y), batch_idx)

    bare, module = Walker(), Walker()
    fit(bare, batches(5))
    fit(module, batches(5), default_callbacks(adaptive_gradient_clipping=None))
    assert bare.walk.state == module.walk.state
    assert same(weights(bare), weights(module))
