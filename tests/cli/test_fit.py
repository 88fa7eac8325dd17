"""`fit` trains a module of the current folder, with the suite in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.conftest import NAMES, QUIET, Command, callbacks_of, saved

# Lightning saves a configuration by a name that newer versions of jsonargparse have given up
pytestmark = pytest.mark.filterwarnings("ignore:\\s*skip_none parameter was deprecated")


def weights(version: int = 0) -> dict[str, torch.Tensor]:
    (path,) = Path(f"lightning_logs/version_{version}/checkpoints").iterdir()
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def test_module_of_current_folder(mine: Path, command: Command) -> None:
    code, _, err = command("fit", "--model", "mine.Net", "--data", "mine.Data", *QUIET)
    assert (code, "Traceback" in err) == (0, False)
    config = saved()
    assert config["model"] == {
        "class_path": "mine.Net",
        "init_args": {"width": 8, "depth": 1, "activation": "ReLU"},
    }
    assert {config[name]["class_path"].rpartition(".")[0] for name in NAMES} == {"lightning_gradguard"}
    assert config["nan_rollback"]["init_args"]["patience"] == 3
    assert {"NaNRollback", "AdaptiveGradientClipping", "LearningRateBackoff"} <= callbacks_of()


def test_data_of_module(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.Own", *QUIET)[0] == 0
    assert saved()["data"] is None


def test_saved_configuration_gives_same_run(mine: Path, command: Command) -> None:
    how = ("--adaptive_gradient_clipping.policy=GlobalNormClipping", "--learning_rate_backoff=null")
    given = ("--trainer.callbacks+=NaNRollback", "--trainer.callbacks.patience=7")
    clip = "--adaptive_gradient_clipping.policy.max_norm=0.05"
    assert command("fit", "--model", "mine.Own", *QUIET, *how, *given, clip)[0] == 0
    assert command("fit", "-c", "lightning_logs/version_0/config.yaml")[0] == 0
    assert saved(0) == saved(1)
    assert all(torch.equal(tensor, weights(1)[name]) for name, tensor in weights(0).items())
    # and flags after it change it
    assert command("fit", "-c", "lightning_logs/version_0/config.yaml", "--model.width=9")[0] == 0
    assert weights(2)["net.0.weight"].shape == (9, 20)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_checkpoint_is_resumed(mine: Path, command: Command) -> None:
    """With the arguments that it was written with, if the command has written them there."""
    assert command("fit", "--model", "mine.Saves", "--model.width=5", *QUIET)[0] == 0
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    more = "--trainer.max_epochs=2"
    assert command("fit", "--model", "mine.Saves", *QUIET, more, "--ckpt_path", path)[0] == 0
    assert weights(1)["net.0.weight"].shape == (5, 20)
    assert saved(1)["ckpt_path"] == str(path)
    code, _, err = command("fit", "--model", "mine.Own", *QUIET, "--ckpt_path", "none.ckpt")
    assert (code, "--ckpt_path none.ckpt cannot be opened: there is no such file." in err) == (2, True)


@pytest.mark.lightning("2.6", "before it, there is no --weights_only")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_checkpoint_with_objects_needs_weights_only_false(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.Stores", *QUIET)[0] == 0
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    how = ("fit", "--model", "mine.Stores", *QUIET, "--trainer.max_epochs=2", "--ckpt_path", path)
    code, _, err = command(*how)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds mine.Size, which is no plain data. If you trust the file, add --weights_only false." in err
    assert command(*how, "--weights_only=false")[0] == 0


def test_weights_alone_cannot_be_resumed(mine: Path, command: Command) -> None:
    torch.save({"net.0.weight": torch.zeros(8, 20)}, "weights.pt")
    code, _, err = command("fit", "--model", "mine.Own", *QUIET, "--ckpt_path=weights.pt")
    assert (code, err) == (
        2,
        "lightning-gradguard fit: --ckpt_path weights.pt holds weights alone; a run is resumed from a "
        "checkpoint that Lightning has saved.\n",
    )


def test_failed_initialization_check_ends_with_code_one(mine: Path, command: Command) -> None:
    deep = ("--model=mine.Own", "--model.depth=30", "--model.activation=Sigmoid")
    code, _, err = command("fit", *deep, *QUIET, "--initialization_check.on_failure=raise")
    assert code == 1
    assert "lightning-gradguard fit: The network, as it is initialized, will not train:" in err
    assert "Traceback" not in err


def test_exception_of_user_code_is_raised(mine: Path, command: Command) -> None:
    with pytest.raises(KeyError, match="label"):
        command("fit", "--model", "mine.FailsInStep", *QUIET, "--initialization_check=null")


def test_help_lists_callbacks(command: Command) -> None:
    code, out, _ = command("fit", "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 110
    assert len(out.splitlines()) < 85
    for name in NAMES:
        assert f"--{name}: " in out
    assert "\n  .patience 3 " in out
    assert "\n  .seed 0 " in out
    code, out, _ = command("fit", "--help.all")
    assert (code, "--trainer.max_steps" in out, "--optimizer" in out) == (0, True, True)
    code, out, _ = command("fit", "--trainer.callbacks.help=NaNRollback")
    assert (code, "max_skip_fraction" in out) == (0, True)
    code, out, _ = command("fit", "--model=tests.tasks.Classifier", "--nan_rollback=null", "--print_config")
    assert (code, yaml.safe_load(out)["nan_rollback"]) == (0, None)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_changes_of_a_configuration_are_made_and_resumed(mine: Path, command: Command) -> None:
    changes = [
        {"kind": "add_normalization", "arguments": {"norm": "layer"}},
        {"kind": "warm_up", "arguments": {"steps": 3}},
    ]
    callback = {"class_path": "lightning_gradguard.Treatment", "init_args": {"changes": changes}}
    Path("treatment.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    fit = ("fit", "-c", "treatment.yaml", "--model", "mine.Saves", "--model.width=5", *QUIET)
    assert command(*fit)[0] == 0
    assert "net.0.added_normalization.weight" in weights()
    assert saved()["trainer"]["callbacks"][0]["init_args"]["changes"][1] == changes[1]
    (path,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    assert command(*fit, "--trainer.max_epochs=2", "--ckpt_path", path)[0] == 0
    assert weights(1).keys() == weights().keys()


def test_a_mistake_that_a_fit_finds_has_a_line_and_no_traceback(mine: Path, command: Command) -> None:
    change = {"kind": "add_normalization", "arguments": {"modules": ["nowhere"]}}
    callback = {"class_path": "lightning_gradguard.Treatment", "init_args": {"changes": [change]}}
    Path("treatment.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    code, _, err = command("fit", "-c", "treatment.yaml", "--model", "mine.Own", *QUIET)
    assert code == 2
    assert "lightning-gradguard fit: add_normalization: the module has no 'nowhere'." in err
