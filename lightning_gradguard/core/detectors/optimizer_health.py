"""The detectors of one optimizer's finite steps, and the bounds beyond which its weights are bad."""

from __future__ import annotations

from typing import Any, Literal

from lightning_gradguard.core.detectors.divergence import CollapseDetector, DivergenceDetector
from lightning_gradguard.core.detectors.spike import SpikeDetector

#: Steps that a spike of loss and gradient norm may last before the run is rolled back.
SPIKE_PATIENCE = 10
#: Ratio to the first steps, of loss times norm, from which on training has diverged.
DIVERGENCE_RATIO = 300.0
#: The same for adversarial optimizers, and the lower bound of the deviation of logarithms for their spikes: a
#: loss that rises tenfold is normal there.
ADVERSARIAL_DIVERGENCE_RATIO = 1e6
ADVERSARIAL_MIN_STD = 1.0

#: Faults of steps whose numbers are finite.
Anomaly = Literal["", "loss_spike", "divergence", "gradient_collapse"]


class OptimizerHealth:
    """Detects from the finite steps of one optimizer that its weights are bad.

    Args:
        is_adversarial: True if another optimizer may train a network against this one's.

    Attributes:
        spiking: Consecutive steps with a spike of both loss and norm.
        is_diverging: True if the last steps are a divergence without the growth of its bound.
    """

    def __init__(self, is_adversarial: bool) -> None:
        self._bound = ADVERSARIAL_DIVERGENCE_RATIO if is_adversarial else DIVERGENCE_RATIO
        self._loss, self._norm = (
            SpikeDetector(min_std=ADVERSARIAL_MIN_STD) if is_adversarial else SpikeDetector()
            for _ in range(2)
        )
        self._divergence = DivergenceDetector()
        self._collapse = CollapseDetector()
        self.spiking = 0
        self.is_diverging = False

    def update(self, loss: float, total_norm: float, is_collapsed: bool, bound_growth: float) -> Anomaly:
        """Adds a step; returns the anomaly that has lasted for too long, the most certain first.

        Args:
            loss: Loss of the step.
            total_norm: Norm of its gradients.
            is_collapsed: True if no weight matrix has a gradient.
            bound_growth: Factor on the ratio from which on training has diverged.
        """
        spikes = (self._loss.update(loss), self._norm.update(total_norm))
        self.spiking = self.spiking + 1 if all(spikes) else 0
        ratio = self._divergence.update(loss, total_norm)
        self.is_diverging = ratio >= self._bound
        has_diverged = ratio >= self._bound * bound_growth
        if self._collapse.update(is_collapsed):
            return "gradient_collapse"
        if has_diverged:
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
