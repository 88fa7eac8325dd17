"""The timeline merges repeated events."""

from __future__ import annotations

import json
import re

from tests.report.runs import report_of, write_events


def test_repeated_incidents_are_merged() -> None:
    path = write_events("run", {"train_loss": [1.0] * 2000})
    lines = []
    for start in range(0, 2000, 50):
        lines += [{"kind": "nonfinite_loss", "step": start + i, "action": "skipped"} for i in range(3)]
        lines += [{"kind": "rollback", "step": start + 3, "value": float(start), "action": "rolled_back"}]
    (path / "incidents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    timeline = report_of(path).timeline
    assert len(timeline) <= 13
    counted = [int(n) for entry in timeline for n in re.findall(r"onfinite loss \((\d+) times\)", entry.text)]
    assert sum(counted) == 120
    (path / "incidents.jsonl").write_text("\n".join(map(json.dumps, lines[:4])))
    first, second = [entry.text for entry in report_of(path).timeline if "stuck" not in entry.text]
    assert (first, second) == ("Nonfinite loss (3 times), skipped", "Rolled back to step 0")


def test_skips_without_incidents_come_from_counters() -> None:
    skips = [0.0] * 40 + [float(i) for i in range(1, 13)] + [12.0] * 20
    path = write_events("run", {"rollback/skips": skips, "train_loss": [0.97**i for i in range(72)]})
    (entry,) = report_of(path).timeline
    assert (entry.first_step, entry.last_step, entry.text) == (40, 51, "Skipped 12 times")
    path = write_events("once", {"rollback/skips": [0.0] * 9 + [1.0] * 9, "train_loss": [1.0] * 18})
    assert [entry.text for entry in report_of(path).timeline] == ["Skipped"]
