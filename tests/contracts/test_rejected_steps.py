"""A finite step that a callback of the user's rejects: skipped, published as that, and with its name."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException

from lightning_gradguard import Measurement, NaNRollback, Step, StepCallback
from tests.tasks import Classifier, Listener, batches, fit, poisoned, same, weights


class Veto(StepCallback):
    """Rejects the sixth step."""

    def __init__(self, defers_check: bool = False) -> None:
        self.defers_check = defers_check
        self.steps: list[Step] = []

    def check_step(self, trainer: pl.Trainer, measurement: Measurement) -> Any:
        return "skip" if measurement.loss > 10 else "accept"

    def on_step(self, trainer: pl.Trainer, pl_module: Any, step: Step) -> None:
        self.steps.append(step)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_a_rejected_step(check: Any, first: bool, stop: bool) -> None:
    """It is no nonfinite one, and no reason to stop at the first of those."""
    data = poisoned(batches(12), spikes=[6])
    module, expected, listener = Classifier(), Classifier(), Listener()
    rollback = NaNRollback(check=check, on_nonfinite="stop" if stop else "skip")
    veto = Veto(defers_check=check == "deferred")
    fit(module, data, [listener, *((veto, rollback) if first else (rollback, veto))])
    fit(expected, data[:6] + data[7 + (check == "deferred") :])
    (incident,) = listener.found
    assert (incident.kind, incident.step, incident.action) == ("rejected_step", 6, "skipped")
    assert incident.where == ("Veto",)
    assert incident.describe().startswith("Rejected step at step 6 (epoch 0, batch 6): Veto; total norm ")
    assert same(weights(module), weights(expected))


def test_a_nonfinite_step_is_not_a_rejected_one() -> None:
    listener = Listener()
    fit(Classifier(), poisoned(batches(12), nan=[6]), [Veto(), NaNRollback(), listener])
    assert [incident.kind for incident in listener.found] == ["nonfinite_loss"]


def test_a_veto_that_nobody_carries_out() -> None:
    with pytest.raises(MisconfigurationException, match="Veto.check_step may reject .* add NaNRollback"):
        fit(Classifier(), batches(3), [Veto()])
