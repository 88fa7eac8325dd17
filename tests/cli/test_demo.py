"""In the demo the bare run fails, the guarded one learns, and TensorBoard shows both."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gradguard.cli.demo import Run, main, summary

TAGS = {
    "grad_norm/total",
    "grad_norm/rnn.weight_hh_l0",
    "grad_norm/nonfinite_fraction",
    "grad_norm_clipped/total",
    "weight_norm/rnn.weight_hh_l0",
    "update_ratio/rnn.weight_hh_l0",
    "clip/threshold",
    "clip/coefficient",
    "clip/fraction",
    "rollback/skips",
    "rollback/rollbacks",
    "rollback/amp_overflows",
    "lr_backoff/scale",
    "lr_backoff/lr/0",
    "init/loss",
}


@pytest.mark.filterwarnings("ignore")
def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--max_steps", "100", "--logdir", "runs"])
    printed = capsys.readouterr().out
    assert "The bare run failed after 3 steps; the guarded one ended at a loss of 2." in printed
    assert "tensorboard --logdir runs" in printed
    events = EventAccumulator("runs/guarded", size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) >= TAGS
    assert "grad_norm/layers" in events.Tags()["images"]
    norms = [point.value for point in events.Scalars("grad_norm/total")]
    clipped = [point.value for point in events.Scalars("grad_norm_clipped/total")]
    skips = events.Scalars("rollback/skips")[-1].value
    assert len(norms) == len(clipped) == 100 - skips, "the text, and what is skipped, differ between Pythons"
    assert max(clipped) < 10
    bare = EventAccumulator("runs/bare")
    bare.Reload()
    assert "incidents/text_summary" in bare.Tags()["tensors"]
    incidents = [json.loads(line) for line in Path("runs/bare/incidents.jsonl").read_text().splitlines()]
    assert [incident["kind"] for incident in incidents] == ["exploding_gradient", "nonfinite_gradient"]
    assert (incidents[0]["where"], incidents[0]["cause"]) == (["rnn"], "through_time")


def test_summary_of_healthy_and_failed_runs() -> None:
    healthy = Run("bare", [1.0] * 40, {}, 0.5, 1.0)
    failed = Run("bare", [1.0] * 3 + [math.nan] * 37, {"nonfinite_gradient": 1}, 0.5, 1.0)
    assert "The bare run ended at a loss of 1.00;" in summary([healthy, healthy], Path("x"))
    text = summary([failed, healthy], Path("x"))
    assert "failed after 3 steps" in text
    assert "3 of 40" in text
    assert "1 nonfinite_gradient" in text
