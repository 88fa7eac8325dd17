"""Clipping by a percentile of past total norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.arguments import whole_number
from lightning_gradguard.core.clipping.policy import ClippingPolicy
from lightning_gradguard.core.clipping.scalar import Scalar, as_like, clip_coefficient, total_norm
from lightning_gradguard.core.norms import Gradients


class PercentileClipping(ClippingPolicy):
    """Clips the total norm to a percentile of the norms seen so far.

    With the 10th percentile nine steps in ten are clipped: training becomes normalized gradient descent,
    and the learning rate may have to rise.

    Args:
        percentile: In [0, 100].
        window: Number of past norms; at least 1.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Seetharaman, Wichern, Pardo, Le Roux, AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks, 2020, arXiv:2007.14469.
    """

    def __init__(self, percentile: float = 10.0, window: int = 1000) -> None:
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile={percentile!r} must be in [0, 100].")
        self.percentile = percentile
        self.window = whole_number("window", window)
        self._state: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def coefficients(self, gradients: Gradients) -> Scalar:
        """Returns one coefficient, by the percentile of the history and the current norm."""
        known = total_norm(gradients)
        norm = torch.as_tensor(known, dtype=torch.float64)
        if not self._state:
            self._state = {
                "norms": torch.full((self.window,), torch.nan).to(norm),
                "seen": torch.zeros((), dtype=torch.long, device=norm.device),
            }
        state = self._state = {key: value.to(norm.device) for key, value in self._state.items()}
        slot = torch.arange(self.window, device=norm.device) == state["seen"] % self.window
        finite = torch.isfinite(norm)
        norms = torch.where(slot & finite, norm, state["norms"])
        self._pending = {"norms": norms, "seen": state["seen"] + finite}
        self.threshold = as_like(known, norms.nanquantile(self.percentile / 100))
        return clip_coefficient(self.threshold, known, known < math.inf)

    def commit(self) -> None:
        """Adds the norm before clipping to the window."""
        self._state = self._pending

    def state_dict(self) -> dict[str, Any]:
        """Returns the window of norms."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with a saved window.

        Raises:
            ValueError: If it was saved with another `window`.
        """
        if state_dict and len(state_dict["norms"]) != self.window:
            raise ValueError(
                f"window={self.window} does not fit the saved window of {len(state_dict['norms'])}."
            )
        self._state = dict(state_dict)
