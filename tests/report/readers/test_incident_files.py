"""Incidents and lost batches are read line by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_gradguard.report.render.wording import intervention_sentences
from lightning_gradguard.report.run_report import RunReport
from tests.report.runs import printed, report_of, write_events


def test_broken_lines_are_counted() -> None:
    path = write_events("run", {"train_loss": [1.0] * 20})
    lines = ['{"kind": "rollback", "step": 3, "value": "nan"}', '{"kind": "roll', "[]", '{"kind": "x"}']
    (path / "incidents.jsonl").write_text("\n".join(lines) + "\n")
    found = report_of(path)
    assert dict(found.incidents) == {"rollback": 1}
    assert "2 lines of incidents.jsonl could not be read" in found.notes
    assert "1 records of incidents.jsonl are not incidents" in found.notes


def test_incidents_without_scalars_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/incidents.jsonl").write_text('{"kind": "loss_spike", "step": 3}\n')
    text = printed(capsys, "run")
    assert "there is neither an event file nor a metrics.csv, only incidents.jsonl" in " ".join(text.split())
    assert "loss_spike 1" in text
    assert "no steps were logged" in text


def test_interventions_without_scalars_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """A lost run with `logger=False`: its incidents have what it did, and when it ended."""
    Path("run").mkdir()
    done = [
        ("nonfinite_loss", 7, "skipped"),
        ("nonfinite_loss", 8, "skipped"),
        ("rollback", 8, "rolled_back"),
    ]
    done += [("learning_rate_backoff", 8, "backed_off"), ("training_diverged", 9, "stopped")]
    lines = [json.dumps({"kind": kind, "step": step, "action": action}) for kind, step, action in done]
    Path("run/incidents.jsonl").write_text("\n".join(lines))
    text = printed(capsys, "run")
    assert "stopped at step 9" in text
    assert "2 steps skipped, 1 rollback" in text
    assert "add LearningRateBackoff" not in text


def test_incidents_of_abandoned_steps_are_omitted() -> None:
    """A run that was stopped, and resumed from step 50 in the same folder."""
    losses = [2.0 * 0.98**i for i in range(150)]
    path = write_events("run", {"train_loss": losses[:100], "rollback/skips": [0.0] * 100})
    write_events("run", {"train_loss": losses[50:], "rollback/skips": [0.0] * 100}, first_step=50)
    old = [("loss_spike", 20, "none"), ("nonfinite_loss", 70, "skipped")]
    old += [("nonfinite_loss", 98, "skipped"), ("training_diverged", 99, "stopped")]
    again = [("nonfinite_loss", 70, "skipped"), ("loss_spike", 120, "none")]

    def report_with(incidents: list[tuple[str, int, str]]) -> RunReport:
        lines = [json.dumps({"kind": k, "step": s, "action": a}) for k, s, a in incidents]
        (path / "incidents.jsonl").write_text("\n".join(lines))
        return report_of(path)

    alone = report_with(old)
    assert (alone.verdict.status, dict(alone.incidents)) == ("healthy", {"loss_spike": 1})
    late = report_with([*old[:3], ("training_diverged", 100, "stopped")])
    assert (late.verdict.status, dict(late.incidents)) == ("healthy", {"loss_spike": 1})
    elsewhere = report_with([*old, ("nonfinite_gradient", 60, "skipped")])
    assert dict(elsewhere.incidents) == {"loss_spike": 1, "nonfinite_gradient": 1}
    same = report_with([old[1], again[0]])
    assert dict(same.incidents) == {"nonfinite_loss": 1}
    repeated = report_with([*old, *again])
    assert repeated.verdict.headline == "recovered from nonfinite loss"
    assert dict(repeated.incidents) == {"loss_spike": 2, "nonfinite_loss": 1}


def test_lost_batches_of_all_ranks_are_counted() -> None:
    path = write_events("run", {"train_loss": [1.0] * 20, "rollback/skips": [0.0] * 19 + [6.0]})
    for rank in range(2):
        lines = [json.dumps({"reason": "skipped"})] * 6
        (path / f"lost_batches.rank{rank}.jsonl").write_text("\n".join(lines))
    interventions = report_of(path).interventions
    assert (dict(interventions.lost_batches), interventions.ranks) == ({"skipped": 12}, 2)
    assert intervention_sentences(interventions)[:2] == [
        "6 steps skipped, 0 rollbacks",
        "12 lost batches on 2 ranks (12 skipped): lost_batches.rank*.jsonl",
    ]


def test_what_cannot_be_read_is_noted(tmp_path: Path) -> None:
    nested = "[" * 100_000
    (tmp_path / "incidents.jsonl").write_text(f'{nested}\n{{"kind": "loss_spike", "step": 3}}\n')
    (tmp_path / "lost_batches.rank1.jsonl").mkdir()
    found = report_of(tmp_path)
    assert dict(found.incidents) == {"loss_spike": 1}
    assert "1 line of incidents.jsonl could not be read" in found.notes
    assert "lost_batches.rank1.jsonl cannot be read: Is a directory" in found.notes
