"""The decision after each step: continue, roll back, or stop."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Literal

from lightning_gradguard.core.detectors import Anomaly, OptimizerHealth
from lightning_gradguard.core.detectors.optimizer_health import EARLY_RISE

#: Steps over which the share of skipped ones is taken.
OUTCOMES = 100
#: Good steps since the last rollback after which one rollback is refunded to the budget.
REFUND_AFTER_STEPS = 500
#: Distance of the weights from the last trusted snapshot, in units of their norm there, from which on a high
#: loss is a divergence. Of divergences in docs/evidence_rates.md the smallest has 2.9; of new data, 0.35 is
#: the most.
MOVED = 1.0
#: The same where the loss is not far above everything seen, but has made no progress since the start, by
#: whether it is worse than there, or has lost most of what it had made (0.76 is the least at rates too high).
MOVED_WITHOUT_PROGRESS = {"worse_than_first": 2.5, "no_progress": 10.0, "lost_progress": 0.7}
#: The same without progress where updates are known to be too large, or clipping has set the length of this
#: share of the last steps: the rate is too large for all of them.
MOVED_IF_CLIPPED, MOSTLY_CLIPPED = 0.3, 0.8
#: By how much, and by which share of it, a step must add to that distance after the loss has risen in the
#: first ones; `MOVED` is enough after so many. RMSprop and Adagrad make one large step, the first, and
#: recover; so does a run after bad batches, whose next steps are small (docs/evidence_rates.md).
STILL_MOVES, MOVED_SHARE, FIRST_UPDATES = 0.05, 0.1, 5
#: Steps from one measurement of that distance to the next.
DISTANCE_INTERVAL = 10
#: Rollbacks that cannot help, before the run is stopped: no step was good yet, or eps is at fault.
USELESS_ROLLBACKS = 2
_SPIKING = attrgetter("spiking")

Decision = Literal["continue", "roll_back", "stop"]


class RecoveryPolicy:
    """Decides from the outcomes of steps, within a budget for each decision.

    A skipped step costs one batch. `patience` of them in a row, a divergence or a collapse mean that the
    weights themselves are bad. High losses alone do not: data may be new, or heavy-tailed. The same calls
    lead to the same decisions on every rank.

    Args:
        patience: Consecutive skipped steps (of one optimizer) after which the run is rolled back.
        max_rollbacks: Number of rollbacks before the run is stopped; 500 good steps without one refund one.
        max_skip_fraction: Share of the last 100 steps that may be skipped before the run is stopped.
        stops_at_first: True to stop the run at the first skipped step.

    Attributes:
        rollbacks: Number of rollbacks so far.
        stopped_at_first: True if the run stops at its first nonfinite step, and not for want of a budget.
        has_good_step: True if any step was not skipped, in this run or the one that it resumes.
        risen_loss: The loss by which the last step is a divergence; infinite if it is none, or no loss has
            risen.
        is_spiking: True if the last step of any optimizer was part of a spike, and so not a good step.
        is_adversarial: True if several optimizers may train networks against each other, whose losses rise
            and fall in healthy training. Set before the first step.
        compares_batches: True if a batch whose loss has risen is run with the earlier weights ahead of a
            rollback; only then is progress found to be lost. Set before the first step, too.
        has_large_updates: True if updates are known to have been too large since the last rollback.

    Example:
        >>> recovery = RecoveryPolicy(patience=2, max_rollbacks=1, max_skip_fraction=0.5)
        >>> recovery.on_skip(0), recovery.on_skip(0)
        ('continue', 'roll_back')
        >>> recovery.on_rollback()
        >>> recovery.on_skip(0), recovery.on_skip(0)
        ('continue', 'stop')
    """

    def __init__(
        self, patience: int, max_rollbacks: int, max_skip_fraction: float, stops_at_first: bool = False
    ) -> None:
        self._stops_at_first = stops_at_first
        self.stopped_at_first = False
        self._patience = patience
        self._max_rollbacks = max_rollbacks
        self._max_skip_fraction = max_skip_fraction
        self.rollbacks = 0
        self.has_good_step = False
        self.risen_loss = math.inf
        self._stop_cause = ""
        self.is_spiking = False
        self.is_adversarial = self.compares_batches = False
        self.has_large_updates = False
        self._spent = 0
        self._good_steps = 0
        self._skipped_in_a_row: dict[int, int] = {}
        self._outcomes: deque[bool] = deque(maxlen=OUTCOMES)
        self._health: dict[int, OptimizerHealth] = {}
        self._asked_ago = DISTANCE_INTERVAL
        self._moved_early: dict[int, float] = {}

    def on_skip(self, index: int, is_nonfinite: bool = True) -> Decision:
        """Counts a skipped step of optimizer `index`; a finite one was rejected by a callback."""
        self.stopped_at_first = self._stops_at_first and is_nonfinite
        self._skipped_in_a_row[index] = self._skipped_in_a_row.get(index, 0) + 1
        self._outcomes.append(True)
        self.risen_loss = math.inf
        if self.skips_too_often or self.stopped_at_first:
            return "stop"
        return self.escalate() if self._skipped_in_a_row[index] >= self._patience else "continue"

    def on_good_step(
        self,
        index: int,
        loss: float,
        total_norm: float,
        is_collapsed: bool = False,
        *,
        distance: Callable[[], float] | None = None,
        clipped: float = 0.0,
    ) -> tuple[Decision, Anomaly]:
        """Counts a step of optimizer `index` whose loss and gradient norm are finite.

        Its gradients are collapsed if no weight matrix has one while another parameter has. A divergence is
        suspected by the numbers, and decided by the weights.

        Args:
            index: Of the optimizer.
            loss: Finite.
            total_norm: Finite.
            is_collapsed: See above.
            distance: Measures how far the weights are from the last trusted snapshot, in units of their norm
                there; called at most once in ten steps after the first 22. Without it no divergence is found.
            clipped: Share of the last steps whose length clipping has set.

        Returns:
            The decision, and the anomaly that begins with this step.
        """
        self._skipped_in_a_row[index] = 0
        self.has_good_step = True
        self._outcomes.append(False)
        self._good_steps += 1
        if self._good_steps % REFUND_AFTER_STEPS == 0:
            self._spent = max(self._spent - 1, 0)
        if index not in self._health:
            self._health[index] = OptimizerHealth(self.is_adversarial)
        anomaly = self._health[index].update(loss, total_norm, is_collapsed)
        if anomaly == "lost_progress" and not self.compares_batches:
            anomaly = ""
        self.is_spiking = any(map(_SPIKING, self._health.values()))
        self._asked_ago += 1
        self.risen_loss = math.inf
        is_early, before = anomaly == "early_rise", self._moved_early.pop(index, math.inf)
        if distance is not None and (is_early or before < math.inf):
            moved, health = distance(), self._health[index]
            still_moves = moved - before >= max(STILL_MOVES, MOVED_SHARE * before)
            if still_moves or (is_early and moved >= MOVED and health.n_steps > FIRST_UPDATES):
                self.risen_loss = health.highest_recent_loss
                return self.escalate(), "divergence"
            if is_early and moved >= EARLY_RISE / health.early_rise:
                self._moved_early[index] = moved
        if is_early:
            return "continue", ""
        if anomaly in ("divergence", "lasting_spike", *MOVED_WITHOUT_PROGRESS):
            if self._asked_ago < DISTANCE_INTERVAL:
                return "continue", ""
            self._asked_ago = 0
            least, has_risen = MOVED_WITHOUT_PROGRESS.get(anomaly, MOVED), anomaly != "no_progress"
            if not has_risen and (clipped >= MOSTLY_CLIPPED or self.has_large_updates):
                least = MOVED_IF_CLIPPED
            if distance is None or not distance() >= least:
                return "continue", ""
            self.risen_loss = loss if has_risen else math.inf
            return self.escalate(), "" if anomaly == "lasting_spike" else "divergence"  # a spike was reported
        return (self.escalate() if anomaly == "gradient_collapse" else "continue"), anomaly

    def accept_rise(self, index: int) -> None:
        """Called if the data have raised the loss of optimizer `index`: later ones are compared with it."""
        if index in self._health:
            self._health[index].accept_rise()

    def escalate(self) -> Decision:
        """Returns the decision for bad weights: roll back, or stop when the budget is used up."""
        is_useless = self.is_useless and not self.has_good_step
        return "roll_back" if self._spent < self._max_rollbacks and not is_useless else "stop"

    def stop_for(self, reason: str) -> Decision:
        """Returns the decision to stop for a reason that is no budget."""
        self._stop_cause = reason
        return "stop"

    @property
    def is_useless(self) -> bool:
        """True if as many rollbacks took place as are made where they cannot help."""
        return self._spent >= USELESS_ROLLBACKS

    @property
    def skips_too_often(self) -> bool:
        """True if more of the last steps were skipped than are allowed."""
        return len(self._outcomes) == OUTCOMES and (sum(self._outcomes) > self._max_skip_fraction * OUTCOMES)

    @property
    def stop_reason(self) -> str:
        """Description of the budget that is used up, or of the wish to stop at once."""
        if self.stopped_at_first:
            return "the loss, or a gradient, is nonfinite (on_nonfinite='stop')"
        if self._stop_cause:
            return self._stop_cause
        if not self.has_good_step:
            return f"no step was ever finite, and {self.rollbacks} rollbacks did not change that"
        if self.skips_too_often:
            return (
                f"more than {self._max_skip_fraction:.0%} of the last {OUTCOMES} steps were skipped "
                f"(max_skip_fraction={self._max_skip_fraction:g})"
            )
        limit = f"max_rollbacks={self._max_rollbacks}"
        return f"after {self._spent} rollbacks another one is necessary ({limit})"

    def on_rollback(self) -> None:
        """Counts a rollback."""
        self.rollbacks += 1
        self._spent += 1
        self._good_steps = 0
        self._skipped_in_a_row.clear()
        self._moved_early.clear()
        for health in self._health.values():
            health.on_rollback()
        self.is_spiking = self.has_large_updates = False

    def reset_budgets(self) -> None:
        """Starts counting again, as before any intervention."""
        self._stop_cause = ""
        self._spent = 0
        self._skipped_in_a_row.clear()
        self._outcomes.clear()

    def detector_state(self) -> dict[int, Any]:
        """Returns the state that depends on the weights and is restored with them."""
        return {index: health.state_dict() for index, health in self._health.items()}

    def load_detector_state(self, detector_state: dict[int, Any]) -> None:
        """Restores a result of `detector_state`."""
        self._health = {index: OptimizerHealth(self.is_adversarial) for index in detector_state}
        for index, state in detector_state.items():
            self._health[index].load_state_dict(state)
        self.is_spiking = any(map(_SPIKING, self._health.values()))

    def state_dict(self) -> dict[str, Any]:
        """Returns everything with which a resumed run decides alike."""
        return {
            "rollbacks": self.rollbacks,
            "has_good_step": self.has_good_step,
            "spent": self._spent,
            "good_steps": self._good_steps,
            "skipped_in_a_row": dict(self._skipped_in_a_row),
            "outcomes": list(self._outcomes),
            "asked_ago": self._asked_ago,
            "moved_early": dict(self._moved_early),
            "has_large_updates": self.has_large_updates,
            "windows": self.detector_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state."""
        self.rollbacks = state_dict["rollbacks"]
        self.has_good_step = state_dict.get("has_good_step", True)
        self._spent = state_dict["spent"]
        self._good_steps = state_dict["good_steps"]
        self._skipped_in_a_row = dict(state_dict["skipped_in_a_row"])
        self._outcomes = deque(state_dict["outcomes"], maxlen=OUTCOMES)
        self._asked_ago = state_dict.get("asked_ago", DISTANCE_INTERVAL)  # version 0.5 has none of these
        self._moved_early = dict(state_dict.get("moved_early", {}))
        self.has_large_updates = state_dict.get("has_large_updates", False)
        self.load_detector_state(state_dict["windows"])
