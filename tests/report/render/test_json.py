"""The JSON report follows its schema."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest

from lightning_gradguard import default_callbacks
from tests.report.runs import SCHEMA, printed, train, write_events
from tests.tasks import Classifier, clusters, poisoned

NAN = math.nan


def test_json_follows_its_schema(capsys: pytest.CaptureFixture[str]) -> None:
    train(Classifier(), poisoned(clusters(40), nan=[30]), default_callbacks())
    write_events("bare", {"grad_norm/total": [1.0, 1e9, math.inf, NAN], "train_loss": [1.0, 2.0, NAN, NAN]})
    content = json.loads(
        printed(capsys, "run", "bare", "--json"),
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    validator.validate(content)
    run, bare = content["runs"]
    assert (run["status"], bare["status"]) == ("recovered", "failed")
    assert bare["final_loss"] == "nan"
    assert run["interventions"]["skips"] == 1
    # the schema rejects fields that it does not describe
    content["runs"][0]["surprise"] = 1
    assert not validator.is_valid(content)


def test_json_to_a_file_and_before_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    write_events("run", {"train_loss": [1.0] * 5})
    assert "run: too little was logged for a verdict" in printed(capsys, "run", "--json", "report.json")
    written = json.loads(Path("report.json").read_text())
    assert json.loads(printed(capsys, "--json", "run")) == written
