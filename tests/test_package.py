"""Public names, version, layers and entry points of the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_gradguard

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_public_names_are_sorted_and_importable() -> None:
    assert lightning_gradguard.__all__ == sorted(lightning_gradguard.__all__)
    assert lightning_gradguard.__all__ == list(lightning_gradguard._HOME)
    for name in lightning_gradguard.__all__:
        assert getattr(lightning_gradguard, name).__name__ == name
    assert dir(lightning_gradguard) == lightning_gradguard.__all__
    with pytest.raises(AttributeError, match="'Clipper'"):
        lightning_gradguard.Clipper  # noqa: B018


def test_version_is_that_of_the_changelog() -> None:
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == lightning_gradguard.__version__


def test_core_imports_no_lightning() -> None:
    code = (
        "import sys, lightning_gradguard.core.clipping, lightning_gradguard.core.initialization;"
        "from lightning_gradguard import ZScoreClipping;"
        "assert not {'pytorch_lightning', 'lightning', 'torchmetrics'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_linter_forbids_upward_imports(tmp_path: Path) -> None:
    for layer, imported in (
        ("core", "pytorch_lightning"),
        ("core", "lightning_gradguard.runtime.steps.suite"),
        ("runtime", "lightning_gradguard.callbacks.nan_rollback"),
        ("callbacks", "lightning_gradguard.callbacks.nan_rollback"),
        ("callbacks", "lightning_gradguard.cli.main"),
        ("report", "torch"),
        ("report", "lightning_gradguard.cli.messages"),
    ):
        file = ROOT / "lightning_gradguard" / layer / "scratch.py"
        result = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", str(file), "-"],
            input=f'"""Imports an upper layer."""\n\nimport {imported}\n',
            capture_output=True,
            text=True,
        )
        assert "TID251" in result.stdout, (layer, imported)


def test_readme_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in [*targets, "check", "install"])
    assert (ROOT / "docs/images/demo.png").stat().st_size > 10_000


@pytest.mark.slow
def test_fit_from_yaml(tmp_path: Path) -> None:
    yaml_file = str(ROOT / "examples" / "digits.yaml")
    flags = ("--trainer.max_steps", "12", "--trainer.enable_progress_bar", "false")
    result = subprocess.run(
        [sys.executable, "-m", "lightning_gradguard", "fit", "-c", yaml_file, *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    (folder,) = Path("lightning_logs").iterdir()
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    classes = [entry["class_path"].rpartition(".")[2] for entry in saved["trainer"]["callbacks"]]
    assert classes == ["InitializationCheck", "AdaptiveGradientClipping", "NaNRollback"]
    records = [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]
    assert records[0]["action"] == "repaired"
