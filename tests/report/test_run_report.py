"""The report on a run names what is missing in its logs."""

from __future__ import annotations

import json
import math

import pytest

from lightning_gradguard.report.render.html import to_html
from tests.report.runs import printed, report_of, write_events, write_long

NAN = math.nan


def test_short_run_has_no_verdict_but_symptoms(capsys: pytest.CaptureFixture[str]) -> None:
    tags = {"grad_norm/total": [3e6] * 3, "train_loss": [2.0] * 3, "clip/coefficient": [1e-6] * 3}
    write_events("run", {**tags, "clip/fraction": [1.0] * 3})
    text = " ".join(printed(capsys, "run").split())
    assert "too little was logged for a verdict" in text
    assert "for a verdict log more often, Trainer(log_every_n_steps=10), or train for longer" in text
    assert "clipping of most steps (minor, from step 1)" in text
    assert "largest gradient norm 3e+06" in text


def test_run_with_a_loss_alone_gets_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    write_events("run", {"train/loss": [4.6, 3.9, 1.2e14, NAN]})
    text = " ".join(printed(capsys, "run").split())
    assert "run: divergence" in text
    assert "the verdict rests on train/loss alone; GradientNormMonitor() logs norms" in text


def test_a_run_without_logged_norms_is_told_who_logs_them_and_when(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_events("run", {"train_loss": [4.6, 3.9, 1.2e14, NAN], "init/loss": [4.6]})
    text = " ".join(printed(capsys, "run").split())
    assert "GradientNormMonitor() logs norms, once in log_every_n_steps of the Trainer" in text


@pytest.mark.parametrize(("cause", "first"), [("depth", "Use fewer layers."), ("small_weights", "Cure: ")])
def test_what_was_tried_on_the_batch_is_the_first_step_unless_the_network_is_too_deep(
    cause: str, first: str
) -> None:
    folder = write_events("run", {"train_loss": [2.0] * 60})
    told = [
        {"kind": "vanishing_gradient", "step": 2, "cause": cause, "advice": "Use fewer layers."},
        {"kind": "poor_initialization", "step": 0, "advice": "Cure: nn.init.zeros_(model.head.weight)"},
    ]
    (folder / "incidents.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in told))
    found = report_of(folder)
    assert [s.kind for s in found.verdict.symptoms] == ["poor_initialization", "vanishing_gradient"]
    assert sorted(found.next_steps) == ["Cure: nn.init.zeros_(model.head.weight)", "Use fewer layers."]
    assert found.next_steps[0].startswith(first)


def test_general_remedies_give_way_to_those_of_a_known_cause() -> None:
    norms = {f"grad_norm/net.{i}.weight": [10.0 ** (i - 9)] * 60 for i in range(10)}
    folder = write_events("run", {"train_loss": [2.0] * 60, **norms})
    assert "Add residual connections." in report_of(folder).next_steps
    told = {"kind": "poor_initialization", "step": 0, "advice": "Cure: nn.init.zeros_(model.head.weight)"}
    (folder / "incidents.jsonl").write_text(f"{json.dumps(told)}\n")
    found = report_of(folder)
    assert {s.kind for s in found.verdict.symptoms} == {"poor_initialization", "vanishing_gradient"}
    assert found.next_steps == ["Cure: nn.init.zeros_(model.head.weight)"]


@pytest.mark.parametrize(("here", "earlier"), [(2, 3), (0, 5), (5, 0)])
def test_skips_before_a_resume_are_told_apart(
    here: int, earlier: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are counted in checkpoints, and their incidents are in another folder."""
    folder = write_events("run", {"train_loss": [2.0] * 60, "rollback/skips": [float(5 - here)] + [5.0] * 59})
    told = [{"kind": "nonfinite_loss", "step": 7 + i, "action": "skipped"} for i in range(here)]
    (folder / "incidents.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in told))
    text = " ".join(printed(capsys, "run").split())
    before = f" ({earlier} of them before this part of a resumed run)" if earlier else ""
    assert f"5 steps skipped{before}, 0 rollbacks" in text


def test_advice_that_was_not_tried_comes_after_that_for_the_worst() -> None:
    folder = write_events("run", {"train_loss": [2.0] * 60})
    told = [
        {"kind": "saturated_units", "step": 25, "advice": "Use smaller inputs."},
        {
            **{"kind": "nonfinite_loss", "step": 59, "action": "skipped", "cause": "update_too_large"},
            "advice": "Lower the learning rate.",
        },
        {"kind": "training_diverged", "step": 60, "action": "stopped"},
    ]
    (folder / "incidents.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in told))
    assert report_of(folder).next_steps[:2] == ["Lower the learning rate.", "Use smaller inputs."]


def test_hundred_thousand_steps() -> None:
    path = write_long("run", ["grad_norm/total", "grad_norm/a.weight", "train_loss"], 100_000)
    found = report_of(path)
    assert found.verdict.status == "healthy"
    assert found.verdict.outcome.steps == 100_000
    page = to_html([found])
    assert len(page) < 100_000
