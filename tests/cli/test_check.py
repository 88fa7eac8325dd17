"""`check` tells whether a network can train, and leaves nothing behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_gradguard.cli.check import Facts, as_json
from lightning_gradguard.core.initialization import Finding
from tests.cli.conftest import Command
from tests.cli.test_fit import QUIET

pytestmark = pytest.mark.filterwarnings("ignore:\\s*skip_none parameter was deprecated")

DEEP = ("--model.depth=30", "--model.activation=Sigmoid", "--seed_everything=0")


def refuse(word: str) -> Any:
    """`json.loads` asks this about NaN and the infinities."""
    raise ValueError(word)


def test_a_sound_network(mine: Path, command: Command) -> None:
    code, out, _ = command("check", "--model", "mine.Net", "--data", "mine.Data", "--seed_everything=0")
    assert code == 0
    assert out.startswith("mine.Net: nothing found; loss 1.4")
    assert "gradient_gain" in out
    assert sorted(path.name for path in mine.iterdir() if path.name != "__pycache__") == ["mine.py"]


def test_a_network_that_will_not_train(mine: Path, command: Command) -> None:
    code, out, _ = command("check", "--model", "mine.Own", *DEEP)
    assert code == 1
    assert out.startswith("mine.Own: it will not train; loss ")
    assert "FAIL  (network)  gradient_gain" in out
    assert "nn.init" in out
    assert sorted(path.name for path in mine.iterdir() if path.name != "__pycache__") == ["mine.py"]


def test_callbacks_of_the_module_are_left_out(mine: Path, command: Command) -> None:
    """Lightning would put its InitializationCheck in the place of the one that is asked."""
    code, out, _ = command("check", "--model", "mine.WithCallbacks", *DEEP)
    assert (code, "FAIL  (network)  gradient_gain" in out) == (1, True)
    assert sorted(path.name for path in mine.iterdir() if path.name != "__pycache__") == ["mine.py"]


def test_what_is_left_out_is_not_even_built(mine: Path, command: Command) -> None:
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
def test_how_a_run_is_cut_or_spread_is_no_matter(mine: Path, command: Command, option: str) -> None:
    how = ("--model=mine.Own", "--seed_everything=0", "--trainer.accelerator=cpu", f"--trainer.{option}")
    code, out, _ = command("check", *how)
    assert (code, "mine.Own: nothing found" in out) == (0, True)


def test_data_for_validation_is_not_asked_for(mine: Path, command: Command) -> None:
    how = ("--model=mine.Validated", "--data=mine.NoValidation", "--seed_everything=0")
    code, out, _ = command("check", *how)
    assert (code, "nothing found" in out) == (0, True)


def test_a_batch_that_is_nonfinite_is_not_the_network_s_fault(mine: Path, command: Command) -> None:
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


def test_manual_optimization_is_looked_at_without_a_step(mine: Path, command: Command) -> None:
    code, out, _ = command("check", "--model", "mine.Manual", "--seed_everything=0")
    assert code == 0
    assert out.startswith("mine.Manual: it may not train; only weights, and the first gradients, were looked")
    assert "gradient_profile" in out


def test_json_for_programs(mine: Path, command: Command) -> None:
    code, out, _ = command("check", "--model", "mine.Own", *DEEP, "--json")
    found = json.loads(out, parse_constant=refuse)
    assert code == 1
    assert (found["schema_version"], found["model"], found["verdict"]) == (1, "mine.Own", "fail")
    assert found["checkpoint"] is None
    assert found["findings"][0]["criterion"] == "gradient_gain"
    assert found["findings"][0]["severity"] == "fail"
    assert found["values"]["gradient_gain"] == found["findings"][0]["value"] < -4
    # what the user's code prints goes elsewhere
    code, out, err = command("check", "--model", "mine.Noisy", "--seed_everything=0", "--json")
    assert (code, json.loads(out)["verdict"], json.loads(out)["findings"]) == (0, "pass", [])
    assert "a step" in err
    code, out, _ = command("check", "--model", "mine.Own", "--seed_everything=0", "--json", "check.json")
    assert json.loads(Path("check.json").read_text())["verdict"] == "pass"
    assert out.startswith("mine.Own: nothing found")


def test_nonfinite_weights_are_strict_json_too(mine: Path, command: Command) -> None:
    code, out, _ = command("check", "--model", "mine.Poisoned", "--seed_everything=0", "--json")
    found = json.loads(out, parse_constant=refuse)
    assert (code, found["findings"][0]["criterion"], found["values"]) == (1, "nonfinite_weights", {})
    assert found["findings"][0]["module"] == "net.0"
    infinite = Facts("my.Net", "", [Finding("loss", "", math.inf, "< 1", "fail", "")], {"loss": math.inf})
    found = json.loads(as_json(infinite), parse_constant=refuse)
    assert (found["findings"][0]["value"], found["values"]) == ("inf", {"loss": "inf"})


def test_a_saved_configuration_and_a_checkpoint(mine: Path, command: Command) -> None:
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
    for spoiled in ("copies.ckpt", "weights.pt"):
        code, out, _ = command("check", "-c", config, "--ckpt_path", spoiled)
        assert (code, "FAIL  net.2" in out, "symmetric_units" in out) == (1, True, True)
    assert sorted(Path("lightning_logs").rglob("*")) == before


@pytest.mark.lightning("2.6", "before it, there is no --weights_only")
def test_a_checkpoint_with_objects_is_read_when_asked(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.Stores", *QUIET)[0] == 0
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    how = ("check", "--model", "mine.Stores", "--seed_everything=0", "--ckpt_path", path)
    code, out, err = command(*how)
    assert (code, out, err.count("\n")) == (2, "", 1)
    told = "holds mine.Size, which is no plain data. If you trust the file, add --weights_only false."
    assert f"--ckpt_path {path} {told}" in err
    code, out, _ = command(*how, "--weights_only=false")
    assert (code, f"with the weights of {path}: nothing found" in out) == (0, True)


def test_the_module_s_hook_changes_what_is_loaded(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.Copies", *QUIET)[0] == 0
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    code, out, _ = command("check", "--model=mine.Copies", "--seed_everything=0", "--ckpt_path", path)
    assert (code, "FAIL  net.2" in out) == (1, True)


def test_a_checkpoint_without_hyper_parameters(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.Own", *QUIET)[0] == 0
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    content = torch.load(path, weights_only=True)
    torch.save({**content, "hyper_parameters": None}, "none.ckpt")
    code, out, _ = command("check", "--model=mine.Own", "--seed_everything=0", "--ckpt_path=none.ckpt")
    assert (code, "nothing found" in out) == (0, True)


@pytest.mark.parametrize("flag", ["--model.width=4", "--model.init_args.width=4"])
def test_a_typed_argument_wins_over_the_checkpoint_s(mine: Path, command: Command, flag: str) -> None:
    assert command("fit", "--model", "mine.Saves", "--model.width=5", *QUIET)[0] == 0
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    code, _, err = command("check", "--model=mine.Saves", flag, "--seed_everything=0", "--ckpt_path", path)
    assert (code, err.count("\n")) == (2, 1)
    assert "the weights do not fit Saves: net.0.weight is (5, 20), the module's (4, 20) and" in err


def test_arguments_come_from_the_checkpoint_of_a_fit(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.Saves", "--model.width=5", *QUIET)[0] == 0
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    code, out, _ = command("check", "--model", "mine.Saves", "--ckpt_path", path, "--seed_everything=0")
    assert (code, "nothing found" in out) == (0, True)
    code, _, err = command("check", "--model", "mine.Own", "--ckpt_path", path, "--seed_everything=0")
    assert code == 2
    assert "the weights do not fit Own: net.0.weight is (5, 20), the module's (8, 20) and" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
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
def test_wrong_input(mine: Path, command: Command, arguments: list[str], said: str) -> None:
    code, out, err = command("check", "--seed_everything=0", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("lightning-gradguard check: ")
    assert said in err
    assert err.count("\n") == 1


def test_help_is_a_page(command: Command) -> None:
    code, out, _ = command("check", "--help")
    assert (code, "--ckpt_path FILE" in out, "--json [FILE]" in out) == (0, True, True)
