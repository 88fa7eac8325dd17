"""From the outcomes of steps to a decision: go on, go back, or give up."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

from lightning_gradguard.core.detectors import CollapseDetector, DivergenceDetector, SpikeDetector

#: Steps that a spike of loss and gradient norm may last before the run goes back.
SPIKE_PATIENCE = 10
#: Steps after going back for a spike in which a further one is not acted upon: long enough for the
#: detectors' window to follow a level that has changed for good.
SPIKE_COOLDOWN = 256
#: Outcomes over which the share of skipped steps is taken.
OUTCOMES = 100
#: Steps without going back after which one of the times before no longer weighs on the budget.
FORGIVEN_AFTER = 500
#: Steps after going back within which a spike or a divergence is what was gone back for, come again.
AT_ONCE = 30
#: How many times worse than at the start, in loss times norm, a divergence is; and by what that grows each
#: time that the run goes back for one, so that a level that changed for good does not use the budget up.
WORSE = 300.0
STRICTER = 3.0
#: The same where networks are trained against each other, and the least deviation, of logarithms, that spikes
#: are measured by there: a loss that rises tenfold is part of the game.
WORSE_AMONG_RIVALS = 1e6
STD_AMONG_RIVALS = 1.0

Decision = Literal["continue", "roll_back", "stop"]
#: What can be wrong with steps whose numbers are finite.
Anomaly = Literal["", "loss_spike", "divergence", "gradient_collapse"]


class OptimizerHealth:
    """What the steps of one optimizer, all of them finite, say about the weights.

    Args:
        has_rivals: See `RecoveryPolicy`.

    Attributes:
        spiking: Steps in a row of which loss and norm both were spikes.
        is_worse: Whether the last steps would be a divergence, were it the first.
    """

    def __init__(self, is_adversarial: bool) -> None:
        self._worse = WORSE_AMONG_RIVALS if is_adversarial else WORSE
        self._loss, self._norm = (
            SpikeDetector(min_std=STD_AMONG_RIVALS) if is_adversarial else SpikeDetector() for _ in range(2)
        )
        self._divergence = DivergenceDetector()
        self._collapse = CollapseDetector()
        self.spiking = 0
        self.is_worse = False

    def update(self, loss: float, total_norm: float, is_collapsed: bool, strictness: float) -> Anomaly:
        """Take in a step; says what has lasted for too long, the clearest first.

        Args:
            loss: Of the step.
            total_norm: Of its gradients.
            is_collapsed: Whether no weight matrix gets a gradient.
            strictness: How many times clearer than usual a divergence has to be.
        """
        spikes = (self._loss.update(loss), self._norm.update(total_norm))
        self.spiking = self.spiking + 1 if all(spikes) else 0
        ratio = self._divergence.update(loss, total_norm)
        self.is_worse = ratio >= self._worse
        diverged = ratio >= self._worse * strictness
        if self._collapse.update(is_collapsed):
            return "gradient_collapse"
        if diverged:
            return "divergence"
        return "loss_spike" if self.spiking >= SPIKE_PATIENCE else ""

    def on_rollback(self) -> None:
        """The weights were put back."""
        self.spiking = 0
        self._divergence.forget()
        self._collapse.forget()

    def state_dict(self) -> dict[str, Any]:
        """What every detector remembers."""
        return {
            "loss": self._loss.state_dict(),
            "norm": self._norm.state_dict(),
            "divergence": self._divergence.state_dict(),
            "collapse": self._collapse.state_dict(),
            "spiking": self.spiking,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with what was remembered."""
        self._loss.load_state_dict(state_dict["loss"])
        self._norm.load_state_dict(state_dict["norm"])
        self._divergence.load_state_dict(state_dict["divergence"])
        self._collapse.load_state_dict(state_dict["collapse"])
        self.spiking = state_dict["spiking"]


