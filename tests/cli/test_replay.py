"""`replay` reproduces an incident, or reports that it does not."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_gradguard import Change, NaNRollback, Treatment
from lightning_gradguard.cli.main import main
from lightning_gradguard.cli.replay import comparison
from lightning_gradguard.core.forensics import Origin
from lightning_gradguard.runtime.incidents.dossier import read_dossier, write_dossier
from tests.tasks import Batch, Classifier, batches, fit, poisoned

HERE = "tests.cli.test_replay"


class Logarithm(pl.LightningModule):
    """Fails in its forward pass, in the step itself, backward, or not at all; and by chance."""

    def __init__(self, width: int = 8, fails_in: str = "forward", chance: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(20, width), nn.Dropout(0.5), Logs(fails_in == "forward", chance))
        self.head = nn.Linear(width, 4)
        self.fails_in = fails_in

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, target = batch
        fails = bool(inputs[0, 0] > 90)
        loss = nn.functional.cross_entropy(self.head(self.body(inputs)), target)
        if fails and self.fails_in == "loss":
            loss = loss + (loss * 0).log()
        if fails and self.fails_in == "backward":
            loss = loss + (self.head.weight * 0).norm().sqrt()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Logs(nn.Module):
    def __init__(self, fails: bool, chance: float) -> None:
        super().__init__()
        self.fails = fails
        self.chance = chance

    def forward(self, values: Tensor) -> Tensor:
        drawn = bool(torch.rand(()) < self.chance)
        if drawn or (self.fails and values.abs().max() > 30):
            return (values * 0).log()
        return values


class ByHand(Logarithm):
    """The same with manual optimization and a step that asks where the run stands."""

    def __init__(self) -> None:
        super().__init__(fails_in="loss")
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        if self.global_step >= 6 and self.current_epoch == 0:
            self.manual_backward(loss)
        else:
            self.manual_backward(loss.nan_to_num(0, 0, 0))
        optimizer.step()


def marked(n: int = 12, at: int = 6) -> list[Batch]:
    """Batches of which one makes `Logarithm` fail."""
    data = batches(n)
    data[at][0][0] = 100.0
    return data


def record(module: pl.LightningModule, data: list[Batch], folder: Path, **arguments: Any) -> Path:
    """Returns the dossier of a fit."""
    fit(module, data, [NaNRollback(snapshot_every_n_steps=1)], folder, **arguments)
    (found,) = (folder / "incidents").iterdir()
    return found


def replayed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """Returns the exit code and the output; a usage error is one line."""
    capsys.readouterr()
    try:
        main(["replay", *map(str, arguments)])
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    if code == 2:
        assert out == ""
        assert err.startswith("lightning-gradguard replay: ")
        assert err.count("\n") == 1
        assert len(err) < 500
        return code, err
    assert err == ""
    return code, out


def test_nan_batch_is_reproduced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dossier = record(Classifier(norm=True, dropout=0.1), poisoned(batches(12), nan=[6]), tmp_path)
    arguments = ("--model", "tests.tasks.Classifier", "--model.norm", "true", "--model.dropout", "0.1")
    code, printed = replayed(capsys, dossier, *arguments)
    assert code == 0
    head = "Reproduced: the batch of step 6 (epoch 0, batch 6, rank 0, 32-true) fails as it did in the run."
    assert printed.startswith(head)
    assert "  cause     bad input\n  at fault  batch[0]\n" in printed
    assert "what to do: Look at batch[0]" in printed


@pytest.mark.parametrize("sign", [" ", "="])
def test_a_module_whose_name_is_no_identifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    dossier = record(Classifier(), poisoned(batches(12), nan=[6]), tmp_path)
    (tmp_path / "01_own-model.py").write_text(
        "from tests.tasks import Classifier\n\n\nclass Own(Classifier): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    code, printed = replayed(capsys, dossier, *f"--model{sign}01_own-model.Own".split())
    assert (code, printed.startswith("Reproduced: ")) == (0, True), printed


def test_a_detail_to_which_the_run_has_added_samples_is_printed_once(tmp_path: Path) -> None:
    """Also from another folder, from which the path of the line is a longer one."""
    found = Origin(
        "loss", location="step.py:7", detail="aten::log returned nan, in row 4, at step.py:7: `x`."
    )
    detail = "aten::log returned nan, in row 4, at /code/step.py:7: `x` (index in the data set: 42)."
    recorded = dataclasses.replace(found, location="/code/step.py:7", detail=detail)
    dossier = read_dossier(record(Classifier(), poisoned(batches(4), nan=[2]), tmp_path))
    printed = comparison(dataclasses.replace(dossier, origin=recorded), found)
    assert printed.count("aten::log") == 1
    assert "at step.py:7: `x` (index in the data set: 42)." in printed


@pytest.mark.parametrize(
    ("fails_in", "cause", "operation"),
    [
        ("forward", "forward_pass", "aten::log"),
        ("loss", "loss", "aten::log"),
        ("backward", "backward_pass", "aten::"),
    ],
)
@pytest.mark.parametrize(
    "precision", ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true"]
)
def test_every_pass_and_precision(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fails_in: str,
    cause: str,
    operation: str,
    precision: str,
) -> None:
    arguments: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=0.5)  # at its floor: overflow is no longer left alone
        arguments = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    data = marked()
    if precision == "16-mixed" and fails_in == "backward":
        # three overflows are the scaler's; the fourth is a dossier
        data = [*data[:6], *[data[6]] * 4, *data[7:]]
    dossier = record(Logarithm(fails_in=fails_in), data, tmp_path, **arguments)
    recorded = read_dossier(dossier)
    assert recorded.precision == precision
    assert recorded.origin.cause == cause
    assert recorded.origin.operation.startswith(operation)
    code, printed = replayed(capsys, dossier, "--model", f"{HERE}.Logarithm", "--model.fails_in", fails_in)
    assert (code, printed.startswith("Reproduced: ")) == (0, True), printed
    assert recorded.origin.operation in printed
    # without the cause, it is not reproduced
    code, printed = replayed(capsys, dossier, "--model", f"{HERE}.Logarithm", "--model.fails_in", "nowhere")
    assert code == 1
    assert printed.startswith("Not reproduced: ")
    assert "transient" not in printed
    assert "found now: All numbers of the batch are finite with this module, on the CPU." in printed


def test_overflow_depends_on_the_loss_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What float16 cannot hold at the run's scale is reproduced at that scale only."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    module = Logarithm(fails_in="loss")
    path = record(module, marked(at=0), tmp_path, plugins=plugins)
    dossier = read_dossier(path)
    assert dossier.loss_scale == 2.0**30
    arguments = ("--model", f"{HERE}.Logarithm", "--model.fails_in", "nowhere")
    code, printed = replayed(capsys, path, *arguments)
    assert (code, "backward pass" in printed) == (1, True)
    tame = write_dossier(tmp_path / "tame", dataclasses.replace(dossier, loss_scale=1.0), megabytes=1)
    code, printed = replayed(capsys, tame, *arguments)
    assert (code, "backward pass" in printed) == (1, False)


def test_random_numbers_are_restored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Logarithm(fails_in="nowhere", chance=0.1)
    fit(module, batches(30), [NaNRollback()], tmp_path)
    dossiers = sorted((tmp_path / "incidents").iterdir())
    assert dossiers
    arguments = ("--model", f"{HERE}.Logarithm", "--model.fails_in", "nowhere", "--model.chance", "0.1")
    for dossier in dossiers:
        assert read_dossier(dossier).origin.cause == "forward_pass"
        assert replayed(capsys, dossier, *arguments)[0] == 0
    recorded = read_dossier(dossiers[0])
    torch.manual_seed(7)
    other = {**recorded.rng, "torch": torch.get_rng_state()}
    moved = write_dossier(tmp_path / "moved", dataclasses.replace(recorded, rng=other), megabytes=1)
    assert replayed(capsys, moved, *arguments)[0] == 1


def test_manual_optimization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dossier = record(ByHand(), marked(), tmp_path)
    assert read_dossier(dossier).origin.cause == "loss"
    code, printed = replayed(capsys, dossier, "--model", f"{HERE}.ByHand")
    assert (code, printed.startswith("Reproduced: ")) == (0, True), printed


class Corrupted(Classifier):
    """Weights that other code has written."""

    rows = slice(0, 1)
    value = math.inf

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 6:
            first: Any = self.net[0]
            first.weight.data[0, self.rows] = self.value


class Overwritten(Corrupted):
    rows = slice(0, 20)


class Huge(Corrupted):
    value = 1e38  # finite, and too much for the layers above


class Undefined(Classifier):
    """A learning rate that its schedule makes NaN."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 6:
            self.trainer.optimizers[0].param_groups[0]["lr"].fill_(math.nan)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=torch.tensor([1e-3]))


