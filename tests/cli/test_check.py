"""`check` shows that a network can train, or cannot, and writes nothing."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_gradguard.cli.check import CheckResult, as_json
from lightning_gradguard.core.initialization import Finding
from tests.cli.conftest import QUIET, Command

pytestmark = pytest.mark.filterwarnings("ignore:\\s*skip_none parameter was deprecated")

DEEP = ("--model.depth=30", "--model.activation=Sigmoid", "--seed_everything=0")


def reject_constant(word: str) -> Any:
    """`json.loads` calls this for NaN and the infinities."""
    raise ValueError(word)


def test_healthy_network(mine: Path, command: Command) -> None:
    code, out, _ = command("check", "--model", "mine.Net", "--data", "mine.Data", "--seed_everything=0")
    assert code == 0
    assert out.startswith("mine.Net: nothing found; loss 1.4")
    assert "gradient_gain" in out
    assert sorted(path.name for path in mine.iterdir() if path.name != "__pycache__") == ["mine.py"]


def test_untrainable_network(mine: Path, command: Command) -> None:
    code, out, _ = command("check", "--model", "mine.Own", *DEEP)
    assert code == 1
    assert out.startswith("mine.Own: it will not train; loss ")
    assert re.search(r"FAIL  \(network\) +gradient_gain", out)
    assert "nn.init" in out
    assert sorted(path.name for path in mine.iterdir() if path.name != "__pycache__") == ["mine.py"]


def test_module_callbacks_are_omitted(mine: Path, command: Command) -> None:
    """Lightning would replace the InitializationCheck of the command by the one of the module."""
    code, out, _ = command("check", "--model", "mine.WithCallbacks", *DEEP)
    assert code == 1
    assert re.search(r"FAIL  \(network\) +gradient_gain", out)
    assert sorted(path.name for path in mine.iterdir() if path.name != "__pycache__") == ["mine.py"]


def test_omitted_callbacks_and_loggers_are_not_instantiated(mine: Path, command: Command) -> None:
    content = {
        "model": "mine.Own",
        "nan_rollback": {"class_path": "mine.LeavesRollback"},
        "trainer": {"callbacks": {"class_path": "mine.Leaves"}, "logger": {"class_path": "mine.Logs"}},
    }
    Path("config.yaml").write_text(yaml.safe_dump(content))
    code, _, _ = command("check", "-c", "config.yaml", "--seed_everything=0")
    assert code == 0
    left = {path.name for path in mine.iterdir()} - {"__pycache__", "mine.py", "config.yaml"}
    assert left == set()


@pytest.mark.parametrize(
    "option",
    [
        "max_steps=0", "max_epochs=0", "max_time=00:00:00:00", "limit_train_batches=0", "fast_dev_run=true",
        "barebones=true", "num_nodes=2", "devices=2", "strategy=ddp", "overfit_batches=0.5",
    ],
)  # fmt: skip
def test_limits_and_strategies_are_ignored(mine: Path, command: Command, option: str) -> None:
    how = ("--model=mine.Own", "--seed_everything=0", "--trainer.accelerator=cpu", f"--trainer.{option}")
    code, out, _ = command("check", *how)
    assert (code, "mine.Own: nothing found" in out) == (0, True)


def test_validation_data_is_not_loaded(mine: Path, command: Command) -> None:
    how = ("--model=mine.Validated", "--data=mine.NoValidation", "--seed_everything=0")
    code, out, _ = command("check", *how)
    assert (code, "nothing found" in out) == (0, True)


def test_nonfinite_batch_is_wrong_input(mine: Path, command: Command) -> None:
    code, out, err = command("check", "--model=mine.Net", "--data=mine.NonfiniteData", "--seed_everything=0")
    assert (code, out) == (2, "")
    assert err == (
        "lightning-gradguard check: the first batch could not be checked: "
        "batch[0] holds nonfinite values in row 3.\n"
    )


@pytest.mark.parametrize("model", ["mine.Own", "mine.Manual"])
def test_no_step_is_taken(mine: Path, command: Command, model: str) -> None:
    steps: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        assert command("check", "--model", model, "--seed_everything=0")[0] == 0
    finally:
        handle.remove()
    assert steps == []


def test_manual_optimization_without_a_step(mine: Path, command: Command) -> None:
    code, out, _ = command("check", "--model", "mine.Manual", "--seed_everything=0")
    assert code == 0
    assert out.startswith("mine.Manual: it may not train; only weights, and the first gradients, were check")
    assert "gradient_profile" in out
    assert "Learning rates were not tried, because of manual optimization." in out


REGRESSION = """
import torch
from mine import Own
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

class Raw(Own):
    def __init__(self, size: float = 3000.0, rate: float = 0.01):
        super().__init__()
        self.size, self.rate = size, rate
        self.net[-1] = torch.nn.Linear(8, 1)

    def train_dataloader(self):
        inputs = torch.rand(256, 20, generator=torch.Generator().manual_seed(0))
        targets = inputs.sum(1) - 10
        if self.size == 1:
            return DataLoader([*zip(inputs, targets)], 32)
        return DataLoader([*zip(inputs * self.size / 10, targets[:, None] * self.size)], 32)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)