class RecoveryPolicy:
    """Counts what happened to steps and says what is to be done.

    A step that is skipped costs one batch; `patience` of them in a row, a spike that does not clear, a
    divergence or a collapse mean that the weights themselves are sick. Every decision has a budget. The same
    calls lead to the same decision on every rank.

    Args:
        patience: Skipped steps in a row (of one optimizer) after which the run goes back.
        max_rollbacks: How often the run may go back before it gives up; after 500 steps without going back,
            one time less is counted.
        max_skip_fraction: Share of the last 100 steps that may be skipped before it gives up.

    Attributes:
        rollbacks: How often the run went back.
        has_rivals: Whether several optimizers may train networks against each other, so that losses rise and
            fall by nature. Set ahead of the first step.

    Example:
        >>> recovery = Recovery(patience=2, max_rollbacks=1, max_skip_fraction=0.5)
        >>> recovery.skipped(0), recovery.skipped(0)
        ('continue', 'roll_back')
        >>> recovery.went_back()
        >>> recovery.skipped(0), recovery.skipped(0)
        ('continue', 'stop')
    """

    def __init__(self, patience: int, max_rollbacks: int, max_skip_fraction: float) -> None:
        self._patience = patience
        self._max_rollbacks = max_rollbacks
        self._max_skip_fraction = max_skip_fraction
        self.rollbacks = 0
        self.is_adversarial = False
        self._spent = 0
        self._is_last_counted = False
        self._good_steps = 0
        self._skipped_in_a_row: dict[int, int] = {}
        self._outcomes: deque[bool] = deque(maxlen=OUTCOMES)
        self._spike_cooldown = 0
        self._health: dict[int, OptimizerHealth] = {}
        self._divergences: dict[int, int] = {}

    def on_skip(self, index: int) -> Decision:
        """A step of optimizer `index` did not take place."""
        self._skipped_in_a_row[index] = self._skipped_in_a_row.get(index, 0) + 1
        self._outcomes.append(True)
        if self.skips_too_often:
            return "stop"
        return self.escalate() if self._skipped_in_a_row[index] >= self._patience else "continue"

    def on_good_step(
        self, index: int, loss: float, total_norm: float, is_collapsed: bool = False
    ) -> tuple[Decision, Anomaly]:
        """A step of optimizer `index` takes place; its loss and gradient norm are finite.

        Args:
            index: Of the optimizer.
            loss: Of the step.
            total_norm: Of its gradients.
            is_collapsed: Whether no weight matrix gets a gradient, while something else does.

        Returns:
            What is to be done, and what is newly wrong.
        """
        self._skipped_in_a_row[index] = 0
        self._outcomes.append(False)
        self._good_steps += 1
        if self._good_steps % FORGIVEN_AFTER == 0:
            self._spent = max(self._spent - 1, 0)
        self._spike_cooldown = max(self._spike_cooldown - 1, 0)
        if index not in self._health:
            self._health[index] = OptimizerHealth(self.is_adversarial)
        health = self._health[index]
        strictness = STRICTER ** self._divergences.get(index, 0)
        anomaly = health.update(loss, total_norm, is_collapsed, strictness)
        if anomaly in ("loss_spike", "divergence") and self._good_steps < AT_ONCE:
            self._refund_last_rollback()
        if anomaly == "loss_spike":
            if self._spike_cooldown:
                self._refund_last_rollback()
                return "continue", ""
            self._spike_cooldown = SPIKE_COOLDOWN
            return self.escalate(), ""  # it was told when it began
        if anomaly == "divergence":
            self._divergences[index] = self._divergences.get(index, 0) + 1
        if anomaly:
            return self.escalate(), anomaly
        if health.is_worse:
            self._refund_last_rollback()
        return "continue", "loss_spike" if health.spiking == 1 and not self._spike_cooldown else ""

    def _refund_last_rollback(self) -> None:
        """What the run went back for has come again: the data's level, or nothing that going back cures."""
        if self._is_last_counted:
            self._is_last_counted = False
            self._spent = max(self._spent - 1, 0)

    def escalate(self) -> Decision:
        """The weights are sick: go back, or give up when the budget is used up."""
        return "roll_back" if self._spent < self._max_rollbacks else "stop"

    @property
    def skips_too_often(self) -> bool:
        """Whether more of the last steps were skipped than are allowed."""
        return len(self._outcomes) == OUTCOMES and (sum(self._outcomes) > self._max_skip_fraction * OUTCOMES)

    @property
    def stop_reason(self) -> str:
        """The budget that is used up, in words."""
        if self.skips_too_often:
            return (
                f"more than {self._max_skip_fraction:.0%} of the last {OUTCOMES} steps were skipped "
                f"(max_skip_fraction={self._max_skip_fraction:g})"
            )
        limit = f"max_rollbacks={self._max_rollbacks}"
        return f"after {self.rollbacks} rollbacks another one is necessary ({limit})"

    @property
    def is_spiking(self) -> bool:
        """Whether the last step of any optimizer was part of a spike: no good step, then."""
        return any(health.spiking for health in self._health.values())

    def on_rollback(self) -> None:
        """The weights were put back."""
        self.rollbacks += 1
        self._spent += 1
        self._is_last_counted = True
        self._good_steps = 0
        self._skipped_in_a_row.clear()
        for health in self._health.values():
            health.on_rollback()

    def reset_budgets(self) -> None:
        """Begin to count anew, as nobody has been helped yet."""
        self._spent = 0
        self._skipped_in_a_row.clear()
        self._outcomes.clear()
        self._divergences.clear()

    def detector_state(self) -> dict[int, Any]:
        """What is remembered about the weights' path, and goes back with them."""
        return {index: health.state_dict() for index, health in self._health.items()}

    def load_detector_state(self, detector_state: dict[int, Any]) -> None:
        """Put back what `detector_state` returned."""
        self._health = {index: OptimizerHealth(self.is_adversarial) for index in detector_state}
        for index, state in detector_state.items():
            self._health[index].load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to decide alike."""
        return {
            "rollbacks": self.rollbacks,
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
        """Continue from a saved state."""
        self.rollbacks = state_dict["rollbacks"]
        self._spent = state_dict["spent"]
        self._is_last_counted = state_dict["is_last_counted"]
        self._good_steps = state_dict["good_steps"]
        self._skipped_in_a_row = dict(state_dict["skipped_in_a_row"])
        self._outcomes = deque(state_dict["outcomes"], maxlen=OUTCOMES)
        self._spike_cooldown = state_dict["spike_cooldown"]
        self._divergences = dict(state_dict["divergences"])
        self.load_detector_state(state_dict["windows"])
