"""Wrong input of `replay` is one line, and what a dossier omits is noted."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_gradguard.cli.main import main
from lightning_gradguard.runtime.incidents.dossier import read_dossier, write_dossier
from tests.cli.test_replay import record, replayed
from tests.tasks import Classifier, batches, poisoned

OWN = """
import pytorch_lightning as pl, torch

class Mine(pl.LightningModule):
    def __init__(self, width: int = 3):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(20, width), torch.nn.Linear(width, 4))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

class NoModule:
    pass

class Fails(Mine):
    def __init__(self):
        raise ValueError("of my own\\nin two lines")
"""


@pytest.fixture
def own_dossier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of a module of the user's, in the folder where they are."""
    (tmp_path / "own_modules.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import no_such_dependency")
    (tmp_path / "data.yaml").write_text("data: own_modules.Data")
    (tmp_path / "bad.yaml").write_text("model: {\nclass_path: [")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_modules", raising=False)
    import own_modules  # type: ignore[import-not-found]

    return record(own_modules.Mine(width=5), poisoned(batches(12), nan=[6]), tmp_path / "run")


def test_command_in_folder_of_user(own_dossier: Path, tmp_path: Path) -> None:
    config = {"model": {"class_path": "own_modules.Mine", "init_args": {"width": 7}}, "seed_everything": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "lightning_gradguard", "replay", str(own_dossier)]
    done = subprocess.run(
        [*command, "--config", "config.yaml", "--model.width", "5"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Reproduced: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "own_modules.Mime"], "own_modules.Mime does not exist. Did you mean own_modules.Mine?"),
        (["--model", "own_module.Mine"], "no module own_module. Did you mean own_modules?"),
        (["--model", "own_modules.NoModule"], "own_modules.NoModule is no LightningModule."),
        (["--model", "Elsewhere"], "there is no such class. Name it together with its module, as my.Module."),
        (
            ["--model", "broken.Net"],
            "importing broken failed with ModuleNotFoundError: No module named 'no_such",
        ),
        (
            ["--model", "own_modules.Fails"],
            "own_modules.Fails could not be built: ValueError: of my own in two lines (own_modules.py",
        ),
        (
            ["--model", "own_modules.Mine", "--model.widht", "5"],
            "no such argument. Did you mean --model.width?",
        ),
        (["--model", "own_modules.Mine", "--model.layers", "5"], "no such argument. There are: width."),
        (["--model", "own_modules.Mine", "--model.width", "x"], "--model.width x: expected int."),
        (["--model", "own_modules.Mine", "--cofnig", "x"], "there is no --cofnig. Did you mean --config?"),
        (
            [],
            "nor a file of --config names a module. The run had: --model own_modules.Mine",
        ),
        (["--config", "none.yaml"], "--config none.yaml cannot be read: "),
        (["--config", "broken.py"], "--config broken.py holds no options"),
        (["--config", "data.yaml"], "--config data.yaml has no `model` with a `class_path`"),
        (["--config", "bad.yaml"], "--config bad.yaml, line 2 is no YAML: "),
        (
            ["--model", "own_modules.Mine"],
            "do not fit Mine: net.0.weight is (5, 20) there, (3, 20) in the module; ",
        ),
        (["--model", "tests.tasks.Classifier"], "the weights do not fit Classifier: net."),
        (["--model", "own_modules.Mine", "--checkpoint", "none.ckpt"], "none.ckpt cannot be opened: No such"),
        (
            ["--model", "own_modules.Mine", "--checkpoint", "broken.py"],
            "broken.py is damaged, or was not written",
        ),
    ],
)
def test_wrong_arguments_are_one_line(
    own_dossier: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, printed = replayed(capsys, own_dossier, *arguments)
    assert code == 2
    assert message in printed


def test_without_a_dossier(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = ("--model", "tests.tasks.Classifier")
    for arguments in ((), model):
        code, printed = replayed(capsys, *arguments)
        assert (code, "the dossier comes first" in printed) == (2, True)
    code, printed = replayed(capsys, tmp_path / "none", *model)
    assert (code, "there is no dossier in" in printed) == (2, True)


def test_wrong_folder_lists_dossiers_nearby(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = read_dossier(record(Classifier(), poisoned(batches(12), nan=[6]), tmp_path / "whole"))
    monkeypatch.chdir(tmp_path)
    model = ("--model", "tests.tasks.Classifier")
    run = Path("logs/version_0")
    write_dossier(run / "incidents", recorded, megabytes=1)
    missing = run / "incidents" / "7"
    for wrong in (missing, missing / "dossier.pt", missing.parent, run, "logs"):
        code, printed = replayed(capsys, wrong, *model)
        assert code == 2
        assert printed.endswith(" Name one of a step: logs/version_0/incidents/6.\n")
    for step in range(10, 13):
        write_dossier(run / "incidents", dataclasses.replace(recorded, step=step), megabytes=1)
    _, printed = replayed(capsys, run, *model)
    named = (f"{run}/incidents/{step}" for step in (10, 11, 12))
    assert printed.endswith(f" Name one of a step: {', '.join(named)} and 1 more.\n")
    # others are not listed if the file itself is corrupt
    (run / "incidents" / "6" / "dossier.pt").write_bytes(b"torn")
    assert "Name one" not in replayed(capsys, run / "incidents" / "6", *model)[1]


class _Touches:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _of_another_format(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "format": 99}, path)


def _malicious(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Touches(Path.cwd() / "touched")))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_cut, "is damaged or no dossier"),
        (_of_another_format, "has format 99; this version of lightning_gradguard reads format 1."),
        (_malicious, "holds more than plain data; it was not loaded"),
    ],
)
def test_corrupt_files_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], corrupt: Callable[[Path], None], message: str
) -> None:
    dossier = record(Classifier(), poisoned(batches(12), nan=[6]), tmp_path)
    corrupt(dossier / "dossier.pt")
    code, printed = replayed(capsys, dossier, "--model", "tests.tasks.Classifier")
    assert (code, message in printed) == (2, True), printed
    assert not (tmp_path / "touched").exists()


