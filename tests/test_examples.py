"""Every example runs, and does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import digits, trainer
from tests.runtime.launching import launch


@pytest.mark.filterwarnings("ignore")
def test_trainer_in_twenty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.main(max_steps=150) < 1.0
    assert "4 batches skipped" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_digits(capsys: pytest.CaptureFixture[str]) -> None:
    as_it_is, cured = digits.main(max_steps=300)
    assert as_it_is < 0.3
    assert cured > 0.7
    assert "kaiming_normal_(model.layers.2.weight" in capsys.readouterr().out


def test_sharded_clipping(tmp_path: Path) -> None:
    source = f"import os; os.chdir({str(tmp_path)!r}); from examples.sharded_clipping import main; main(60)"
    script = tmp_path / "train.py"
    script.write_text(source)
    assert "1 batch skipped" in launch([str(script)])
