"""Publishes the incidents of skipped steps and anomalies, with the facts that a replay adds."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_gradguard.core.forensics import Origin
from lightning_gradguard.core.incidents import IncidentKind
from lightning_gradguard.core.norms import DISAGREEMENT
from lightning_gradguard.core.remedies import Present, advice
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.incidents.invalid_batches import is_check_of_values
from lightning_gradguard.runtime.incidents.investigation import Result, scan_batches
from lightning_gradguard.runtime.incidents.journal import incident_now, publish, run_folder
from lightning_gradguard.runtime.incidents.present import present_in
from lightning_gradguard.runtime.incidents.replay import SeenBatch
from lightning_gradguard.runtime.rollback.fit_context import FitContext
from lightning_gradguard.runtime.steps.transaction import StepTransaction

#: Of a divergence whose loss has not risen.
_NO_PROGRESS = {
    "detail": "The loss is no lower than at the start, though the weights were moved far.",
    "advice": "Lower the learning rate, or warm it up for longer.",
}
#: Skipped steps that no batch explains.
_UNEXAMINED = ("lost_batch", "rejected_step", "unequal_learning_rates")


class IncidentReporter:
    """Publishes the incidents of one fit.

    Attributes:
        step: `trainer.global_step` at the start of the running batch.
        batch_idx: Index of the running batch in its epoch, also in an epoch that was resumed.
    """

    def __init__(self, fit: FitContext) -> None:
        self._fit = fit
        self.step = self.batch_idx = 0

    def publish(self, kind: str, *, ends_run: bool = False, **facts: Any) -> None:
        """Publishes an incident of the running batch; where it ends the run, an error has the advice."""
        now = {"step": self.step, "batch_idx": self.batch_idx}
        incident = incident_now(self._fit.trainer, kind, **{**now, **facts})
        publish(self._fit.trainer, self._fit.pl_module, incident, ends_run=ends_run)

    def report_anomaly(self, kind: str, loss: float, batches: Sequence[SeenBatch]) -> None:
        """Publishes what is wrong with committed steps, with its cause if weights or batches reveal it."""
        origin = self._fit.investigation.scan_weights(self._fit.trainer, self._fit.snapshots.newest())
        if origin is None and kind == "loss_spike":
            origin = scan_batches(self._fit.trainer, batches)
        facts: dict[str, Any] = {"value": loss} if math.isfinite(loss) else {**_NO_PROGRESS}
        if origin is not None:
            facts |= origin_facts(origin, present_in(self._fit.trainer))
        self.publish(kind, **facts)

    def report_exception(self, error: Exception, result: Result, last_good: Path | None) -> None:
        """Publishes that a step has raised, with what is known of its batch."""
        kind = "exception_in_step"
        present = present_in(self._fit.trainer)
        facts = {**origin_facts(result.origin, present), "dossier": result.dossier}
        is_of_batch = self._fit.policy.has_good_step or result.origin.cause == "bad_input"
        can_skip = self._fit.pl_module.automatic_optimization and is_check_of_values(error) and is_of_batch
        sentences = [facts.get("advice", ""), advice(kind, present=present) * can_skip]
        sentences += [] if last_good is None else [f"Training can be resumed from {last_good}."]
        facts["advice"] = " ".join(filter(None, sentences))
        if type(error).__name__ not in facts["detail"]:
            message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            facts["detail"] += f" The step raised {message}"
        self.publish(kind, **facts)

    def report_skip(
        self, transaction: StepTransaction, *, examine: bool = True, ends_run: bool = False
    ) -> None:
        """Publishes a skipped step, with its cause if a replay, in which all ranks take part, is possible."""
        has_scaler = lightning_api.gradient_scaler(self._fit.trainer) is not None
        kind, facts = describe_skip(transaction, has_scaler=has_scaler)
        window = transaction.window
        if examine and window.batches and kind not in _UNEXAMINED:
            result = self._fit.investigation.examine(
                self._fit.trainer,
                self._fit.pl_module,
                window.step,
                window.batches,
                self._fit.snapshots.newest(),
                run_folder(self._fit.trainer),
                weights_are_nonfinite=kind == "nonfinite_weights",
            )
            # the step may write frozen weights each time that it runs
            self._fit.side_effects.buffers.restore()
            present = present_in(self._fit.trainer)
            if result is None:
                facts.update(self._fit.investigation.facts_unexamined(present))
            else:
                found = origin_facts(result.origin, present, facts.get("where", ()))
                if result.origin.cause == "unknown" and result.origin.phase:  # the step raised
                    found["advice"] = result.origin.detail
                facts.update(found, dossier=result.dossier)
        self.publish(kind, ends_run=ends_run, **facts)


def describe_skip(transaction: StepTransaction, *, has_scaler: bool) -> tuple[IncidentKind, dict[str, Any]]:
    """Returns the kind of incident that a skipped step is, and its facts."""
    measurement = transaction.measurement
    assert measurement is not None
    kind = measurement.incident_kind(has_scaler=has_scaler)
    facts: dict[str, Any] = {
        "step": transaction.window.step,
        "batch_idx": transaction.batch_idx,
        "action": "skipped",
    }
    if kind in ("rejected_step", "corrupted_gradient"):
        facts["value"] = measurement.total_norm
    if kind == "unequal_learning_rates":
        facts["cause"] = "update_too_large"
        facts["detail"] = (
            f"The learning rate of one rank is {DISAGREEMENT:,.0f} times that of another, or more."
        )
    if kind == "rejected_step":
        facts["where"] = measurement.rejected_by
    if kind == "nonfinite_gradient":
        assert transaction.norms is not None
        nonfinite = (~torch.isfinite(transaction.norms)).tolist()
        facts["where"] = tuple(n for n, is_it in zip(transaction.names, nonfinite, strict=True) if is_it)
        facts["value"] = len(facts["where"]) / max(len(nonfinite), 1)
    return kind, facts


def origin_facts(origin: Origin, present: Collection[Present], where: tuple[str, ...] = ()) -> dict[str, Any]:
    """Facts of an incident from the origin that a replay found; without advice if its cause is unknown."""
    facts = {
        "cause": origin.cause,
        "detail": origin.detail,
        # parameters whose gradients are nonfinite are no place of a fault that is known
        "where": where if origin.cause in ("transient", "unknown") else origin.where,
        "location": origin.location,
        "samples": origin.samples,
    }
    remedy = origin.remedy(present)
    return {**facts, "advice": remedy} if remedy else facts