def test_omitted_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Classifier()
    recorded = read_dossier(record(module, poisoned(batches(12), nan=[6]), tmp_path))
    model = ("--model", "tests.tasks.Classifier")
    nothing = write_dossier(tmp_path / "nothing", recorded, megabytes=0)
    code, printed = replayed(capsys, nothing, *model)
    assert (code, "there is no batch to run again; the batch: 0.00269 MB do not fit" in printed) == (2, True)
    batch_only = write_dossier(tmp_path / "batch", recorded, megabytes=0.01)
    code, printed = replayed(capsys, batch_only, *model)
    assert code == 2
    assert "there are no weights to run it with; the weights: 0.02" in printed
    assert "Give --checkpoint with one from about step 6." in printed
    # what Lightning writes, and a plain state_dict
    torch.save({"state_dict": module.state_dict(), "epoch": 0}, "lightning.ckpt")
    torch.save(module.state_dict(), "plain.pt")
    for checkpoint in ("lightning.ckpt", "plain.pt"):
        code, printed = replayed(capsys, batch_only, *model, "--checkpoint", checkpoint)
        assert code == 0
        assert f"note: the weights are those of {checkpoint}, not those of step 6" in printed
        assert "note: omitted from the dossier: the weights: 0.02" in printed


def test_unsupported_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = read_dossier(record(Classifier(), poisoned(batches(12), nan=[6]), tmp_path))
    odd = dataclasses.replace(recorded, precision="transformer-engine")
    path = write_dossier(tmp_path / "odd", odd, megabytes=1)
    code, printed = replayed(capsys, path, "--model", "tests.tasks.Classifier")
    assert (code, "'transformer-engine' does not run on the CPU" in printed) == (2, True)


def test_dossier_of_gpu_notes_random_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = read_dossier(record(Classifier(), poisoned(batches(12), nan=[6]), tmp_path))
    from_gpu = dataclasses.replace(
        recorded, rng={**recorded.rng, "cuda": [torch.zeros(16, dtype=torch.uint8)]}
    )
    path = write_dossier(tmp_path / "gpu", from_gpu, megabytes=1)
    code, printed = replayed(capsys, path, "--model", "tests.tasks.Classifier")
    assert code == 0
    assert "note: random numbers that were drawn on a GPU differ on the CPU" in printed


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = replayed(capsys, "--help")
    assert code == 0
    assert "--checkpoint" in printed
    assert "dossier" in printed
    main(["--help"])
    assert "replay" in capsys.readouterr().out
