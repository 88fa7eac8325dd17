"""A symptom of layers is one if it lasts: over steps, at checks in a row, and to the end of the run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lightning_gradguard.report.analysis.lasting_symptoms import lasting_symptoms
from lightning_gradguard.report.analysis.outcome import RunSymptom, outcome_of
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog, Series

STEPS = range(0, 300, 5)
DEEP = [1e-6, 1e-4, 1e-2, 1.0, 1.0]


def symptoms(is_shown: Callable[[int], bool], *, ratio: float = 1e-3) -> list[RunSymptom]:
    """Symptoms of five layers whose gradients vanish at the steps that show it."""
    names = [f"net.{i}.weight" for i in range(5)]

    def logged(of: Callable[[int, int], float]) -> dict[str, Series]:
        return {name: Series(STEPS, [of(i, step) for step in STEPS]) for i, name in enumerate(names)}

    gradients = GradientLog(
        layers=logged(lambda i, step: DEEP[i] if is_shown(step) else 1.0),
        weights=logged(lambda i, step: 1.0),
        ratios=logged(lambda i, step: ratio if i == 1 and is_shown(step) else 1e-3),
    )
    return list(lasting_symptoms(gradients, outcome_of(RunLog(gradients=[gradients]))))


def test_vanishing_gradients_are_told_once_with_their_first_step() -> None:
    (found,) = symptoms(lambda step: step >= 100)
    assert (found.kind, found.where[0], found.since) == ("vanishing_gradient", "net.0.weight", 100)
    assert found.value == pytest.approx(6, abs=1e-6)
    assert found.evidence.startswith("gradients shrink by 6.0 decades")


def test_layers_that_stand_still_are_named() -> None:
    found = {symptom.kind: symptom for symptom in symptoms(lambda step: True, ratio=1e-9)}
    assert found["weight_stagnation"].where == ("net.1.weight",)
    assert "below 1e-07 of the weight norm from step 0 to the end" in found["weight_stagnation"].evidence


@pytest.mark.parametrize(
    "is_shown",
    [lambda step: step % 10 == 0, lambda step: step < 150, lambda step: step == 295, lambda step: False],
    ids=["intermittent", "passed", "at the last step", "healthy"],
)
def test_what_does_not_last_is_no_symptom(is_shown: Callable[[int], bool]) -> None:
    assert symptoms(is_shown, ratio=1e-9) == []
