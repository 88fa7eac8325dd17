"""Counts of a run, and the outcome of its running batch."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gradguard.core import tags
from lightning_gradguard.core.recovery import Decision
from lightning_gradguard.runtime.logging.metrics import MetricBuffer
from lightning_gradguard.runtime.steps.trainer_state import TrainerState


@dataclass
class Counts:
    """Counts over the whole run, resumed parts included.

    Args:
        since: Step from which on they are counted: above 0 where a run was resumed without these counts;
            `None` before the first fit.
        skips: Steps skipped.
        amp_overflows: Steps that the GradScaler skipped.
        overflows_at_floor: The last ones of these in a row at a loss scale of 1 or less.
        has_stopped: True if this fit was stopped because a budget was used up.
        has_ended: True after a fit.
    """

    since: int | None = None
    skips: int = 0
    amp_overflows: int = 0
    overflows_at_floor: int = 0
    has_stopped: bool = False
    has_ended: bool = False

    def by_tag(self, rollbacks: int) -> dict[str, float]:
        """Returns the counts as they are logged."""
        counts = {tags.SKIPS: self.skips, tags.ROLLBACKS: rollbacks, tags.AMP_OVERFLOWS: self.amp_overflows}
        return {tag: float(count) for tag, count in counts.items()}

    def log(self, metrics: MetricBuffer, rollbacks: int) -> None:
        """Adds the counts to the metrics of the batch, and publishes two of them to `callback_metrics`."""
        counts = self.by_tag(rollbacks)
        metrics.add_scalars(counts)
        for tag in (tags.SKIPS, tags.ROLLBACKS):
            metrics.publish_total(tag, counts[tag])


@dataclass(slots=True)
class BatchOutcome:
    """The outcome of the running batch so far."""

    committed_step: int | None = None
    loss: float | None = None
    has_diverged: bool = False
    has_skipped: bool = False
    before: TrainerState | None = None
    decision: Decision = "continue"

    def decide(self, decision: Decision) -> None:
        """Takes a decision, unless a graver one was made."""
        if self.decision != "stop" and decision != "continue":
            self.decision = decision
