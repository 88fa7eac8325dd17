"""Clipping of total norms that stand out from their running mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.clipping.policy import EPS, ClippingPolicy, Scalar
from lightning_gradguard.core.clipping.scalar import (
    _at_least,
    _at_least_one,
    _at_most,
    _coefficient,
    _larger,
    _lerp,
    _like,
    _positive,
    _total_norm,
    _where,
)
from lightning_gradguard.core.norms import Gradients

#: `ZScoreClipping` takes the spread to be at least this share of the mean, so that constant norms in the
#: warm-up do not lock the threshold.
LEAST_SPREAD = 0.1
#: Within the warm-up of `ZScoreClipping`, a norm above this multiple of the median is an outlier.
OUTLIER = 10.0


class ZScoreClipping(ClippingPolicy):
    """Clips norms that stand out from a running mean, and caps all of them.

    The rule is ZClip with four defects mended: nonfinite norms never enter the history (one of them only
    leaves its place in the warm-up empty), an outlier within the warm-up is clipped to the median and so
    cannot inflate it, the spread has a floor, and the history is saved.

    Args:
        z_threshold: A norm this many standard deviations above the mean is clipped; positive.
        decay: Of the running mean and variance; in [0, 1).
        warmup_steps: Norms from which the first mean and variance are taken; at least 1.
        max_norm: No norm is larger after clipping; `None` for no cap.

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
        self.z_threshold = _positive("z_threshold", z_threshold)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} must be in [0, 1).")
        self.decay = decay
        self.warmup_steps = _at_least_one("warmup_steps", warmup_steps)
        self.max_norm = math.inf if max_norm is None else _positive("max_norm", max_norm)
        self._state: dict[str, Any] = {
            "warmup": torch.full((self.warmup_steps,), torch.nan, dtype=torch.float64),
            "seen": 0,
            "mean": math.nan,
            "variance": math.nan,
        }
        self._pending = self._state

    def coefficients(self, gradients: Gradients) -> Scalar:
        """One coefficient, by the z-score of the total norm."""
        norm = _total_norm(gradients)
        is_finite = norm < math.inf
        is_warming = self._state["seen"] < self.warmup_steps
        effective = self._warm_up(norm) if is_warming else self._stand_out(norm, is_finite)
        return _coefficient(_at_most(effective, self.max_norm), norm, is_finite)

    def _warm_up(self, norm: Scalar) -> Scalar:
        """Gather norms; an outlier counts as the median of those before it."""
        present = torch.as_tensor(norm, dtype=torch.float64)
        warmup, seen = self._state["warmup"].to(present.device, copy=True), self._state["seen"]
        median = warmup.nanquantile(0.5)
        bound = OUTLIER * median if seen >= 3 else torch.full_like(present, torch.inf)
        effective = torch.where(present > bound, median, present)
        warmup[seen] = torch.where(present < torch.inf, effective, torch.nan)
        self.threshold = _like(norm, bound.clamp(max=self.max_norm))
        self._pending = {**self._state, "warmup": warmup, "seen": seen + 1}
        if seen + 1 == self.warmup_steps:
            mean = warmup.nanmean()
            self._pending["mean"] = _like(norm, mean)
            self._pending["variance"] = _like(norm, (warmup - mean).square().nanmean().nan_to_num(0.0))
        return _like(norm, effective)

    def _stand_out(self, norm: Scalar, is_finite: Tensor | bool) -> Scalar:
        """Compare with the running mean; a norm that stands out counts the less, the more it does."""
        mean, variance = (_like(norm, self._state[key]) for key in ("mean", "variance"))
        before, mean = mean, _where(mean == mean, mean, norm)  # no norm of the warm-up was finite
        spread = _larger(variance**0.5, LEAST_SPREAD * mean)
        z = (norm - mean) / (spread + EPS)
        bound = mean + self.z_threshold * spread
        stands_out = z > self.z_threshold
        softened = mean + self.z_threshold**2 * spread / _at_least(z, self.z_threshold)
        effective = _where(stands_out, softened, norm)
        moved = _lerp(effective, mean, self.decay)
        away = effective - moved
        varied = _lerp(away * away, variance, self.decay)
        self.threshold = _at_most(bound, self.max_norm)
        self._pending = {
            **self._state,
            "mean": _where(is_finite, moved, before),
            "variance": _where(is_finite, varied, variance),
        }
        return effective

    def commit(self) -> None:
        """Take the norm, clipped to what stands out, into mean and variance."""
        self._state = self._pending

    def state_dict(self) -> dict[str, Any]:
        """Warm-up buffer, mean and variance."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with a saved history.

        Raises:
            ValueError: If it was saved with another `warmup_steps`.
        """
        if state_dict and len(state_dict["warmup"]) != self.warmup_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} does not fit the saved {len(state_dict['warmup'])}."
            )
        if state_dict:
            self._state = dict(state_dict, seen=int(state_dict["seen"]))