def test_a_line_that_is_mended_is_no_longer_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = read_dossier(record(Logarithm(fails_in="loss"), marked(), tmp_path))
    before = dataclasses.replace(recorded.origin, code="loss = loss + loss.log()")
    path = write_dossier(tmp_path / "mended", dataclasses.replace(recorded, origin=before), megabytes=1)
    arguments = ("--model", f"{HERE}.Logarithm", "--model.fails_in", "nowhere")
    code, printed = replayed(capsys, path, *arguments)
    assert code == 1
    assert "on the CPU: `loss = loss + loss.log()` of the run is no longer in " in printed


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        *((Corrupted, "corrupted_weights"), (Overwritten, "update_too_large"), (Huge, "corrupted_weights")),
        (Undefined, "nonfinite_learning_rate"),
    ],
)
def test_causes_in_weights_are_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: type[Classifier], cause: str
) -> None:
    path = record(kind(), batches(8), tmp_path)
    recorded = read_dossier(path)
    assert recorded.origin.cause == cause
    code, printed = replayed(capsys, path, "--model", f"{HERE}.{kind.__name__}")
    assert (code, printed.startswith("Reproduced: ")) == (0, True), printed
    assert f"cause     {cause.replace('_', ' ')}" in printed
    assert kind is Undefined or "at fault  net.0.weight" in printed
    # with healthy weights no cause is found, whatever was recorded
    sound = dataclasses.replace(recorded, weights=dict(kind().state_dict()))
    path = write_dossier(tmp_path / "sound", sound, megabytes=1)
    code, printed = replayed(capsys, path, "--model", f"{HERE}.{kind.__name__}")
    assert code == 1
    assert "found now: All numbers of the batch are finite" in printed


