"""`pytorch_lightning` and `lightning` are two trees of the same classes: the suite serves both alike."""

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

pytestmark = pytest.mark.timeout(180)  # each process has a minute of its own
ROOT = Path(__file__).parents[1]
TREES = ("pytorch_lightning", "lightning.pytorch")
OTHER = dict(zip(TREES, reversed(TREES), strict=True))
CALLBACKS = (
    "InitializationCheck",
    "GradientNormMonitor",
    "AdaptiveGradientClipping",
    "LearningRateBackoff",
    "NaNRollback",
)


def run(tree: str, *arguments: str, cwd: Path) -> str:
    """Python in a process of its own; returns what it said."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TREE": tree, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@dataclass
class Runs:
    """What the runs of `under_a_tree` left, by tree, and what they said."""

    left: dict[str, dict[str, Any]]
    said: dict[str, str]
    checkpoints: dict[str, str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs({}, {}, {})
    for tree in TREES:
        folder = tmp_path_factory.mktemp(tree)
        found.said[tree] = run(tree, "-m", "tests.under_a_tree", "storm", str(folder), cwd=folder)
        found.left[tree] = torch.load(folder / "storm.pt", weights_only=False)
        (found.checkpoints[tree],) = map(str, folder.glob("*.ckpt"))
    return found


def assert_same(left: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit."""
    assert left["counts"] == expected["counts"]
    for name in ("weights", "optimizer"):
        assert all(map(torch.equal, left[name], expected[name])), name
        assert len(left[name]) == len(expected[name])
    assert left["metrics"].keys() == expected["metrics"].keys()
    assert all(torch.equal(left["metrics"][key], value) for key, value in expected["metrics"].items())


def test_a_storm_is_weathered_alike(runs: Runs) -> None:
    one, other = (runs.left[tree] for tree in TREES)
    assert one.keys() == other.keys()
    assert one["storm"]["counts"] == [5, 1]
    for name, left in one.items():
        assert_same(left, other[name])


@pytest.mark.parametrize("tree", TREES)
def test_lightning_s_own_averages_are_known(runs: Runs, tree: str) -> None:
    assert "gradguard: Rolled back to step" in runs.said[tree]
    assert "seems to average weights" not in runs.said[tree]


@pytest.mark.parametrize("tree", TREES)
def test_checkpoints_of_both_are_resumed(runs: Runs, tmp_path: Path, tree: str) -> None:
    """As if there had been no interruption; and without a word that the user did not want to hear."""
    files = [runs.checkpoints[tree], runs.checkpoints[OTHER[tree]]]
    said = run(tree, "-m", "tests.under_a_tree", "resume", str(tmp_path), *files, cwd=tmp_path)
    assert "gradguard" not in said
    assert "available" not in said
    for left in torch.load(tmp_path / "resume.pt", weights_only=False).values():
        assert_same(left, runs.left[tree]["storm"])


@pytest.mark.parametrize(
    ("tree", "loaded"),
    [
        ("pytorch_lightning", ["lightning_gradguard.callbacks.defaults"]),
        ("pytorch_lightning", ["lightning", "lightning_gradguard.callbacks.defaults"]),
        ("lightning.pytorch", ["lightning", "lightning_gradguard.callbacks.defaults"]),
    ],
    ids=["pytorch_lightning alone", "pytorch_lightning last", "lightning first"],
)
def test_the_command_line_takes_the_callbacks(tmp_path: Path, tree: str, loaded: list[str]) -> None:
    """By full names and, once they are loaded, by short ones."""
    entries = [{"class_path": f"lightning_gradguard.{name}"} for name in CALLBACKS[:3]]
    entries += [{"class_path": name} for name in CALLBACKS[3:]]
    trainer = {"accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, "callbacks": entries}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    lines = [f"import {name}" for name in loaded]
    lines += [f"from {tree}.cli import LightningCLI", "from tests.under_a_tree import Data, Network"]
    (tmp_path / "main.py").write_text("\n".join([*lines, "LightningCLI(Network, Data)"]))
    flags = ("--trainer.max_steps", "30", "--trainer.callbacks.patience", "9")
    run(tree, "main.py", "fit", "--config", "config.yaml", *flags, cwd=tmp_path)

    (folder,) = (tmp_path / "lightning_logs").iterdir()
    saved = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["callbacks"]
    assert tuple(entry["class_path"].rpartition(".")[2] for entry in saved) == CALLBACKS
    assert saved[-1]["init_args"]["patience"] == 9
    incidents = [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]
    assert [i["step"] for i in incidents if i["kind"] == "nonfinite_loss"] == [4, 20, 21, 22]


def test_the_commands_take_a_module_of_lightning(tmp_path: Path) -> None:
    network, data = "tests.under_a_tree.Network", "tests.under_a_tree.Data"
    (tmp_path / "module.yaml").write_text(yaml.safe_dump({"model": network, "data": data}))
    trainer = {"accelerator": "cpu", "max_steps": 10, "enable_progress_bar": False}
    (tmp_path / "trainer.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    command = ("-m", "lightning_gradguard")
    run(TREES[1], *command, "fit", "-c", "module.yaml", "-c", "trainer.yaml", cwd=tmp_path)
    (dossier,) = (tmp_path / "lightning_logs").glob("*/incidents/*")
    assert dossier.name == "4"
    said = run(TREES[1], *command, "replay", str(dossier), "--model", network, cwd=tmp_path)
    assert "\nreproduced\n" in said
