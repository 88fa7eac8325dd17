"""Detection from finite steps that weights are bad: divergence, collapse, and spikes that last."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any, Literal

from lightning_gradguard.core.detectors.spike import SpikeDetector

#: Steps whose medians are compared for a divergence, and that a collapse must last.
EVIDENCE_STEPS = 10
#: Ratio of losses below which nothing is a divergence.
MIN_LOSS_RATIO = 1.5
#: Steps that a spike of loss and gradient norm may last before the run is rolled back.
SPIKE_PATIENCE = 10
#: Ratio to the first steps, of loss times norm, from which on training has diverged.
DIVERGENCE_RATIO = 300.0
#: The same for adversarial optimizers, whose losses may rise tenfold in healthy training.
ADVERSARIAL_DIVERGENCE_RATIO = 1e6
#: Faults of steps whose numbers are finite.
Anomaly = Literal["", "loss_spike", "divergence", "gradient_collapse"]


class DivergenceDetector:
    """Measures by how much loss and gradient norm exceed those of the first steps of training.

    The medians of ten steps are compared with those of the first ten, or with the very first step if that is
    smaller: it precedes all updates. The result is the ratio of losses, if it is at least one and a half,
    times the ratio of norms: a small rise of the loss counts if norms explode. A loss that rises alone, as in
    a saturated network, counts as if the norm had risen as much. Nonpositive losses give 0.

    Example:
        >>> detector = DivergenceDetector()
        >>> [detector.update(2.0, 1.0) for _ in range(50)][-1]
        0.0
        >>> [detector.update(20.0, 1000.0) for _ in range(10)][-1]
        10000.0
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=EVIDENCE_STEPS)
        self._norms: deque[float] = deque(maxlen=EVIDENCE_STEPS)
        self._start: tuple[float, float] | None = None

    def update(self, loss: float, total_norm: float) -> float:
        """Adds a step with finite numbers; returns the ratio to the first steps, 0 without a rise."""
        self._losses.append(loss)
        self._norms.append(total_norm)
        if len(self._losses) < EVIDENCE_STEPS:
            return 0.0
        now = (median(self._losses), median(self._norms))
        if self._start is None:
            self._start = (min(now[0], self._losses[0]), min(now[1], self._norms[0]))
        if min(self._start) <= 0:
            return 0.0
        loss_ratio, norm_ratio = (value / start for value, start in zip(now, self._start, strict=True))
        return loss_ratio * max(norm_ratio, loss_ratio) if loss_ratio >= MIN_LOSS_RATIO else 0.0

    def forget(self) -> None:
        """Discards the last steps after a rollback: they were made with other weights."""
        self._losses.clear()
        self._norms.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns the last steps and the first ones."""
        return {"losses": list(self._losses), "norms": list(self._norms), "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with saved steps."""
        self._losses = deque(state_dict["losses"], maxlen=EVIDENCE_STEPS)
        self._norms = deque(state_dict["norms"], maxlen=EVIDENCE_STEPS)
        self._start = state_dict["start"]


class CollapseDetector:
    """Detects that no weight matrix has a gradient any more.

    When all units of a layer are dead, no weight matrix gets a gradient, while the last bias still does. Ten
    such steps in a row, after a step with gradients, are a collapse; training does not recover from it.

    Example:
        >>> detector = CollapseDetector()
        >>> any(detector.update(is_collapsed) for is_collapsed in [False] + [True] * 9)
        False
        >>> detector.update(True)
        True
    """

    def __init__(self) -> None:
        self._had_gradients = False
        self._in_a_row = 0

    def update(self, is_collapsed: bool) -> bool:
        """Adds a step; returns True if the gradients have collapsed."""
        self._had_gradients = self._had_gradients or not is_collapsed
        self._in_a_row = self._in_a_row + 1 if is_collapsed and self._had_gradients else 0
        return self._in_a_row >= EVIDENCE_STEPS

    def forget(self) -> None:
        """Starts counting again after a rollback."""
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns whether there were gradients, and the number of steps without."""
        return {"was_alive": self._had_gradients, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state."""
        self._had_gradients = state_dict["was_alive"]
        self._in_a_row = state_dict["in_a_row"]


class OptimizerHealth:
    """Detects from the finite steps of one optimizer, perhaps an adversarial one, that its weights are bad.

    Attributes:
        spiking: Consecutive steps with a spike of both loss and norm.
        is_diverging: True if the last steps are a divergence without the growth of its bound.
    """

    def __init__(self, is_adversarial: bool) -> None:
        self._bound = ADVERSARIAL_DIVERGENCE_RATIO if is_adversarial else DIVERGENCE_RATIO
        self._loss, self._norm = (
            SpikeDetector(min_std=1.0) if is_adversarial else SpikeDetector() for _ in range(2)
        )
        self._divergence = DivergenceDetector()
        self._collapse = CollapseDetector()
        self.spiking = 0
        self.is_diverging = False

    def update(self, loss: float, total_norm: float, is_collapsed: bool, bound_growth: float) -> Anomaly:
        """Adds a step; returns the anomaly that has lasted for too long, the most certain first.

        The ratio from which on training has diverged is multiplied by `bound_growth`.
        """
        spikes = (self._loss.update(loss), self._norm.update(total_norm))
        self.spiking = self.spiking + 1 if all(spikes) else 0
        ratio = self._divergence.update(loss, total_norm)
        self.is_diverging = ratio >= self._bound
        if self._collapse.update(is_collapsed):
            return "gradient_collapse"
        if ratio >= self._bound * bound_growth:
            return "divergence"
        return "loss_spike" if self.spiking >= SPIKE_PATIENCE else ""

    def on_rollback(self) -> None:
        """Discards what was detected of weights that are no longer in use."""
        self.spiking = 0
        self._divergence.forget()
        self._collapse.forget()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of every detector."""
        return {
            "loss": self._loss.state_dict(),
            "norm": self._norm.state_dict(),
            "divergence": self._divergence.state_dict(),
            "collapse": self._collapse.state_dict(),
            "spiking": self.spiking,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state."""
        self._loss.load_state_dict(state_dict["loss"])
        self._norm.load_state_dict(state_dict["norm"])
        self._divergence.load_state_dict(state_dict["divergence"])
        self._collapse.load_state_dict(state_dict["collapse"])
        self.spiking = state_dict["spiking"]
