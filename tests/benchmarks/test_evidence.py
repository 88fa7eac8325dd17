"""Tables of the evidence: a guard is judged on the seeds that it shares with the bare program."""

from __future__ import annotations

import pytest

from benchmarks.evidence.healthy import SCENARIOS
from benchmarks.evidence.runs import Record
from benchmarks.evidence.tables import is_harmed

SCENARIO = next(scenario for scenario in SCENARIOS if scenario.higher)


def _records(guard: str, scores: dict[int, float | None]) -> list[Record]:
    return [
        Record(SCENARIO.name, guard, seed, score, None, 0, 0, 0, 1.0, [], "", 0.0)
        for seed, score in scores.items()
    ]


@pytest.mark.parametrize(
    ("bare", "guarded", "expected"),
    [
        ({0: 0.9, 1: 0.9}, {0: 0.89, 1: 0.89}, False),  # within 2 %
        ({0: 0.9, 1: 0.9}, {0: 0.85, 1: 0.85}, True),
        ({0: 0.9, 1: 0.6}, {0: 0.8, 1: 0.5}, False),  # within the noise of seeds
        ({0: 0.9, 1: 0.6}, {0: 0.8}, False),  # of all bare seeds, also where the guard has one
        ({0: 0.9, 1: 0.6}, {1: 0.6}, False),  # compared with its own seed
        ({0: 0.9, 1: 0.88}, {0: 0.8}, True),
        ({0: 0.9, 1: 0.9}, {0: None, 1: 0.9}, True),  # ends nonfinite
    ],
)
def test_harm_is_beyond_the_noise_of_seeds(
    bare: dict[int, float | None], guarded: dict[int, float | None], expected: bool
) -> None:
    assert is_harmed(SCENARIO, _records("none", bare), _records("suite", guarded)) is expected
