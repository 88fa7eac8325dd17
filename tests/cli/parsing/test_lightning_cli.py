"""Callbacks of the suite have options, and callbacks of the user replace them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from lightning_gradguard.callbacks.defaults import DEFAULTS
from lightning_gradguard.cli.parsing.lightning_cli import fit_parser
from tests.cli.conftest import QUIET, Command, callbacks_of, saved

# Lightning saves a configuration by a name that newer versions of jsonargparse have deprecated
pytestmark = pytest.mark.filterwarnings("ignore:\\s*skip_none parameter was deprecated")


@pytest.mark.parametrize("by", ["flags", "file"])
def test_callbacks_are_configured_and_omitted(mine: Path, command: Command, by: str) -> None:
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


def test_trainer_callback_replaces_suite_s(mine: Path, command: Command) -> None:
    given = ("--trainer.callbacks+=NaNRollback", "--trainer.callbacks.patience=7")
    assert command("fit", "--model", "mine.Own", *QUIET, *given)[0] == 0
    config = saved()
    assert config["nan_rollback"] is None
    assert config["trainer"]["callbacks"][0]["init_args"]["patience"] == 7
    code, _, err = command("fit", "--model", "mine.Own", *QUIET, *given, "--nan_rollback.patience=5")
    assert code == 2
    assert "--nan_rollback and trainer.callbacks both give a NaNRollback; omit one of them." in err


def test_single_callback_needs_no_list(mine: Path, command: Command) -> None:
    entry = {"class_path": "NaNRollback", "init_args": {"patience": 7}}
    Path("one.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": entry}}))
    assert command("fit", "--model", "mine.Own", *QUIET, "-c", "one.yaml")[0] == 0
    assert (saved()["nan_rollback"], "NaNRollback" in callbacks_of()) == (None, True)


def test_module_callback_replaces_suite_s(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.WithCallbacks", *QUIET)[0] == 0
    config = saved()
    assert (config["nan_rollback"], config["initialization_check"]) == (None, None)
    assert config["gradient_norm_monitor"] is not None
    code, _, err = command("fit", "--model", "mine.WithCallbacks", *QUIET, "--nan_rollback.patience=5")
    assert (code, err.count("\n")) == (2, 1)
    assert "--nan_rollback and WithCallbacks.configure_callbacks both give a NaNRollback; omit one of" in err


def test_module_callback_subclass_replaces_suite_s(mine: Path, command: Command) -> None:
    assert command("fit", "--model", "mine.WithSubclass", *QUIET)[0] == 0
    assert callbacks_of() & {"NaNRollback", "Rollback"} == {"Rollback"}
    assert saved()["nan_rollback"] is None


def test_callback_option_takes_subclass(mine: Path, command: Command) -> None:
    how = ("--nan_rollback=mine.Rollback", "--nan_rollback.patience=4")
    assert command("fit", "--model", "mine.Own", *QUIET, *how)[0] == 0
    assert saved()["nan_rollback"]["class_path"] == "mine.Rollback"
    assert saved()["nan_rollback"]["init_args"]["patience"] == 4
    assert "Rollback" in callbacks_of()


def test_sys_argv_is_restored(mine: Path, command: Command) -> None:
    before = list(sys.argv)
    assert command("fit", "--model", "mine.Own", *QUIET)[0] == 0
    assert command("fit", "--model", "mine.Own", "--trainer.max_steps=x")[0] == 2
    assert sys.argv == before


def test_fit_parser_has_the_options_of_the_suite() -> None:
    names = fit_parser().get_defaults(skip_validation=True).keys()
    assert {*DEFAULTS, "trainer.max_steps", "ckpt_path"} <= {
        name.removesuffix(".class_path") for name in names
    }
