"""The suite behaves the same with modules of `pytorch_lightning` and of `lightning`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # each process has a limit of its own
ROOT = Path(__file__).parents[2]
PACKAGES = ("pytorch_lightning", "lightning.pytorch")
OTHER = dict(zip(PACKAGES, reversed(PACKAGES), strict=True))
PROGRAM = ("-m", "tests.contracts.under_package")
CALLBACKS = (
    "InitializationCheck",
    "GradientNormMonitor",
    "AdaptiveGradientClipping",
    "LearningRateBackoff",
    "NaNRollback",
)


def run(package: str, *arguments: str, cwd: Path) -> str:
    """Runs Python in a process of its own; returns its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LIGHTNING_PACKAGE": package, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@dataclass
class Runs:
    """States and output of the runs of `under_package`, by package."""

    left: dict[str, dict[str, Any]]
    printed: dict[str, str]
    checkpoints: dict[str, str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs({}, {}, {})
    for package in PACKAGES:
        folder = tmp_path_factory.mktemp(package)
        found.printed[package] = run(package, *PROGRAM, "storm", str(folder), cwd=folder)
        found.left[package] = torch.load(folder / "storm.pt", weights_only=False)
        (found.checkpoints[package],) = map(str, folder.glob("*.ckpt"))
    return found


def assert_same(left: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit."""
    assert left["counts"] == expected["counts"]
    for name in ("weights", "optimizer"):
        assert all(map(torch.equal, left[name], expected[name])), name
        assert len(left[name]) == len(expected[name])
    assert left["metrics"].keys() == expected["metrics"].keys()
    assert all(torch.equal(left["metrics"][key], value) for key, value in expected["metrics"].items())


def test_nan_storm_gives_equal_state(runs: Runs) -> None:
    one, other = (runs.left[package] for package in PACKAGES)
    assert one.keys() == other.keys()
    assert one["storm"]["counts"] == [6, 1]
    for name, left in one.items():
        assert_same(left, other[name])


@pytest.mark.parametrize("package", PACKAGES)
def test_public_callbacks_are_callbacks_of_the_package(tmp_path: Path, package: str) -> None:
    """Those of the package that was imported first, which its Trainer and its command line accept."""
    program = (
        f"import {package} as lightning, lightning_gradguard as suite\n"
        "public = [getattr(suite, name) for name in suite.__all__]\n"
        "names = ('on_step', 'setup', 'on_train_start')\n"
        "found = [c for c in public if isinstance(c, type) and any(n in vars(c) for n in names)]\n"
        "print(len(found), [c.__name__ for c in found if not issubclass(c, lightning.Callback)])"
    )
    assert run(package, "-c", program, cwd=tmp_path).splitlines()[-1] == "9 []"


@pytest.mark.parametrize("package", PACKAGES)
def test_averages_of_lightning_are_recognized(runs: Runs, package: str) -> None:
    assert "gradguard: Rolled back to step" in runs.printed[package]
    assert "seems to average weights" not in runs.printed[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_checkpoints_of_both_packages_resume(runs: Runs, tmp_path: Path, package: str) -> None:
    """The state equals that of an uninterrupted run, and loggers at level ERROR print nothing."""
    files = [runs.checkpoints[package], runs.checkpoints[OTHER[package]]]
    printed = run(package, *PROGRAM, "resume", str(tmp_path), *files, cwd=tmp_path)
    assert "gradguard" not in printed
    assert "available" not in printed
    for left in torch.load(tmp_path / "resume.pt", weights_only=False).values():
        assert_same(left, runs.left[package]["storm"])


@pytest.mark.parametrize(
    ("package", "loaded"),
    [
        ("pytorch_lightning", ["lightning_gradguard.callbacks.defaults"]),
        ("pytorch_lightning", ["lightning", "lightning_gradguard.callbacks.defaults"]),
        ("lightning.pytorch", ["lightning", "lightning_gradguard.callbacks.defaults"]),
    ],
    ids=["pytorch_lightning alone", "pytorch_lightning last", "lightning first"],
)
def test_command_line_accepts_callbacks(tmp_path: Path, package: str, loaded: list[str]) -> None:
    """By full names and, once loaded, by short ones."""
    entries = [{"class_path": f"lightning_gradguard.{name}"} for name in CALLBACKS[:3]]
    entries += [{"class_path": name} for name in CALLBACKS[3:]]
    trainer = {"accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, "callbacks": entries}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    lines = [f"import {name}" for name in loaded]
    lines += [
        f"from {package}.cli import LightningCLI",
        "from tests.contracts.under_package import Data, Network",
    ]
    (tmp_path / "main.py").write_text("\n".join([*lines, "LightningCLI(Network, Data)"]))
    flags = ("--trainer.max_steps", "30", "--trainer.callbacks.patience", "9")
    run(package, "main.py", "fit", "--config", "config.yaml", *flags, cwd=tmp_path)

    (folder,) = (tmp_path / "lightning_logs").iterdir()
    saved = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["callbacks"]
    assert tuple(entry["class_path"].rpartition(".")[2] for entry in saved) == CALLBACKS
    assert saved[-1]["init_args"]["patience"] == 9
    incidents = [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]
    assert [i["step"] for i in incidents if i["kind"] == "nonfinite_loss"] == [4, 20, 21, 22]


def test_commands_accept_a_module_of_lightning(tmp_path: Path) -> None:
    network, data = "tests.contracts.under_package.Network", "tests.contracts.under_package.Data"
    (tmp_path / "module.yaml").write_text(yaml.safe_dump({"model": network, "data": data}))
    trainer = {"accelerator": "cpu", "max_steps": 10, "enable_progress_bar": False}
    (tmp_path / "trainer.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    command = ("-m", "lightning_gradguard")
    run(PACKAGES[1], *command, "fit", "-c", "module.yaml", "-c", "trainer.yaml", cwd=tmp_path)
    (dossier,) = (tmp_path / "lightning_logs").glob("*/incidents/*")
    assert dossier.name == "4"
    printed = run(PACKAGES[1], *command, "replay", str(dossier), "--model", network, cwd=tmp_path)
    assert printed.startswith("Reproduced: ")
