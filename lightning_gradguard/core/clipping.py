"""Clipping policies: by how much is each gradient scaled?"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.norms import Gradients, positions

#: Kept out of divisions by a norm; the value that `torch.nn.utils.clip_grad_norm_` uses.
EPS = 1e-6
#: `ZScoreClipping` takes the spread to be at least this share of the mean, so that constant norms in the
#: warm-up do not lock the threshold.
LEAST_SPREAD = 0.1
#: Within the warm-up of `ZScoreClipping`, a norm above this multiple of the median is an outlier.
OUTLIER = 10.0


class ClippingPolicy(ABC):
    """Decides by how much each gradient is scaled. Subclass it to bring a policy of your own.

    `coefficients` looks, `commit` remembers: only a step that takes place enters the history. Nothing is
    read to the host, so that a policy costs no synchronization.

    Example:
        >>> class Half(ClippingPolicy):
        ...     def coefficients(self, gradients):
        ...         return torch.full_like(gradients.total_norm, 0.5)
        >>> Half().state_dict()
        {}
    """

    #: The total norm that was allowed for the gradients seen last; `None` without such a number.
    threshold: Tensor | None = None
    #: Whether `coefficients` asks for `gradients.unit_norms()`, which have to be added up over shards.
    by_unit: bool = False

    @abstractmethod
    def coefficients(self, gradients: Gradients) -> Tensor | list[Tensor]:
        """By what to multiply the gradients. Changes no history; a nonfinite norm gives 1.

        Args:
            gradients: Measured before anybody wrote.

        Returns:
            One scalar for all, or one tensor for each gradient that broadcasts to it; for a sharded gradient
            one of shape `()` or like its unit norms.
        """

    def commit(self) -> None:  # noqa: B027 - a policy without a history has nothing to do
        """Take what `coefficients` saw last into the history: the step takes place."""

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 - as above
        """Continue with a saved history."""


class GlobalNormClipping(ClippingPolicy):
    """Keeps the total norm of all gradients at `max_norm` or below.

    Args:
        max_norm: The bound; positive.

    Raises:
        ValueError: If `max_norm` is not positive.

    Example:
        >>> import lightning_gradguard.core.norms as norms
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradients = norms.measure_gradients([("weight", weight)])
        >>> norms.scale_gradients_(gradients, GlobalNormClipping(1.0).coefficients(gradients))
        >>> weight.grad
        tensor([0.6000, 0.8000])

    References:
        Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013,
        arXiv:1211.5063.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        self.max_norm = _positive("max_norm", max_norm)

    def coefficients(self, gradients: Gradients) -> Tensor:
        """One coefficient: `min(1, max_norm / total_norm)`."""
        self.threshold = torch.full_like(gradients.total_norm, self.max_norm)
        return _coefficient(self.threshold, gradients.total_norm)


