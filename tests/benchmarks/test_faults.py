"""The fault campaign distinguishes runs that survive from those that do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.faults import baselines, campaign, kills
from benchmarks.faults.classes import FAULTS, TIMES
from benchmarks.faults.injection import OF_DATA, corrupted, flip
from benchmarks.faults.runs import Case, Outcome, play, quietly
from benchmarks.faults.tasks import batches
from docs.generators.reliability import write

NAN = Case("NaN input", "steady", "MLP", "SGD", "32-true", "exact", seed=0)


def outcome_of(case: Case) -> Outcome:
    outcome: Outcome = quietly(play, case)
    return outcome


@pytest.mark.filterwarnings("ignore")
def test_case_survives_with_the_suite_and_fails_without() -> None:
    outcome = outcome_of(NAN)
    assert (outcome.survived, outcome.equal, outcome.named, outcome.lost) == (True, True, True, 1)
    assert Outcome.from_json(outcome.to_json()) == outcome
    bare = quietly(baselines.answer, "Lightning alone", NAN)
    assert not bare.survived
    assert not bare.stopped


@pytest.mark.filterwarnings("ignore")
def test_outcomes_not_as_promised_are_reported() -> None:
    outcome = outcome_of(replace(NAN, kind="flip in a weight", check="deferred"))
    assert not campaign.is_wrong(outcome)
    for broken in ({"survived": False}, {"equal": False}, {"causes": ["loss"]}, {"ranks_equal": False}):
        assert campaign.is_wrong(replace(outcome, **broken))


@pytest.mark.filterwarnings("ignore")
def test_page_is_written_from_the_outcomes(tmp_path: Path) -> None:
    outcome = outcome_of(NAN)
    lost = replace(outcome, survived=False)
    answers = {"Lightning alone": [(NAN.kind, baselines.Answer(False, False, 0.1))]}
    index = replace(outcome, case=replace(outcome.case, kind="index"))
    epsilon = replace(outcome, case=replace(outcome.case, kind="epsilon in float16"))
    quiet = [(("MLP", 0, "SGD"), {"loss_spike": 2})]
    single = [outcome, index, lost, epsilon]
    write(tmp_path / "page.md", single, [outcome], answers, quiet, "| a table |", "Nothing was torn.")
    page = (tmp_path / "page.md").read_text()
    assert "| NaN input | 2 | 1 of 2 (50.0 %) | 2 of 2 (100.0 %) | 2 of 2 (100.0 %) |" in page
    assert "## 2 faults in one process" in page
    assert "| index | 1 | 1 of 1 (100.0 %) |" in page
    assert "| epsilon in float16 | 1 | not survivable |" in page
    assert "incidents: 2 loss_spike" in page
    assert "Nothing was torn." in page


def test_every_kind_of_fault_is_injected_at_every_time() -> None:
    batch = batches(1)[0]
    for kind in OF_DATA:
        worse = corrupted(batch, kind)
        assert worse.keys() != batch.keys() or any(not torch.equal(worse[k], batch[k]) for k in batch), kind
    weight = torch.tensor([0.5, 1.0])
    flip(weight, 0)
    assert float(weight[0]) > 1e37
    wanted = list(campaign.cases())
    assert len(wanted) >= 1000
    assert {case.time for case in wanted} == set(TIMES)
    survivable = {kind for kind, fault in FAULTS.items() if fault.survivable}
    assert survivable <= {case.kind for case in wanted}


def test_torn_files_are_detected(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"half of it")
    (tmp_path / "b.jsonl").write_text('{"kind": 1}\n{"ki')
    assert len(kills.torn(tmp_path)) == 2
