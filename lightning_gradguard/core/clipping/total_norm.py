"""Clipping policies that scale all gradients by one coefficient, from their total norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.arguments import positive, whole_number, within
from lightning_gradguard.core.clipping.policy import ClippingPolicy, HistoryPolicy, reject_other_size
from lightning_gradguard.core.clipping.scalars import (
    EPS,
    Scalar,
    as_like,
    clamp_max,
    clamp_min,
    clip_coefficient,
    fmax,
    lerp,
    total_norm,
    where,
)
from lightning_gradguard.core.norms import Gradients

#: Lower bound of the standard deviation as a share of the mean: constant norms in the warm-up do not lock the
#: threshold.
MIN_RELATIVE_STD = 0.1
#: Within the warm-up, a norm above this multiple of the median is an outlier.
OUTLIER_RATIO = 10.0


class GlobalNormClipping(ClippingPolicy):
    """Scales all gradients so that their total norm is at most `max_norm`.

    Args:
        max_norm: The bound; positive.

    Raises:
        ValueError: If `max_norm` is not positive.

    Example:
        >>> import torch
        >>> from lightning_gradguard.core.norms import measure_gradients, scale_gradients_
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradients = measure_gradients([("weight", weight)])
        >>> scale_gradients_(gradients, GlobalNormClipping(1.0).coefficients(gradients))
        >>> weight.grad
        tensor([0.6000, 0.8000])

    References:
        Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013,
        arXiv:1211.5063.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        self.max_norm = positive("max_norm", max_norm)

    def coefficients(self, gradients: Gradients) -> Scalar:
        """Returns one coefficient: `min(1, max_norm / total_norm)`."""
        self.threshold = self.max_norm
        norm = total_norm(gradients)
        return clip_coefficient(self.max_norm, norm, norm < math.inf)


class PercentileClipping(HistoryPolicy[dict[str, Tensor]]):
    """Clips the total norm to a percentile of the norms seen so far.

    With the 10th percentile nine steps in ten are clipped: training becomes normalized gradient descent,
    and the learning rate may have to rise.

    Args:
        percentile: In [0, 100].
        window: Number of past norms, as they were before clipping; at least 1.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Seetharaman, Wichern, Pardo, Le Roux, AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks, 2020, arXiv:2007.14469.
    """

    def __init__(self, percentile: float = 10.0, window: int = 1000) -> None:
        self.percentile = within("percentile", percentile, "[0, 100]")
        self.window = whole_number("window", window)
        self._state = self._pending = {}

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
        counts = (norm > 0) & (norm < math.inf)
        norms = torch.where(slot & counts, norm, state["norms"])
        self._pending = {"norms": norms, "seen": state["seen"] + counts}
        self.threshold = as_like(known, norms.nanquantile(self.percentile / 100))
        return clip_coefficient(self.threshold, known, known < math.inf)

    def state_dict(self) -> dict[str, Any]:
        """Returns the window of norms."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with a saved window.

        Raises:
            ValueError: If it was saved with another `window`.
        """
        if state_dict:
            reject_other_size("window", self.window, state_dict["norms"])
        self._state = dict(state_dict)


class ZScoreClipping(HistoryPolicy[dict[str, Any]]):
    """Clips norms that stand out from a running mean, and caps all of them.

    The rule is ZClip with four defects fixed: norms of 0 and nonfinite ones never enter the history (in the
    warm-up, one leaves its slot empty), an outlier within the warm-up is clipped to the median and so cannot
    inflate it, the standard deviation has a lower bound, and the history is saved.

    Args:
        z_threshold: A norm this many standard deviations above the mean is clipped; positive.
        decay: Decay of the running mean and variance; in [0, 1).
        warmup_steps: Number of norms for the first mean and variance; at least 1.
        max_norm: Upper bound of all norms after clipping; `None` for no bound.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Kumar, Owen, Chowdhury, Guera, ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025,
        arXiv:2504.02507.
    """

    def __init__(
        self,
        z_threshold: float = 2.5,
        decay: float = 0.97,
        warmup_steps: int = 25,
        max_norm: float | None = 1.0,
    ) -> None:
        self.z_threshold = positive("z_threshold", z_threshold)
        self.decay = within("decay", decay, "[0, 1)")
        self.warmup_steps = whole_number("warmup_steps", warmup_steps)
        self.max_norm = math.inf if max_norm is None else positive("max_norm", max_norm)
        self._state = self._pending = {
            "warmup": torch.full((self.warmup_steps,), torch.nan, dtype=torch.float64),
            "seen": 0,
            "mean": math.nan,
            "variance": math.nan,
        }

    def coefficients(self, gradients: Gradients) -> Scalar:
        """Returns one coefficient, by the z-score of the norm; an outlier enters the history softened."""
        norm = total_norm(gradients)
        counts = (norm > 0) & (norm < math.inf)
        is_warming = self._state["seen"] < self.warmup_steps
        effective = self._warm_up(norm, counts) if is_warming else self._compare(norm, counts)
        return clip_coefficient(clamp_max(effective, self.max_norm), norm, counts)

    def _warm_up(self, norm: Scalar, counts: Tensor | bool) -> Scalar:
        """Collects norms; an outlier counts as the median of those before it."""
        present = torch.as_tensor(norm, dtype=torch.float64)
        warmup, seen = self._state["warmup"].to(present.device, copy=True), self._state["seen"]
        median = warmup.nanquantile(0.5)
        bound = OUTLIER_RATIO * median if seen >= 3 else torch.full_like(present, torch.inf)
        effective = torch.where(present > bound, median, present)
        warmup[seen] = torch.where(torch.as_tensor(counts, device=present.device), effective, torch.nan)
        self.threshold = as_like(norm, bound.clamp(max=self.max_norm))
        self._pending = {**self._state, "warmup": warmup, "seen": seen + 1}
        if seen + 1 == self.warmup_steps:
            mean = warmup.nanmean()
            self._pending["mean"] = as_like(norm, mean)
            self._pending["variance"] = as_like(norm, (warmup - mean).square().nanmean().nan_to_num(0.0))
        return as_like(norm, effective)

    def _compare(self, norm: Scalar, counts: Tensor | bool) -> Scalar:
        """Compares with the running mean; the larger an outlier is, the less it counts."""
        mean, variance = (as_like(norm, self._state[key]) for key in ("mean", "variance"))
        before, mean = mean, where(mean == mean, mean, norm)  # no norm of the warm-up counts
        std = fmax(variance**0.5, MIN_RELATIVE_STD * mean)
        z = (norm - mean) / (std + EPS)
        bound = mean + self.z_threshold * std
        stands_out = z > self.z_threshold
        softened = mean + self.z_threshold**2 * std / clamp_min(z, self.z_threshold)
        effective = where(stands_out, softened, norm)
        new_mean = lerp(effective, mean, self.decay)
        deviation = effective - new_mean
        new_variance = lerp(deviation * deviation, variance, self.decay)
        self.threshold = clamp_max(bound, self.max_norm)
        self._pending = {
            **self._state,
            "mean": where(counts, new_mean, before),
            "variance": where(counts, new_variance, variance),
        }
        return effective

    def state_dict(self) -> dict[str, Any]:
        """Returns the warm-up buffer, mean and variance."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with a saved history.

        Raises:
            ValueError: If it was saved with another `warmup_steps`.
        """
        if state_dict:
            reject_other_size("warmup_steps", self.warmup_steps, state_dict["warmup"])
            self._state = dict(state_dict, seen=int(state_dict["seen"]))
