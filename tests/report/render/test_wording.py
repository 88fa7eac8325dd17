"""Sentences about the end of a run and its interventions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.report.render.json import to_json
from lightning_gradguard.report.render.wording import outcome_sentence
from tests.report.runs import SCHEMA, report_of, write_events

NAN = math.nan


def test_largest_norm_of_all_steps_is_beside_that_of_logged_steps() -> None:
    norms = [0.5, 0.564, 0.4]
    found = report_of(write_events("run", {"grad_norm/total": norms, "summary/largest_norm": [1.16]}))
    assert "largest gradient norm 1.16 (of the logged steps: 0.564 at step 1)" in outcome_sentence(found)
    assert [layer.name for layer in found.layers] == []
    same = report_of(
        write_events("same", {"grad_norm/total": norms, "summary/largest_logged_norm": [0.5640001]})
    )
    assert outcome_sentence(same) == "3 steps, largest gradient norm 0.564 at step 1"


def test_failure_before_the_first_logged_step() -> None:
    Path("run").mkdir()
    with SummaryWriter("run") as writer:
        for step in (49, 99, 149):
            writer.add_scalar("train_loss", NAN, step)
    found = report_of("run")
    assert outcome_sentence(found) == "failed within the first 49 of 150 steps, which were not logged"
    jsonschema.validate(json.loads(to_json([found])), SCHEMA)
