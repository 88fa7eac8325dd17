"""From the outcomes of steps to a decision: go on, go back, or give up."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

from lightning_gradguard.core.anomalies import SpikeDetector

#: Steps that a spike of loss and gradient norm may last before the run goes back.
SPIKE_PATIENCE = 10
#: Steps after going back for a spike in which a further one is not acted upon: long enough for the
#: detectors' window to follow a level that has changed for good.
SPIKE_COOLDOWN = 256
#: Outcomes over which the share of skipped steps is taken.
OUTCOMES = 100

Decision = Literal["go on", "go back", "give up"]


class Recovery:
    """Counts what happened to steps and says what is to be done.

    A step that is skipped costs one batch; `patience` of them in a row, or a spike that does not clear, mean
    that the weights themselves are sick. Every decision has a budget. The same calls lead to the same
    decision on every rank.

    Args:
        patience: Skipped steps in a row (of one optimizer) after which the run goes back.
        max_rollbacks: How often the run may go back before it gives up.
        max_skip_fraction: Share of the last 100 steps that may be skipped before it gives up.

    Example:
        >>> recovery = Recovery(patience=2, max_rollbacks=1, max_skip_fraction=0.5)
        >>> recovery.skipped(0), recovery.skipped(0)
        ('go on', 'go back')
        >>> recovery.went_back()
        >>> recovery.skipped(0), recovery.skipped(0)
        ('go on', 'give up')
    """

    def __init__(self, patience: int, max_rollbacks: int, max_skip_fraction: float) -> None:
        self._patience = patience
        self._max_rollbacks = max_rollbacks
        self._max_skip_fraction = max_skip_fraction
        self.rollbacks = 0
        self._skipped_in_a_row: dict[int, int] = {}
        self._outcomes: deque[bool] = deque(maxlen=OUTCOMES)
        self._spike_cooldown = 0
        self._detectors: dict[int, tuple[SpikeDetector, SpikeDetector]] = {}
        self._spiking: dict[int, int] = {}

    def skipped(self, index: int) -> Decision:
        """A step of optimizer `index` did not take place."""
        self._skipped_in_a_row[index] = self._skipped_in_a_row.get(index, 0) + 1
        self._outcomes.append(True)
        too_many = len(self._outcomes) == OUTCOMES and (
            sum(self._outcomes) > self._max_skip_fraction * OUTCOMES
        )
        if too_many:
            return "give up"
        return self.fall() if self._skipped_in_a_row[index] >= self._patience else "go on"

    def stepped(self, index: int, loss: float, total_norm: float) -> Decision:
        """A step of optimizer `index` takes place; its loss and gradient norm are finite."""
        self._skipped_in_a_row[index] = 0
        self._outcomes.append(False)
        self._spike_cooldown = max(self._spike_cooldown - 1, 0)
        if index not in self._detectors:
            self._detectors[index] = (SpikeDetector(), SpikeDetector())
        loss_detector, norm_detector = self._detectors[index]
        spikes = (loss_detector.update(loss), norm_detector.update(total_norm))
        self._spiking[index] = self._spiking.get(index, 0) + 1 if all(spikes) else 0
        if self._spiking[index] < SPIKE_PATIENCE or self._spike_cooldown:
            return "go on"
        self._spike_cooldown = SPIKE_COOLDOWN
        return self.fall()

    def fall(self) -> Decision:
        """The weights are sick: go back, or give up when the budget is used up."""
        return "go back" if self.rollbacks < self._max_rollbacks else "give up"

    @property
    def is_spiking(self) -> bool:
        """Whether the last step of any optimizer was part of a spike: no good step, then."""
        return any(self._spiking.values())

    def spike_began(self, index: int) -> bool:
        """Whether the last step of an optimizer was the first of a spike."""
        return self._spiking.get(index) == 1 and not self._spike_cooldown

    def went_back(self) -> None:
        """The weights were put back."""
        self.rollbacks += 1
        self._skipped_in_a_row.clear()
        self._spiking.clear()

    def windows(self) -> dict[str, Any]:
        """What is remembered about the weights' path, and goes back with them."""
        return {
            "detectors": {
                index: [detector.state_dict() for detector in pair] for index, pair in self._detectors.items()
            },
            "spiking": dict(self._spiking),
        }

    def load_windows(self, windows: dict[str, Any]) -> None:
        """Put back what `windows` returned."""
        self._detectors = {}
        for index, states in windows["detectors"].items():
            pair = self._detectors[index] = (SpikeDetector(), SpikeDetector())
            for detector, state in zip(pair, states, strict=True):
                detector.load_state_dict(state)
        self._spiking = dict(windows["spiking"])

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to decide alike."""
        return {
            "rollbacks": self.rollbacks,
            "skipped_in_a_row": dict(self._skipped_in_a_row),
            "outcomes": list(self._outcomes),
            "spike_cooldown": self._spike_cooldown,
            "windows": self.windows(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.rollbacks = state_dict["rollbacks"]
        self._skipped_in_a_row = dict(state_dict["skipped_in_a_row"])
        self._outcomes = deque(state_dict["outcomes"], maxlen=OUTCOMES)
        self._spike_cooldown = state_dict["spike_cooldown"]
        self.load_windows(state_dict["windows"])