class Normed(Raw):
    def __init__(self, size: float = 2.0):
        super().__init__(size)
        self.net[-1] = torch.nn.Sequential(self.net[-1], torch.nn.LayerNorm(1))

class Manual(Raw):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()
"""


@pytest.mark.parametrize("model", ["Raw", "Manual"])
def test_targets_that_broadcast_fail_with_the_line_and_its_expressions(
    mine: Path, command: Command, model: str
) -> None:
    Path("regression.py").write_text(REGRESSION)
    code, out, _ = command("check", f"--model=regression.{model}", "--model.size=1", "--seed_everything=0")
    assert code == 1
    assert re.search(r"FAIL  net.4 +broadcast_targets +100% of the values", out)
    assert re.search(r"mse_loss at \S*regression.py:22 in training_step", out)
    assert "Give both one shape: self.net(x).view_as(y) in place of self.net(x)." in out


def test_statistics_of_one_value_fail(mine: Path, command: Command) -> None:
    Path("regression.py").write_text(REGRESSION)
    code, out, _ = command("check", "--model=regression.Normed", "--seed_everything=0")
    assert code == 1
    assert re.search(r"FAIL  net.4.1 +single_value", out)
    assert "remove net.4.1" in out


@pytest.mark.parametrize("rate", [0.01, 1e-6])
def test_raw_inputs_and_raw_targets_are_both_named(mine: Path, command: Command, rate: float) -> None:
    Path("regression.py").write_text(REGRESSION)
    code, out, _ = command("check", "--model=regression.Raw", f"--model.rate={rate}", "--seed_everything=0")
    assert code == (rate == 0.01)
    assert re.search(r"WARN  net.0 +data_scale", out)
    assert "Standardize inputs x and targets y" in out
    assert ("standardize batch[0] and batch[1], (t - t.mean(0)) / t.std(0)" in out) == (rate == 0.01)


def test_json(mine: Path, command: Command) -> None:
    code, out, _ = command("check", "--model", "mine.Own", *DEEP, "--json")
    found = json.loads(out, parse_constant=reject_constant)
    assert code == 1
    assert (found["schema_version"], found["model"], found["verdict"]) == (1, "mine.Own", "fail")
    assert found["checkpoint"] is None
    assert found["findings"][0]["criterion"] == "gradient_gain"
    assert found["findings"][0]["severity"] == "fail"
    assert found["values"]["gradient_gain"] == found["findings"][0]["value"] < -4
    # output of the user's code goes to standard error
    code, out, err = command("check", "--model", "mine.Noisy", "--seed_everything=0", "--json")
    assert (code, json.loads(out)["verdict"], json.loads(out)["findings"]) == (0, "pass", [])
    assert "a step" in err
    code, out, _ = command("check", "--model", "mine.Own", "--seed_everything=0", "--json", "check.json")
    assert json.loads(Path("check.json").read_text())["verdict"] == "pass"
    assert out.startswith("mine.Own: nothing found")


def test_json_is_strict_with_nonfinite_weights(mine: Path, command: Command) -> None:
    code, out, _ = command("check", "--model", "mine.Poisoned", "--seed_everything=0", "--json")
    found = json.loads(out, parse_constant=reject_constant)
    assert (code, found["findings"][0]["criterion"], found["values"]) == (1, "nonfinite_weights", {})
    assert found["findings"][0]["module"] == "net.0"
    infinite = CheckResult(
        "my.Net", "", [Finding("loss", "", math.inf, "< 1", "fail", "")], {"loss": math.inf}
    )
    found = json.loads(as_json(infinite), parse_constant=reject_constant)
    assert (found["findings"][0]["value"], found["values"]) == ("inf", {"loss": "inf"})


def test_saved_configuration_and_checkpoint(mine: Path, command: Command) -> None:
    assert command("fit", "--model=mine.Net", "--data=mine.Data", "--model.width=5", *QUIET)[0] == 0
    config = "lightning_logs/version_0/config.yaml"
    before = sorted(Path("lightning_logs").rglob("*"))
    code, out, _ = command("check", "-c", config)
    assert (code, out.startswith("mine.Net: nothing found")) == (0, True)
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    code, out, _ = command("check", "-c", config, "--ckpt_path", path)
    assert (code, out.startswith(f"mine.Net with the weights of {path}: nothing found")) == (0, True)
    # they are the checkpoint's
    content = torch.load(path, weights_only=True)
    content["state_dict"]["net.2.weight"].fill_(0.1)
    torch.save(content, "copies.ckpt")
    torch.save(content["state_dict"], "weights.pt")
    for corrupt in ("copies.ckpt", "weights.pt"):
        code, out, _ = command("check", "-c", config, "--ckpt_path", corrupt)
        assert (code, "FAIL  net.2" in out, "symmetric_units" in out) == (1, True, True)
    assert sorted(Path("lightning_logs").rglob("*")) == before


@pytest.mark.lightning("2.6", "before it, there is no --weights_only")
def test_checkpoint_with_objects_needs_weights_only_false(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.Stores", *QUIET)[0] == 0
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    how = ("check", "--model", "mine.Stores", "--seed_everything=0", "--ckpt_path", path)
    code, out, err = command(*how)
    assert (code, out, err.count("\n")) == (2, "", 1)
    problem = "holds mine.Size, which is no plain data. If you trust the file, add --weights_only false."
    assert f"--ckpt_path {path} {problem}" in err
    code, out, _ = command(*how, "--weights_only=false")
    assert (code, f"with the weights of {path}: nothing found" in out) == (0, True)


def test_on_load_checkpoint_is_called(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.Copies", *QUIET)[0] == 0
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    code, out, _ = command("check", "--model=mine.Copies", "--seed_everything=0", "--ckpt_path", path)
    assert (code, "FAIL  net.2" in out) == (1, True)


def test_checkpoint_without_hyper_parameters(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.Own", *QUIET)[0] == 0
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    content = torch.load(path, weights_only=True)
    torch.save({**content, "hyper_parameters": None}, "none.ckpt")
    code, out, _ = command("check", "--model=mine.Own", "--seed_everything=0", "--ckpt_path=none.ckpt")
    assert (code, "nothing found" in out) == (0, True)


@pytest.mark.parametrize("flag", ["--model.width=4", "--model.init_args.width=4"])
def test_flag_overrides_argument_of_checkpoint(mine: Path, command: Command, flag: str) -> None:
    assert command("fit", "--model", "mine.Saves", "--model.width=5", *QUIET)[0] == 0
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    code, _, err = command("check", "--model=mine.Saves", flag, "--seed_everything=0", "--ckpt_path", path)
    assert (code, err.count("\n")) == (2, 1)
    assert "the weights do not fit Saves: net.0.weight is (5, 20) there, (4, 20) in the module; " in err


def test_arguments_come_from_checkpoint(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.Saves", "--model.width=5", *QUIET)[0] == 0
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    code, out, _ = command("check", "--model", "mine.Saves", "--ckpt_path", path, "--seed_everything=0")
    assert (code, "nothing found" in out) == (0, True)
    code, _, err = command("check", "--model", "mine.Own", "--ckpt_path", path, "--seed_everything=0")
    assert code == 2
    assert "the weights do not fit Own: net.0.weight is (5, 20) there, (8, 20) in the module; " in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model=mine.FailsInStep"],
            "the first batch could not be run: KeyError: 'label' (mine.py, line",
        ),
        (["--model=mine.Net", "--data=mine.NoBatches"], "there is no training batch to check it with."),
        (["--model=mine.Net"], "name the data with --data my.Data: Net has no train_dataloader of its own."),
        (["--model=mine.Untrainable"], "No `training_step()` method defined"),
        (["--model=mine.Own", "--jsn"], "there is no --jsn. Did you mean --json?"),
        (["--model=mine.Own", "--json", "no/folder"], "--json no/folder cannot be written: No such file"),
        (
            ["--model=mine.Own", "--ckpt_path", "none.ckpt"],
            "none.ckpt cannot be opened: there is no such",
        ),
        (
            ["--model=mine.Own", "--ckpt_path", "mine.py"],
            "--ckpt_path mine.py is damaged, or was not written by torch.save.",
        ),
        (["--model=mine.Own", "--trainer.max_steps=x"], "--trainer.max_steps x: expected int."),
    ],
)
def test_wrong_input(mine: Path, command: Command, arguments: list[str], message: str) -> None:
    code, out, err = command("check", "--seed_everything=0", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("lightning-gradguard check: ")
    assert message in err
    assert err.count("\n") == 1


def test_help_lists_options(command: Command) -> None:
    code, out, _ = command("check", "--help")
    assert (code, "--ckpt_path FILE" in out, "--json [FILE]" in out) == (0, True, True)


def test_what_the_task_decides_is_a_warning_as_in_fit(mine: Path, command: Command) -> None:
    source = """
from mine import Own, torch

class Recurrent(Own):
    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.RNN(1, 16, batch_first=True)
        self.net = torch.nn.Linear(16, 4)

    def training_step(self, batch, batch_idx):
        states, _ = self.rnn(batch[0].repeat(1, 3)[..., None])
        return torch.nn.functional.cross_entropy(self.net(states[:, -1]), batch[1])
"""
    (mine / "recurrent.py").write_text(source)
    code, out, _ = command("check", "--model", "recurrent.Recurrent", "--seed_everything=0")
    assert code == 0
    assert out.startswith("recurrent.Recurrent: it may not train; loss ")
    assert re.search(r"WARN  rnn +gain_through_time  -", out)
