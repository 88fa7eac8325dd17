"""Clipping policies: by how much is each gradient scaled?"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.norms import Gradients

#: A number that the host knows, or one on the device that it has not waited for.
Scalar = float | Tensor
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
    read to the host, so that a policy costs no synchronization; from a norm that the host knows anyway
    (`gradients.known_norm`) it is best to reckon on the host.

    Example:
        >>> class Half(ClippingPolicy):
        ...     def coefficients(self, gradients):
        ...         return torch.full_like(gradients.total_norm, 0.5)
        >>> Half().state_dict()
        {}
    """

    #: The total norm that was allowed for the gradients seen last; `None` without such a number.
    threshold: Scalar | None = None
    #: Whether `coefficients` asks for `gradients.unit_norms()`, which have to be added up over shards.
    by_unit: bool = False

    @abstractmethod
    def coefficients(self, gradients: Gradients) -> Scalar | list[Tensor]:
        """By what to multiply the gradients. Changes no history; a nonfinite norm gives 1.

        Args:
            gradients: Measured before anybody wrote.

        Returns:
            One scalar for all, as a number or a tensor, or one tensor for each gradient that broadcasts to
            it; for a sharded gradient one of shape `()` or like its unit norms.
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

    def coefficients(self, gradients: Gradients) -> Scalar:
        """One coefficient: `min(1, max_norm / total_norm)`."""
        self.threshold = self.max_norm
        norm = _total_norm(gradients)
        return _coefficient(self.max_norm, norm, norm < math.inf)


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

    def coefficients(self, gradients: Gradients) -> Scalar:
        """One coefficient, by the percentile of the history with the present norm in it."""
        known = _total_norm(gradients)
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
        self.threshold = _like(known, norms.nanquantile(self.percentile / 100))
        return _coefficient(self.threshold, known, known < math.inf)

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
        self._names: list[str] = []
        self._seen_last: tuple[str, ...] = ()
        self._rows: Tensor | None = None
        self._state: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def coefficients(self, gradients: Gradients) -> list[Tensor]:
        """One coefficient for each tensor."""
        norms = gradients.norms
        rows = self._rows_of(gradients.names, norms)
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
        self._names = list(state_dict["names"])
        self._rows = None

    def _rows_of(self, names: tuple[str, ...], norms: Tensor) -> Tensor:
        """Where the parameters stand in the state; there is room for newcomers."""
        if self._rows is not None and names == self._seen_last:
            return self._rows
        known = set(self._names)
        new = [name for name in names if name not in known]
        empty = torch.zeros(0, device=norms.device)
        old = self._state or {"norms": empty.double(), "seen": empty.long()}
        self._state = {
            key: torch.cat([value.to(norms.device), value.new_zeros(len(new)).to(norms.device)])
            for key, value in old.items()
        }
        self._names += new
        places = {name: i for i, name in enumerate(self._names)}
        self._seen_last = names
        self._rows = torch.tensor([places[name] for name in names], device=norms.device)
        return self._rows


def _total_norm(gradients: Gradients) -> Scalar:
    """The total norm, on the host if it is known there."""
    return gradients.total_norm if gradients.known_norm is None else gradients.known_norm


def _coefficient(allowed: Scalar, norm: Scalar, is_finite: Tensor | bool) -> Scalar:
    """By what to multiply gradients of this norm; 1 where it is allowed, or nonfinite."""
    return _where((norm > allowed) & is_finite, allowed / (norm + EPS), 1.0)


def _where(condition: Tensor | bool, one: Scalar, other: Scalar) -> Scalar:
    """One if the condition holds, else the other; on the device where the condition is."""
    if isinstance(condition, Tensor):
        return torch.where(condition, one, other)
    return one if condition else other


def _larger(one: Scalar, other: Scalar) -> Scalar:
    """The larger of two numbers of one kind; the other where one is NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.fmax(one, other)
    return one if one > other else other


def _at_least(value: Scalar, bound: float) -> Scalar:
    """The value, or a bound that it falls short of."""
    if isinstance(value, Tensor):
        return value.clamp(min=bound)
    return bound if value < bound else value


def _at_most(value: Scalar, bound: float) -> Scalar:
    """The value, or a bound that it exceeds; NaN stays."""
    if isinstance(value, Tensor):
        return value.clamp(max=bound)
    return bound if value > bound else value


def _lerp(start: Scalar, end: Scalar, weight: float) -> Scalar:
    """What lies this share of the way from one number to another of its kind."""
    if isinstance(start, Tensor) and isinstance(end, Tensor):
        return torch.lerp(start, end, weight)
    return start + weight * (end - start)


def _like(norm: Scalar, value: Scalar) -> Scalar:
    """A value as a norm is given: a number, or a scalar on its device."""
    if isinstance(norm, Tensor):
        return torch.as_tensor(value, dtype=torch.float64, device=norm.device)
    return float(value)


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a positive number.")
    return value


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    return value
