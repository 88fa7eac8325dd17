"""Clipping policies with a coefficient for each tensor, or for each of its units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.arguments import number, positive, whole_number, within
from lightning_gradguard.core.clipping.policy import ClippingPolicy, HistoryPolicy
from lightning_gradguard.core.clipping.scalars import EPS
from lightning_gradguard.core.norms import Gradients


class PerTensorClipping(HistoryPolicy[dict[str, Tensor]]):
    """Clips the gradient of each parameter to a multiple of its own running norm (AdaGC).

    Args:
        max_ratio: Largest ratio of a norm to its running mean; at least 1.
        decay: Decay of the running norms; in [0, 1).
        warmup_steps: Steps in which the total norm is clipped to `max_norm` and the smallest norm of each
            tensor is recorded; a parameter that is added later has its own warm-up. At least 1.
        max_norm: The bound within the warm-up; positive.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Wang and others, AdaGC: Improving Training Stability for Large Language Model Pretraining, 2025,
        arXiv:2502.11034.
    """

    def __init__(
        self, max_ratio: float = 1.05, decay: float = 0.98, warmup_steps: int = 100, max_norm: float = 1.0
    ) -> None:
        self.max_ratio = number("max_ratio", max_ratio, at_least=1)
        self.decay = within("decay", decay, "[0, 1)")
        self.warmup_steps = whole_number("warmup_steps", warmup_steps)
        self.max_norm = positive("max_norm", max_norm)
        self._names: list[str] = []
        self._seen_last: tuple[str, ...] = ()
        self._rows: Tensor | None = None
        self._state = self._pending = {}

    def coefficients(self, gradients: Gradients) -> list[Tensor]:
        """Returns one coefficient for each tensor."""
        norms = gradients.norms
        rows = self._rows_of(gradients.names, norms)
        seen, running = self._state["seen"][rows], self._state["norms"][rows]
        total = gradients.total_norm
        absolute = (self.max_norm / total.clamp(min=EPS)).clamp(max=1.0)
        relative = (self.max_ratio * running / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
        # the authors count steps from 1 and end the warm-up at step `warmup_steps`
        warming = (seen == 0) | (seen + 1 < self.warmup_steps)
        coefficients = torch.where(warming, absolute, relative)
        # a norm of zero does not predict later norms, and as a minimum would clip all of them to zero
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

    def state_dict(self) -> dict[str, Any]:
        """Returns the running norms by parameter."""
        return {"names": list(self._names), **self._state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with saved running norms."""
        self._state = {k: v for k, v in state_dict.items() if k != "names"}
        self._names = list(state_dict["names"])
        self._rows = None

    def _rows_of(self, names: tuple[str, ...], norms: Tensor) -> Tensor:
        """Returns the rows of the parameters in the state, to which new parameters are added."""
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


class UnitwiseClipping(ClippingPolicy):
    """Clips the gradient of each unit to a fraction of the norm of the unit's weights (AGC).

    A unit is a row of a weight, the incoming weights of one output; a vector is one unit. The authors exclude
    the classifier's head: pass its name to `AdaptiveGradientClipping(exclude=...)`.

    Args:
        clipping: Largest ratio of a unit's gradient norm to its weight norm; positive.
        eps: Lower bound of weight norms, so that zero weights can grow; positive.

    Raises:
        ValueError: If an argument is not positive.

    References:
        Brock, De, Smith, Simonyan, High-Performance Large-Scale Image Recognition Without
        Normalization, 2021, arXiv:2102.06171.
    """

    by_unit = True

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3) -> None:
        self.clipping = positive("clipping", clipping)
        self.eps = positive("eps", eps)

    def coefficients(self, gradients: Gradients) -> list[Tensor]:
        """Returns one coefficient for each unit."""
        return [self._by_unit(norm, weight) for norm, weight in gradients.unit_norms()]

    def _by_unit(self, norm: Tensor, weight: Tensor) -> Tensor:
        largest = self.clipping * weight.clamp(min=self.eps)
        clipped = torch.where(norm < largest, 1.0, largest / norm.clamp(min=EPS))
        return torch.where(torch.isfinite(norm), clipped, 1.0)
