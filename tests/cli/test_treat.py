"""`treat` writes a configuration with which `fit` trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import lightning_gradguard
from tests.cli.conftest import Command
from tests.treatment.programs import Data, Deep

pytestmark = pytest.mark.filterwarnings("ignore:\\s*skip_none parameter was deprecated")

PROGRAM = ("--model", "tests.treatment.programs.Deep", "--data", "tests.treatment.programs.Data")
SHORT = ("--trainer.max_steps=60", "--budget=10m", "--processes=1", "--seed_everything=0")


@pytest.mark.slow
def test_configuration_trains_through_fit(command: Command) -> None:
    code, out, progress = command("treat", *PROGRAM, *SHORT)
    assert code == 0
    assert out.startswith("tests.treatment.programs.Deep: cured by ")
    assert "best so far" in progress
    assert "(search, seed 0): " in progress
    assert "(verification, seed 101): " in progress
    written = Path("treatment/treatment.yaml").read_text()
    # of a run that is short, more is logged, so that `report` has a verdict on it
    assert written.splitlines()[1].endswith(" -c treatment/treatment.yaml --trainer.log_every_n_steps 2")
    configuration = yaml.safe_load(written)
    callbacks = configuration["trainer"]["callbacks"]
    assert [one["class_path"] for one in callbacks] == ["lightning_gradguard.Treatment"]
    content = json.loads(Path("treatment/treatment.json").read_text())
    assert callbacks[0]["init_args"]["changes"] == content["changes"]
    trained = ("--trainer.max_steps=60", "--seed_everything=0", "--trainer.enable_progress_bar=false")
    code, out, error = command("fit", "-c", "treatment/treatment.yaml", *PROGRAM, *trained)
    assert code == 0, error
    (path,) = Path("lightning_logs").rglob("*.ckpt")
    module = lightning_gradguard.Treatment.load_from_checkpoint(path, Deep)
    with torch.no_grad():
        logits = module.net(Data().validation.tensors[0])
    assert (logits.argmax(1) == Data().validation.tensors[1]).float().mean() > 0.7


def test_wrong_budget_is_one_line(command: Command) -> None:
    code, _, error = command("treat", *PROGRAM, "--budget=soon")
    assert code == 2
    assert error == (
        "lightning-gradguard treat: --budget='soon' must be a time such as '10m', '90s', '2h', or seconds.\n"
    )


def test_budget_that_allows_no_trial_has_a_headline_and_an_exit_code_of_its_own(command: Command) -> None:
    code, out, _ = command("treat", *PROGRAM, "--trainer.max_steps=2000", "--budget=1s", "--processes=1")
    assert code == 2
    assert out.startswith("tests.treatment.programs.Deep: no trial was made, as the budget is too small\n")


def test_program_that_cannot_be_treated_is_one_line(command: Command) -> None:
    code, _, error = command("treat", "--model", "tests.treatment.programs.Net", "--model.rate=-1", *SHORT)
    assert code == 2
    assert error.startswith("lightning-gradguard treat: ")
    assert error.count("\n") == 1