class ZScoreClipping(ClippingPolicy):
    """Clips norms that stand out from a running mean, and caps all of them.

    The rule is ZClip with four defects mended: nonfinite norms never enter the history, an outlier within
    the warm-up is clipped to the median and so cannot inflate it, the spread has a floor, and the history
    is saved.

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
        self._state: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def coefficients(self, gradients: Gradients) -> Tensor:
        """One coefficient, by the z-score of the total norm."""
        norm = gradients.total_norm
        if not self._state:
            self._state = {
                "warmup": torch.full((self.warmup_steps,), torch.nan).to(norm),
                "seen": torch.zeros_like(norm),
                "mean": torch.zeros_like(norm),
                "variance": torch.zeros_like(norm),
            }
        state = self._state = {key: value.to(norm.device) for key, value in self._state.items()}
        warming = state["seen"] < self.warmup_steps
        median = state["warmup"].nanquantile(0.5)
        outlier = (state["seen"] >= 3) & (norm > OUTLIER * median)
        early = torch.where(outlier, median, norm)

        mean, variance = state["mean"], state["variance"]
        spread = torch.maximum(variance.sqrt(), LEAST_SPREAD * mean)
        z = (norm - mean) / (spread + EPS)
        late = torch.where(z > self.z_threshold, mean + self.z_threshold**2 * spread / z, norm)
        effective = torch.where(warming, early, late)
        bound = mean + self.z_threshold * spread
        guarded = torch.where(state["seen"] >= 3, OUTLIER * median, torch.inf)
        self.threshold = torch.where(warming, guarded, bound).clamp(max=self.max_norm)

        slot = torch.arange(self.warmup_steps, device=norm.device) == state["seen"]
        warmup = torch.where(slot & warming, early, state["warmup"])
        full = warming & (state["seen"] + 1 == self.warmup_steps)
        moved = self.decay * mean + (1 - self.decay) * effective
        spread_out = self.decay * variance + (1 - self.decay) * (effective - moved) ** 2
        observed = {
            "warmup": warmup,
            "seen": (state["seen"] + 1).clamp(max=self.warmup_steps),
            "mean": torch.where(full, warmup.mean(), torch.where(warming, mean, moved)),
            "variance": torch.where(
                full, warmup.var(correction=0), torch.where(warming, variance, spread_out)
            ),
        }
        finite = torch.isfinite(norm)
        self._pending = {k: torch.where(finite, v, state[k]) for k, v in observed.items()}
        allowed = torch.where(effective < norm, effective, torch.inf).clamp(max=self.max_norm)
        return _coefficient(allowed, norm)

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
        self._state = dict(state_dict)


class PercentileClipping(ClippingPolicy):
    """Clips the total norm to a percentile of the norms seen so far.

    With the 10th percentile nine steps in ten are clipped: training becomes normalized gradient descent,
    and the learning rate may have to rise.

    Args:
        percentile: In [0, 100].
        window: Norms remembered; at least 1.

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
        self.window = _at_least_one("window", window)
        self._state: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def coefficients(self, gradients: Gradients) -> Tensor:
        """One coefficient, by the percentile of the history with the present norm in it."""
        norm = gradients.total_norm
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
        self.threshold = norms.nanquantile(self.percentile / 100)
        return _coefficient(self.threshold, norm)

    def commit(self) -> None:
        """Take the norm, as it was before clipping, into the window."""
        self._state = self._pending

    def state_dict(self) -> dict[str, Any]:
        """The window of norms."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with a saved window.

        Raises:
            ValueError: If it was saved with another `window`.
        """
        if state_dict and len(state_dict["norms"]) != self.window:
            raise ValueError(
                f"window={self.window} does not fit the saved window of {len(state_dict['norms'])}."
            )
        self._state = dict(state_dict)


class UnitwiseClipping(ClippingPolicy):
    """Keeps the gradient of each unit small beside the unit's weights (AGC).

    A unit is a row of a weight, the incoming weights of one output; a vector is one unit. The authors leave
    the classifier's head alone: give its name to `AdaptiveGradientClipping(exclude=...)`.

    Args:
        clipping: Largest ratio of a unit's gradient norm to its weight norm; positive.
        eps: Weight norms count at least this much, so that zero weights can grow; positive.

    Raises:
        ValueError: If an argument is not positive.

    References:
        Brock, De, Smith, Simonyan, High-Performance Large-Scale Image Recognition Without
        Normalization, 2021, arXiv:2102.06171.
    """

    by_unit = True

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3) -> None:
        self.clipping = _positive("clipping", clipping)
        self.eps = _positive("eps", eps)

    def coefficients(self, gradients: Gradients) -> list[Tensor]:
        """One coefficient for each unit."""
        return [self._by_unit(norm, weight) for norm, weight in gradients.unit_norms()]

    def _by_unit(self, norm: Tensor, weight: Tensor) -> Tensor:
        largest = self.clipping * weight.clamp(min=self.eps)
        clipped = torch.where(norm < largest, 1.0, largest / norm.clamp(min=EPS))
        return torch.where(torch.isfinite(norm), clipped, 1.0)


