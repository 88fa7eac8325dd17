"""The decision after each step: continue, roll back, or stop."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

from lightning_gradguard.core.detectors import Anomaly, OptimizerHealth

#: Steps after a rollback for a spike in which another spike is ignored: enough for the detectors' window to
#: follow a level that has changed permanently.
SPIKE_COOLDOWN = 256
#: Steps over which the share of skipped ones is taken.
OUTCOMES = 100
#: Good steps since the last rollback after which one rollback is refunded to the budget.
REFUND_AFTER_STEPS = 500
#: Steps after a rollback within which a spike or a divergence is a recurrence of its reason.
RECURRENCE_STEPS = 30
#: Factor by which each rollback for a divergence raises the bound of the next: a level that has changed
#: permanently does not use up the budget.
BOUND_GROWTH = 3.0

#: Rollbacks that cannot help, before the run is stopped: no step was good yet, or eps is at fault.
USELESS_ROLLBACKS = 2

Decision = Literal["continue", "roll_back", "stop"]


class RecoveryPolicy:
    """Decides from the outcomes of steps, within a budget for each decision.

    A skipped step costs one batch. `patience` of them in a row, a spike that does not clear, a divergence or
    a collapse mean that the weights themselves are bad. The same calls lead to the same decisions on every
    rank.

    Args:
        patience: Consecutive skipped steps (of one optimizer) after which the run is rolled back.
        max_rollbacks: Number of rollbacks before the run is stopped; 500 good steps without one refund one.
        max_skip_fraction: Share of the last 100 steps that may be skipped before the run is stopped.
        stops_at_first: True to stop the run at the first skipped step.

    Attributes:
        rollbacks: Number of rollbacks so far.
        is_stopped_at_first: True if the run stops at its first nonfinite step, and not for want of a budget.
        has_good_step: True if any step was not skipped, in this run or the one that it resumes.
        is_adversarial: True if several optimizers may train networks against each other, whose losses rise
            and fall in healthy training. Set before the first step.

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
        self.stops_at_first = stops_at_first
        self.is_stopped_at_first = False
        self._patience = patience
        self._max_rollbacks = max_rollbacks
        self._max_skip_fraction = max_skip_fraction
        self.rollbacks = 0
        self.has_good_step = False
        self._given_up = ""
        self.is_adversarial = False
        self._spent = 0
        self._is_last_counted = False
        self._good_steps = 0
        self._skipped_in_a_row: dict[int, int] = {}
        self._outcomes: deque[bool] = deque(maxlen=OUTCOMES)
        self._spike_cooldown = 0
        self._health: dict[int, OptimizerHealth] = {}
        self._divergences: dict[int, int] = {}

    def on_skip(self, index: int, is_nonfinite: bool = True) -> Decision:
        """Counts a skipped step of optimizer `index`; a finite one was rejected by a callback."""
        self.is_stopped_at_first = self.stops_at_first and is_nonfinite
        self._skipped_in_a_row[index] = self._skipped_in_a_row.get(index, 0) + 1
        self._outcomes.append(True)
        if self.skips_too_often or self.is_stopped_at_first:
            return "stop"
        return self.escalate() if self._skipped_in_a_row[index] >= self._patience else "continue"

    def on_good_step(
        self, index: int, loss: float, total_norm: float, is_collapsed: bool = False
    ) -> tuple[Decision, Anomaly]:
        """Counts a step of optimizer `index` whose loss and gradient norm are finite.

        Its gradients are collapsed if no weight matrix has one while another parameter has.

        Returns:
            The decision, and the anomaly that begins with this step.
        """
        self._skipped_in_a_row[index] = 0
        self.has_good_step = True
        self._outcomes.append(False)
        self._good_steps += 1
        if self._good_steps % REFUND_AFTER_STEPS == 0:
            self._spent = max(self._spent - 1, 0)
        self._spike_cooldown = max(self._spike_cooldown - 1, 0)
        if index not in self._health:
            self._health[index] = OptimizerHealth(self.is_adversarial)
        health = self._health[index]
        bound_growth = BOUND_GROWTH ** self._divergences.get(index, 0)
        anomaly = health.update(loss, total_norm, is_collapsed, bound_growth)
        if anomaly in ("loss_spike", "divergence") and self._good_steps < RECURRENCE_STEPS:
            self._refund_last_rollback()
        if anomaly == "loss_spike":
            if self._spike_cooldown:
                self._refund_last_rollback()
                return "continue", ""
            self._spike_cooldown = SPIKE_COOLDOWN
            return self.escalate(), ""  # it was reported at its first step
        if anomaly == "divergence":
            self._divergences[index] = self._divergences.get(index, 0) + 1
        if anomaly:
            return self.escalate(), anomaly
        if health.is_diverging:
            self._refund_last_rollback()
        return "continue", "loss_spike" if health.spiking == 1 and not self._spike_cooldown else ""

    def _refund_last_rollback(self) -> None:
        """Refunds a rollback whose reason recurs: the data has changed, or a rollback is no cure."""
        if self._is_last_counted:
            self._is_last_counted = False
            self._spent = max(self._spent - 1, 0)

    def escalate(self) -> Decision:
        """Returns the decision for bad weights: roll back, or stop when the budget is used up."""
        is_useless = self.is_useless and not self.has_good_step
        return "roll_back" if self._spent < self._max_rollbacks and not is_useless else "stop"

    def give_up(self, reason: str) -> Decision:
        """Returns the decision to stop for a reason that is no budget."""
        self._given_up = reason
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
        if self.is_stopped_at_first:
            return "the loss, or a gradient, is nonfinite (on_nonfinite='stop')"
        if self._given_up:
            return self._given_up
        if not self.has_good_step:
            return f"no step was ever finite, and {self.rollbacks} rollbacks did not change that"
        if self.skips_too_often:
            return (
                f"more than {self._max_skip_fraction:.0%} of the last {OUTCOMES} steps were skipped "
                f"(max_skip_fraction={self._max_skip_fraction:g})"
            )
        limit = f"max_rollbacks={self._max_rollbacks}"
        return f"after {self.rollbacks} rollbacks another one is necessary ({limit})"

    @property
    def is_spiking(self) -> bool:
        """True if the last step of any optimizer was part of a spike, and so not a good step."""
        return any(health.spiking for health in self._health.values())

    def on_rollback(self) -> None:
        """Counts a rollback."""
        self.rollbacks += 1
        self._spent += 1
        self._is_last_counted = True
        self._good_steps = 0
        self._skipped_in_a_row.clear()
        for health in self._health.values():
            health.on_rollback()

    def reset_budgets(self) -> None:
        """Starts counting again, as before any intervention."""
        self._given_up = ""
        self._spent = 0
        self._skipped_in_a_row.clear()
        self._outcomes.clear()
        self._divergences.clear()

    def detector_state(self) -> dict[int, Any]:
        """Returns the state that depends on the weights and is restored with them."""
        return {index: health.state_dict() for index, health in self._health.items()}

    def load_detector_state(self, detector_state: dict[int, Any]) -> None:
        """Restores a result of `detector_state`."""
        self._health = {index: OptimizerHealth(self.is_adversarial) for index in detector_state}
        for index, state in detector_state.items():
            self._health[index].load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything with which a resumed run decides alike."""
        return {
            "rollbacks": self.rollbacks,
            "has_good_step": self.has_good_step,
            "spent": self._spent,
            "is_last_counted": self._is_last_counted,
            "good_steps": self._good_steps,
            "skipped_in_a_row": dict(self._skipped_in_a_row),
            "outcomes": list(self._outcomes),
            "spike_cooldown": self._spike_cooldown,
            "divergences": dict(self._divergences),
            "windows": self.detector_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state."""
        self.rollbacks = state_dict["rollbacks"]
        self.has_good_step = state_dict.get("has_good_step", True)
        self._spent = state_dict["spent"]
        self._is_last_counted = state_dict["is_last_counted"]
        self._good_steps = state_dict["good_steps"]
        self._skipped_in_a_row = dict(state_dict["skipped_in_a_row"])
        self._outcomes = deque(state_dict["outcomes"], maxlen=OUTCOMES)
        self._spike_cooldown = state_dict["spike_cooldown"]
        self._divergences = dict(state_dict["divergences"])
        self.load_detector_state(state_dict["windows"])
