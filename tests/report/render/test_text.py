"""The text report fits the terminal."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from lightning_gradguard.core import tags
from lightning_gradguard.report.render.text import text_table
from tests.report.runs import printed, write_events

NAN = math.nan
HEAD = ["run", "verdict", "finite", "final", "loss", "max", "norm", "skips", "rollbacks", "worst", "layer"]
TRANSPOSED = ["run      first_of_the_runs", "verdict  exploding", "         gradients", "loss     1.0"]


def test_unknown_values_are_dashes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_events("runs/norms", {"grad_norm/total": [1.0] * 20})
    Path("runs/incidents").mkdir()
    Path("runs/incidents/incidents.jsonl").write_text('{"kind": "loss_spike", "step": 3}\n')
    monkeypatch.setenv("COLUMNS", "120")
    _, incidents, norms = printed(capsys, "runs").splitlines()[:3]
    assert re.split(r" {2,}", norms)[2:] == ["all 20", "-", "1", "-", "-", "-"]
    assert re.split(r" {2,}", incidents)[2:] == ["-"] * 6
    first, second = json.loads(printed(capsys, "runs", "--json"))["runs"]
    assert (second["final_loss"], second["first_loss"], first["survived"]) == (None, None, None)


@pytest.mark.parametrize(
    ("family", "words"), [("grad_norm", "20 steps, "), ("grad_norm.1", "20 steps, of 2 ")]
)
def test_steps_are_those_of_each_optimizer(
    family: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_events("run", {"grad_norm/total": [1.0] * 20, f"{family}/total": [1.0] * 20})
    assert words in printed(capsys, "run")


def test_runs_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    write_events("runs/version_10", {"train_loss": [2.0 * 0.9**i for i in range(30)]})
    write_events(
        "runs/version_9", {"train_loss": [4.0, 3.0, 1e9, NAN], "grad_norm/total": [1.0, 1.0, 1e9, NAN]}
    )
    write_events("runs/deep/er/run", {"train_loss": [2.0 * 0.9**i for i in range(30)]})
    head, *rows = printed(capsys, "runs").splitlines()[:4]
    assert head.split() == HEAD
    assert [row.split()[0] for row in rows] == ["deep/er/run", "version_9", "version_10"]
    assert "exploding gradients  3 of 4" in rows[1]


def test_a_stopped_run_has_not_survived_all_of_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    write_events("runs/whole", {"train_loss": [2.0 * 0.9**i for i in range(30)]})
    stopped = write_events("runs/stopped", {"train_loss": [2.0] * 20})
    record = {"kind": "training_diverged", "step": 19, "action": "stopped"}
    (stopped / "incidents.jsonl").write_text(json.dumps(record) + "\n")
    rows = printed(capsys, "runs").splitlines()[1:3]
    assert ["20, stopped" in row for row in rows] == ["stopped  " in row for row in rows]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_line_is_wider_than_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    name = "encoder.layers.11.self_attention.output_projection.weight"
    tags = {f"grad_norm/{name}": [1.0, 1e9, NAN], "train_loss": [4.0, 3.0, NAN]}
    write_events("a_run_with_quite_a_long_name_of_its_own", tags)
    write_events("another", {"train_loss": [2.0 * 0.9**i for i in range(30)]})
    for text in (
        printed(capsys, "another"),
        printed(capsys, "a_run_with_quite_a_long_name_of_its_own", "another"),
    ):
        assert max(map(len, text.splitlines())) <= width


def test_table_is_narrowed_and_then_transposed() -> None:
    rows = [("run", "verdict", "loss"), ("first_of_the_runs", "exploding gradients", "1.0")]
    assert text_table(rows, 100)[1] == "first_of_the_runs  exploding gradients  1.0"
    assert text_table(rows, 36, flexible=(0, 1)) == [
        "run            verdict    loss",
        "first_of_the_  exploding  1.0",
        "runs           gradients",
    ]
    assert text_table(rows, 27, flexible=(0, 1)) == TRANSPOSED


def test_code_of_a_cure_is_pasted_as_it_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code = (
        "; ".join(f"nn.init.zeros_(model.net[{i}].bias)" for i in range(6)) + "  # gradient_gain is as usual"
    )
    cures = {"code": f"Cure: {code}", "prose": "nothing that was tried betters it; try fewer layers"}
    cures["change"] = f"Cure: nn.ReLU() in place of sigmoid, and at the end of __init__:\n{code}"
    for name, cure in cures.items():
        write_events(name, {"train_loss": [2.0] * 50})
        incident = {"kind": "dead_units", "step": 0, "value": 1.0, "advice": cure}
        Path(f"{name}/incidents.jsonl").write_text(json.dumps(incident))
    assert code in printed(capsys, "code").splitlines()
    changed = printed(capsys, "change").splitlines()
    above = changed[changed.index(code) - 2 : changed.index(code)]
    assert (
        " ".join(" ".join(above).split()) == "1. nn.ReLU() in place of sigmoid, and at the end of __init__:"
    )
    assert "  1. nothing that was tried betters it" in printed(capsys, "prose")


def test_a_rate_as_configured_is_no_intervention(capsys: pytest.CaptureFixture[str]) -> None:
    for name, scale, found in (
        ("as_is", 1.0, "\nInterventions\n  none\n"),
        ("cut", 0.5, "rate scaled by 0.5"),
    ):
        write_events(name, {"train_loss": [1.0] * 20, tags.LR_SCALE: [scale] * 20})
        assert found in printed(capsys, name)
