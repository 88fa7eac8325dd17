"""Files that 0.5.0 wrote stay readable: run folders, checkpoints, dossiers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GradientNormMonitor,
    InitializationCheck,
    LearningRateBackoff,
    NaNRollback,
    ZScoreClipping,
)
from lightning_gradguard.cli.main import main
from lightning_gradguard.runtime.incidents.dossier import read_dossier
from tests.tasks import Classifier, batches, plain_loader, poisoned

FILES = Path(__file__).parents[1] / "data" / "v0_5"


def test_report_reads_a_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(FILES / "run")])
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "recovered from nonfinite loss (cause: update too large)",
        "cause of 1: bad input",
        "cause: update too large",
        "Rolled back to step 20",
        "Learning rate scaled by 0.05",
        "6 steps skipped, 2 rollbacks",
        "44 lost batches (6 skipped, 38 undone)",
    ):
        assert text in printed, f"{text!r} is not in {printed}"


def test_report_page_reads_a_run_folder(tmp_path: Path) -> None:
    main(["report", str(FILES / "run"), "--html", str(tmp_path / "page.html")])
    assert "<svg" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("step", "cause"), [(40, "bad_input"), (81, "update_too_large")])
def test_dossier_is_read_and_reproduced(step: int, cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = FILES / "run" / "incidents" / str(step)
    assert read_dossier(folder).origin.cause == cause
    main(["replay", str(folder), "--model", "tests.tasks.Classifier"])
    assert "Reproduced: " in capsys.readouterr().out


def test_checkpoint_resumes_as_under_0_5(tmp_path: Path) -> None:
    shutil.copytree(FILES / "run", tmp_path / "run")  # where the checkpoint expects the lost batches
    module, rollback, backoff = (
        Classifier(),
        NaNRollback(snapshot_every_n_steps=20, max_dossiers=0),
        LearningRateBackoff(),
    )
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[
            InitializationCheck(),
            GradientNormMonitor(),
            rollback,
            AdaptiveGradientClipping(ZScoreClipping(max_norm=1.0)),
            backoff,
        ],
    )
    data = poisoned(batches(40, size=8, seed=5), nan=[7, 8, 9, 30])
    trainer.fit(module, plain_loader(data), ckpt_path=str(FILES / "resume.ckpt"))
    expected = torch.load(FILES / "resumed.pt", weights_only=True)
    assert (rollback.skips, rollback.rollbacks) == (expected["skips"], expected["rollbacks"])
    assert backoff.scale == expected["scale"]
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(weight, expected["weights"][name], rtol=1e-4, atol=1e-6)