class PerTensorClipping(ClippingPolicy):
    """Clips the gradient of each parameter to a multiple of its own running norm (AdaGC).

    Args:
        max_ratio: Largest ratio of a norm to its running mean; at least 1.
        decay: Of the running norms; in [0, 1).
        warmup_steps: Steps in which the total norm is clipped to `max_norm` and the smallest norm of each
            tensor is found; a parameter that joins later has a warm-up of its own. At least 1.
        max_norm: The bound within the warm-up; positive.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Wang and others, AdaGC: Improving Training Stability for Large Language Model Pretraining, 2025,
        arXiv:2502.11034.
    """

    def __init__(
        self,
        max_ratio: float = 1.05,
        decay: float = 0.98,
        warmup_steps: int = 100,
        max_norm: float = 1.0,
    ) -> None:
        if not max_ratio >= 1:
            raise ValueError(f"max_ratio={max_ratio!r} must be at least 1.")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} must be in [0, 1).")
        self.max_ratio = max_ratio
        self.decay = decay
        self.warmup_steps = _at_least_one("warmup_steps", warmup_steps)
        self.max_norm = _positive("max_norm", max_norm)
        self._names: tuple[str, ...] = ()
        self._state: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def coefficients(self, gradients: Gradients) -> list[Tensor]:
        """One coefficient for each tensor."""
        norms = gradients.norms
        self._make_room(gradients.names, norms)
        order = {name: i for i, name in enumerate(self._names)}
        rows = positions(tuple(order[name] for name in gradients.names), norms.device)
        seen, running = self._state["seen"][rows], self._state["norms"][rows]
        total = gradients.total_norm
        absolute = (self.max_norm / total.clamp(min=EPS)).clamp(max=1.0)
        relative = (self.max_ratio * running / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
        # the authors count steps from 1 and leave the warm-up at step `warmup_steps`
        warming = (seen == 0) | (seen + 1 < self.warmup_steps)
        coefficients = torch.where(warming, absolute, relative)
        # a norm of zero says nothing about the norms to come, and as a minimum would forbid all of them
        finite = torch.isfinite(norms) & (torch.isfinite(total) | ~warming) & (norms > 0)
        coefficients = torch.where(finite, coefficients, 1.0)
        clipped = coefficients * norms
        found = torch.where(seen == 0, clipped, torch.minimum(running, clipped))
        moved = self.decay * running + (1 - self.decay) * clipped
        observed = torch.where(finite, torch.where(warming, found, moved), running)
        self._pending = {
            "norms": self._state["norms"].index_put((rows,), observed),
            "seen": self._state["seen"].index_put((rows,), seen + finite),
        }
        return list(coefficients.unbind())

    def commit(self) -> None:
        """Take the norms, as they are after clipping, into the running ones."""
        self._state = self._pending

    def state_dict(self) -> dict[str, Any]:
        """Running norms by parameter."""
        return {"names": list(self._names), **self._state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with saved running norms."""
        self._state = {k: v for k, v in state_dict.items() if k != "names"}
        self._names = tuple(state_dict["names"])

    def _make_room(self, names: tuple[str, ...], norms: Tensor) -> None:
        new = [name for name in names if name not in self._names]
        empty = torch.zeros(0, device=norms.device)
        old = self._state or {"norms": empty.double(), "seen": empty.long()}
        self._state = {
            key: torch.cat([value.to(norms.device), value.new_zeros(len(new)).to(norms.device)])
            for key, value in old.items()
        }
        self._names = (*self._names, *new)


def _coefficient(allowed: Tensor, norm: Tensor) -> Tensor:
    """By what to multiply gradients of this norm; 1 where it is allowed, or nonfinite."""
    clipped = (allowed / (norm + EPS)).clamp(max=1.0)
    return torch.where(torch.isfinite(norm) & (norm > allowed), clipped, 1.0)


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a positive number.")
    return value


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    return value
