"""`NaNRollback(on_nonfinite="stop")`, a second `NaNRollback`, and what a run that was lost leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from lightning_gradguard import (
    LearningRateBackoff,
    NaNRollback,
    StepCallback,
    TrainingDiagnosis,
    TrainingDivergedError,
    default_callbacks,
)
from tests.tasks import Classifier, batches, fit, poisoned, same, weights


@pytest.mark.parametrize("optimizer", ["sgd", "adam fused"])
@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_stops_at_the_first_bad_step(check: Any, optimizer: str, tmp_path: Path) -> None:
    """With the weights of the good steps, in the module and in the checkpoint, from which it goes on."""
    expected = Classifier(optimizer)
    fit(expected, batches(20)[:13])
    module, rollback = Classifier(optimizer), NaNRollback(on_nonfinite="stop", check=check)
    data = poisoned(batches(20), nan=[13])
    with pytest.raises(TrainingDivergedError, match="nonfinite .on_nonfinite='stop'.") as raised:
        fit(module, data, [rollback], tmp_path)
    assert "without the bad step" in str(raised.value)
    assert "To resume, correct that and call trainer.fit(" in str(raised.value)  # no rate helps a NaN input
    assert "learning rate" not in str(raised.value)
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert same(weights(module), weights(expected))
    saved = torch.load(tmp_path / "last_good.ckpt", weights_only=True)
    assert same(list(saved["state_dict"].values()), list(expected.state_dict().values()))
    records = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"], r["action"]) for r in records] == [
        ("nonfinite_loss", 13, "skipped"),
        ("training_diverged", 13, "stopped"),
    ]


def test_a_stop_is_told_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On the line of the bad step, with advice in the error, which the next steps name."""
    with pytest.raises(TrainingDivergedError, match="stopped at step 5") as raised:
        fit(Classifier(), poisoned(batches(9), nan=[5]), [NaNRollback(on_nonfinite="stop")], tmp_path)
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "at step" in line]
    assert "Nonfinite loss at step 5 (epoch 0, batch 5)" in line
    assert "skipped; the run stops." in line
    (record, _) = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert record["advice"] in str(raised.value)
    assert record["advice"] not in printed.err + printed.out
    assert "the cure in the error that ends the run" in printed.err
    assert "diverged" not in printed.err + printed.out


def test_a_state_that_is_nonfinite_on_another_rank_alone_is_restored_on_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_gradguard.runtime.rollback.fit_context.any_rank", lambda *_: True)
    with pytest.raises(TrainingDivergedError, match="the last qualified ones, from before step 0"):
        fit(Classifier(), poisoned(batches(20), nan=[13]), [NaNRollback(on_nonfinite="stop")])


def test_a_healthy_run_is_not_stopped() -> None:
    bare, module = Classifier(), Classifier()
    fit(bare, batches(20))
    trainer = fit(module, batches(20), [NaNRollback(on_nonfinite="stop")])
    assert trainer.global_step == 20
    assert same(weights(bare), weights(module))


@pytest.mark.parametrize(
    "other",
    [NaNRollback(), NaNRollback(patience=5), LearningRateBackoff(factor=0.3), TrainingDiagnosis()],
)
def test_a_second_one_is_rejected_in_our_own_words(other: StepCallback) -> None:
    words = rf"has 2 {type(other).__name__} callbacks.*keep one.*default_callbacks takes yours in place"
    with pytest.raises(MisconfigurationException, match=words):
        fit(Classifier(), batches(2), [*default_callbacks(), other])


@pytest.mark.parametrize("why", ["budget", "an exception", "max_steps"])
@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_counts_agree_after_a_lost_run(check: Any, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    rollback = NaNRollback(max_rollbacks=0, patience=3 if why == "budget" else 9, check=check)
    data: list[Any] = poisoned(batches(20), nan=[3, 12, 13, 14])
    if why == "an exception":
        data[15] = "no batch"
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=15 if why == "max_steps" else -1,
        logger=False,
        callbacks=[rollback, LearningRateBackoff()],
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    module = Classifier()
    try:
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    except (TrainingDivergedError, ValueError):
        assert why != "max_steps"
    assert rollback.skips == (4 if check == "exact" else 3)
    assert trainer.callback_metrics["rollback/skips"] == rollback.skips
    assert trainer.callback_metrics["rollback/rollbacks"] == 0
    assert re.search(rf"steps skipped +{rollback.skips} of ", capsys.readouterr().out)


def test_runs_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    """Without a logger, a run gets a folder of its own where an earlier one left incidents."""
    for n in (1, 2, 3):
        fit(Classifier(), poisoned(batches(10), nan=range(n)), [NaNRollback(patience=9)], tmp_path)
    files = [tmp_path / own / "incidents.jsonl" for own in ("", "version_1", "version_2")]
    assert [len(file.read_text().splitlines()) for file in files] == [1, 2, 3]
    assert not (tmp_path / "version_3").exists()