def test_optimizer_state_is_not_in_dossier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = read_dossier(record(Classifier(), poisoned(batches(12), nan=[6]), tmp_path))
    name = "momentum_buffer of net.0.weight"
    origin = Origin("corrupted_weights", where=(name,))
    odd = dataclasses.replace(recorded, origin=origin, largest={name: 1e17}, batch=batches(1)[0])
    path = write_dossier(tmp_path / "odd", odd, megabytes=1)
    code, printed = replayed(capsys, path, "--model", "tests.tasks.Classifier")
    assert code == 1
    assert (
        "note: values out of range were in the state of an optimizer, which a dossier does not hold"
        in printed
    )


@pytest.mark.parametrize(("cause", "code"), [("transient", 0), ("unknown", 1), ("forward_pass", 1)])
def test_finite_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str], cause: Any, code: int) -> None:
    recorded = read_dossier(record(Classifier(), poisoned(batches(12), nan=[6]), tmp_path))
    finite = dataclasses.replace(recorded, origin=Origin(cause), batch=batches(1)[0])
    path = write_dossier(tmp_path / "finite", finite, megabytes=1)
    assert replayed(capsys, path, "--model", "tests.tasks.Classifier")[0] == code


def test_failing_step_is_not_reproduced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = read_dossier(record(Classifier(), poisoned(batches(12), nan=[6]), tmp_path))
    odd = dataclasses.replace(recorded, origin=Origin("unknown"), batch={"other": torch.ones(1)})
    path = write_dossier(tmp_path / "odd", odd, megabytes=1)
    code, printed = replayed(capsys, path, "--model", "tests.tasks.Classifier")
    assert code == 1
    assert "The step raised ValueError: not enough values to unpack" in printed


class Bounded(Classifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        assert float(batch[0].abs().max()) < 30, "inputs are too large"
        return super().training_step(batch, batch_idx)


def test_an_exception_of_an_unknown_cause_is_reproduced_by_its_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        record(Bounded(), marked(), tmp_path)
    (path,) = tmp_path.glob("**/dossier.pt")
    assert read_dossier(path.parent).origin.cause == "unknown"
    code, printed = replayed(capsys, path.parent, "--model", f"{HERE}.Bounded")
    assert code == 0, printed
    assert "Reproduced: " in printed
    assert replayed(capsys, path.parent, "--model", "tests.tasks.Classifier")[0] == 1


def test_frozen_weights_and_modes_are_restored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Still(Logarithm):
        def on_train_start(self) -> None:
            self.body.eval()
            self.head.requires_grad_(False)

    dossier = record(Still(), marked(), tmp_path)
    assert read_dossier(dossier).evaluating == ("body", "body.0", "body.1", "body.2")
    code, _ = replayed(capsys, dossier, "--model", f"{HERE}.Logarithm")
    assert code == 0


class Draws(Classifier):
    """A step that hands something to its logger."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        experiment: Any = self.logger.experiment  # type: ignore[union-attr]
        experiment.add_scalar("own", 1.0, self.global_step)
        return super().training_step(batch, batch_idx)


def test_step_may_use_its_logger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit(Draws(), poisoned(batches(12), nan=[6]), [NaNRollback()], logger=logger)
    dossier = tmp_path / "run" / "incidents" / "6"
    assert replayed(capsys, dossier, "--model", f"{HERE}.Draws")[0] == 0


def test_the_module_is_changed_as_it_was_in_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    treatment = Treatment([Change("add_normalization", {"modules": ["body.0"], "norms": ["layer"]})])
    fit(Logarithm(fails_in="loss"), marked(), [treatment, NaNRollback(snapshot_every_n_steps=1)], tmp_path)
    (path,) = (tmp_path / "incidents").iterdir()
    assert read_dossier(path).changes[0]["made"]["kind"] == "add_normalization"
    code, out = replayed(capsys, path, "--model", f"{HERE}.Logarithm", "--model.fails_in", "loss")
    assert code == 0, out
