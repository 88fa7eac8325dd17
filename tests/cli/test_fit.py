"""`fit` trains what is in the current folder, with the suite as flags and files say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_gradguard.cli.preparse import named_class
from tests.cli.conftest import Command

# Lightning saves a configuration by a name that newer versions of jsonargparse have given up
pytestmark = pytest.mark.filterwarnings("ignore:\\s*skip_none parameter was deprecated")

QUIET = (
    "--seed_everything=0",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)
NAMES = (
    "initialization_check",
    "gradient_norm_monitor",
    "nan_rollback",
    "adaptive_gradient_clipping",
    "learning_rate_backoff",
)


def saved(version: int = 0) -> dict[str, Any]:
    """The configuration that a run has left."""
    config: dict[str, Any] = yaml.safe_load(Path(f"lightning_logs/version_{version}/config.yaml").read_text())
    return config


def weights(version: int = 0) -> dict[str, torch.Tensor]:
    (path,) = Path(f"lightning_logs/version_{version}/checkpoints").iterdir()
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def callbacks_of(version: int = 0) -> set[str]:
    """The callbacks of the suite that were in a run, by the states in its checkpoint."""
    (path,) = Path(f"lightning_logs/version_{version}/checkpoints").iterdir()
    return {key.partition("{")[0] for key in torch.load(path, weights_only=True)["callbacks"]}


def test_a_module_of_the_current_folder(mine: Path, command: Command) -> None:
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


def test_data_of_the_module_itself(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.Own", *QUIET)[0] == 0
    assert saved()["data"] is None


@pytest.mark.parametrize("by", ["flags", "file"])
def test_each_callback_is_set_and_left_out(mine: Path, command: Command, by: str) -> None:
    if by == "flags":
        how = [
            "--nan_rollback.patience=5", "--nan_rollback.check", "deferred", "--learning_rate_backoff=null",
            "--adaptive_gradient_clipping.policy=PercentileClipping",
            "--adaptive_gradient_clipping.policy.percentile=20",
        ]  # fmt: skip
    else:
        policy = {"class_path": "PercentileClipping", "init_args": {"percentile": 20}}
        content = {
            "nan_rollback": {"patience": 5, "check": "deferred"},
            "learning_rate_backoff": None,
            "adaptive_gradient_clipping": {"policy": policy},
        }
        Path("suite.yaml").write_text(yaml.safe_dump(content))
        how = ["-c", "suite.yaml"]
    assert command("fit", "--model", "mine.Own", *QUIET, *how)[0] == 0
    config = saved()
    assert config["nan_rollback"]["init_args"]["patience"] == 5
    assert config["nan_rollback"]["init_args"]["check"] == "deferred"
    assert config["learning_rate_backoff"] is None
    policy = config["adaptive_gradient_clipping"]["init_args"]["policy"]
    assert policy["class_path"] == "lightning_gradguard.PercentileClipping"
    assert policy["init_args"]["percentile"] == 20
    assert "LearningRateBackoff" not in callbacks_of()
    assert "NaNRollback" in callbacks_of()


def test_a_callback_of_the_trainer_takes_the_place_of_the_suite_s(mine: Path, command: Command) -> None:
    given = ("--trainer.callbacks+=NaNRollback", "--trainer.callbacks.patience=7")
    assert command("fit", "--model", "mine.Own", *QUIET, *given)[0] == 0
    config = saved()
    assert config["nan_rollback"] is None
    assert config["trainer"]["callbacks"][0]["init_args"]["patience"] == 7
    code, _, err = command("fit", "--model", "mine.Own", *QUIET, *given, "--nan_rollback.patience=5")
    assert code == 2
    assert "--nan_rollback and trainer.callbacks both give a NaNRollback; leave one of them out." in err


def test_one_callback_alone_needs_no_list(mine: Path, command: Command) -> None:
    entry = {"class_path": "NaNRollback", "init_args": {"patience": 7}}
    Path("one.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": entry}}))
    assert command("fit", "--model", "mine.Own", *QUIET, "-c", "one.yaml")[0] == 0
    assert (saved()["nan_rollback"], "NaNRollback" in callbacks_of()) == (None, True)


def test_a_callback_of_the_module_takes_the_place_of_the_suite_s(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.WithCallbacks", *QUIET)[0] == 0
    config = saved()
    assert (config["nan_rollback"], config["initialization_check"]) == (None, None)
    assert config["gradient_norm_monitor"] is not None
    code, _, err = command("fit", "--model", "mine.WithCallbacks", *QUIET, "--nan_rollback.patience=5")
    assert (code, err.count("\n")) == (2, 1)
    assert "--nan_rollback and WithCallbacks.configure_callbacks both give a NaNRollback; leave one" in err


def test_a_subclass_of_the_module_s_runs_alone(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.WithSubclass", *QUIET)[0] == 0
    assert callbacks_of() & {"NaNRollback", "Rollback"} == {"Rollback"}
    assert saved()["nan_rollback"] is None


def test_a_subclass_of_the_user_s(mine: Path, command: Command) -> None:
    how = ("--nan_rollback=mine.Rollback", "--nan_rollback.patience=4")
    assert command("fit", "--model", "mine.Own", *QUIET, *how)[0] == 0
    assert saved()["nan_rollback"]["class_path"] == "mine.Rollback"
    assert saved()["nan_rollback"]["init_args"]["patience"] == 4
    assert "Rollback" in callbacks_of()


def test_a_saved_configuration_gives_the_same_run(mine: Path, command: Command) -> None:
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
def test_a_checkpoint_is_resumed(mine: Path, command: Command) -> None:
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
def test_a_checkpoint_with_objects_is_resumed_when_asked(mine: Path, command: Command) -> None:
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


def test_what_was_typed_is_forgotten_afterwards(mine: Path, command: Command) -> None:
    before = list(sys.argv)
    assert command("fit", "--model", "mine.Own", *QUIET)[0] == 0
    assert command("fit", "--model", "mine.Own", "--trainer.max_steps=x")[0] == 2
    assert sys.argv == before


def test_the_last_file_names_the_module(mine: Path, command: Command) -> None:
    Path("first.yaml").write_text("model: mine.Net\n")
    Path("last.yaml").write_text("model: mine.Own\n")
    sys.path.insert(0, str(mine))
    files = ("-c", "first.yaml", "--config", "last.yaml")
    assert named_class(files).__name__ == "Own"
    assert named_class([*files, "--model=mine.Saves"]).__name__ == "Saves"
    assert command("fit", *files, *QUIET)[0] == 0
    assert saved()["model"]["class_path"] == "mine.Own"


def test_a_network_that_cannot_train_is_refused_when_asked(mine: Path, command: Command) -> None:
    deep = ("--model=mine.Own", "--model.depth=30", "--model.activation=Sigmoid")
    code, _, err = command("fit", *deep, *QUIET, "--initialization_check.on_failure=raise")
    assert code == 1
    assert "lightning-gradguard fit: The network, as it is initialized, will not train:" in err
    assert "Traceback" not in err


def test_an_exception_of_the_user_s_while_training_is_left_alone(mine: Path, command: Command) -> None:
    with pytest.raises(KeyError, match="label"):
        command("fit", "--model", "mine.FailsInStep", *QUIET, "--initialization_check=null")


def test_help_is_a_page(command: Command) -> None:
    code, out, _ = command("fit", "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 110
    assert len(out.splitlines()) < 80
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
