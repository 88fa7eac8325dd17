"""The demo tells the truth: the bare run dies, the guarded one learns, TensorBoard has it all."""

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
def test_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--max_steps", "100", "--logdir", "runs"])
    printed = capsys.readouterr().out
    assert "The bare run died after 3 steps; the guarded one ended at a loss of 2." in printed
    assert "tensorboard --logdir runs" in printed
    events = EventAccumulator("runs/guarded", size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) >= TAGS
    assert "grad_norm/layers" in events.Tags()["images"]
    norms = [point.value for point in events.Scalars("grad_norm/total")]
    clipped = [point.value for point in events.Scalars("grad_norm_clipped/total")]
    assert len(norms) == len(clipped) == 100
    assert max(norms) > 1e3
    assert max(clipped) <= 1.0 + 1e-5
    bare = EventAccumulator("runs/bare")
    bare.Reload()
    assert "incidents/text_summary" in bare.Tags()["tensors"]
    told = [json.loads(line) for line in Path("runs/bare/incidents.jsonl").read_text().splitlines()]
    assert [incident["kind"] for incident in told] == ["exploding_gradient", "nonfinite_gradient"]
    assert told[0]["where"][0] == "rnn.weight_hh_l0"


def test_a_bare_run_that_survived_is_not_called_dead() -> None:
    alive = Run("bare", [1.0] * 40, {}, 0.5, 1.0)
    dead = Run("bare", [1.0] * 3 + [math.nan] * 37, {"nonfinite_gradient": 1}, 0.5, 1.0)
    assert "survived with a loss of 1.00" in summary([alive, alive], Path("x"))
    text = summary([dead, alive], Path("x"))
    assert "died after 3 steps" in text
    assert "3 of 40" in text
    assert "1 nonfinite_gradient" in text
