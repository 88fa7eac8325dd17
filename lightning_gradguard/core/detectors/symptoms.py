"""Detection of symptoms that last: vanishing, exploding, stagnating, stuck."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

#: Decades that gradients may lose or gain from the last layer to the first.
DEPTH_DECADES = 3.0
#: Layers that a depth profile needs.
MIN_LAYERS = 4
#: A total norm explodes if it is this many times the median of the window.
EXPLOSION = 100.0
#: Relative updates below it do not change a weight: float32 resolves about 1.2e-7.
STAGNANT = 1e-7


def depth_profile(grad_norms: Sequence[float], weight_norms: Sequence[float]) -> float:
    """Returns the decades by which gradients, relative to weights, shrink from the last layer to the first.

    The slope of a line through `log10(grad_norm / weight_norm)` over depth, times the depth. Above 3 they
    vanish, below -3 they explode.

    Args:
        grad_norms: Norms of the gradients of weight matrices, first layer first, without the output layer.
        weight_norms: Norms of these weights.

    Returns:
        The decades; `inf` if gradients of the first layers are zero while later ones are not; 0 with fewer
        than 4 layers or if a gradient is nonfinite.

    Example:
        >>> round(depth_profile([1e-6, 1e-4, 1e-2, 1.0], [1.0] * 4), 6)
        6.0
    """
    pairs = [(g, w) for g, w in zip(grad_norms, weight_norms, strict=True) if w > 0]
    if len(pairs) < MIN_LAYERS or not all(math.isfinite(g) for g, _ in pairs):
        return 0.0
    if pairs[0][0] == 0 and any(g > 0 for g, _ in pairs):
        return math.inf
    heights = [math.log10(g / w) if g > 0 else None for g, w in pairs]
    points = [(float(depth), height) for depth, height in enumerate(heights) if height is not None]
    if len(points) < MIN_LAYERS:
        return 0.0
    return slope(points) * (len(pairs) - 1)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Returns the slope of the least-squares line through the points."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


class Persistence:
    """Turns a condition that is checked now and then into one alarm for each episode.

    It must hold over a number of steps, and at a number of consecutive checks.

    Example:
        >>> persistence = Persistence(steps=2, checks=3)
        >>> [persistence.update(step, holds=True) for step in range(5)]
        [False, False, True, False, False]
    """

    def __init__(self, steps: int = 20, checks: int = 3) -> None:
        self._steps = steps
        self._checks = checks
        self._value: bool | None = None
        self._since = 0
        self._n_checks = 0
        self._alarmed = False

    def update(self, step: int, holds: bool) -> bool:
        """Returns True at the check that recognizes an episode."""
        if holds is not self._value:
            self._value, self._since, self._n_checks = holds, step, 0
        self._n_checks += 1
        if self._n_checks < self._checks or step - self._since < self._steps:
            return False
        fresh = holds and not self._alarmed
        self._alarmed = holds
        return fresh

    def state_dict(self) -> dict[str, Any]:
        """Returns how long the condition has held, and whether the alarm was raised."""
        return {"value": self._value, "since": self._since, "looks": self._n_checks, "alarmed": self._alarmed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with a saved episode."""
        self._value = state_dict["value"]
        self._since = state_dict["since"]
        self._n_checks = state_dict["looks"]
        self._alarmed = state_dict["alarmed"]


@dataclass(frozen=True)
class Symptom:
    """A fault of training, and the parameters that show it.

    Args:
        kind: One of `core.incidents.KINDS`.
        where: Names of the parameters that show it most, the worst first.
        value: The measured number that indicates it.
    """

    kind: str
    where: tuple[str, ...]
    value: float


class NormBand:
    """Total norms of the last logged steps, and the band that most of them are in.

    Args:
        window: Number of logged steps.
    """

    def __init__(self, window: int = 100) -> None:
        self._totals: deque[float] = deque(maxlen=window)

    def add(self, total_norm: float) -> None:
        """Adds the norm of a step; a nonfinite one does not enter."""
        if math.isfinite(total_norm):
            self._totals.append(total_norm)

    def band(self) -> tuple[float, float] | None:
        """Returns the central 90 % of the total norms in the window; `None` for fewer than two."""
        if len(self._totals) < 2:
            return None
        low, *_, high = quantiles(self._totals, n=20, method="inclusive")
        return low, high

    def state_dict(self) -> dict[str, Any]:
        """Returns the window."""
        return {"totals": list(self._totals)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with a saved window; checkpoints from before 0.5 have none."""
        self._totals = deque(state_dict.get("totals", ()), maxlen=self._totals.maxlen)


class SymptomDetector:
    """Detects symptoms in a sequence of logged steps, each once an episode.

    Nonfinite gradients, and an explosion right before them, are detected at once and from the first step on;
    every other condition has to last.

    Args:
        warmup_steps: First steps, without alarms except `nonfinite_gradient`.
        persistence_steps: Steps that a condition must last.
        window: Logged steps over which loss and total norm are kept.
    """

    def __init__(self, warmup_steps: int = 100, persistence_steps: int = 20, window: int = 100) -> None:
        self._warmup_steps = warmup_steps
        self._episodes = {
            "nonfinite": Persistence(steps=0, checks=1),
            "growing": Persistence(steps=0, checks=2),
            "exploding": Persistence(steps=persistence_steps),
            "vanishing": Persistence(steps=persistence_steps),
            "stagnant": Persistence(steps=persistence_steps),
            "stuck": Persistence(steps=10 * persistence_steps),
        }
        self._norms: deque[float] = deque(maxlen=window)
        self._exploded: Symptom | None = None
        self._losses: deque[tuple[int, float]] = deque(maxlen=window)

    def update(
        self,
        step: int,
        *,
        names: Sequence[str],
        is_matrix: Sequence[bool],
        grad_norms: Sequence[float],
        weight_norms: Sequence[float],
        update_ratios: Sequence[float] | None,
        total_norm: float,
        loss: float,
        nonfinite_fraction: float,
    ) -> list[Symptom]:
        """Checks a logged step.

        Args:
            step: Number of the step.
            names: Parameters with a gradient, first layer first.
            is_matrix: True for those with two dimensions or more.
            grad_norms: Norms of their gradients.
            weight_norms: Their own norms.
            update_ratios: Norm of each update relative to the weight; `None` if not measured.
            total_norm: Norm of all gradients together.
            loss: The loss; NaN if unknown.
            nonfinite_fraction: Share of tensors with a nonfinite gradient since the last check.

        Returns:
            The symptoms recognized at this step; usually none.
        """
        layers = [i for i, matrix in enumerate(is_matrix) if matrix][:-1]
        profile = depth_profile([grad_norms[i] for i in layers], [weight_norms[i] for i in layers])
        by_norm = sorted(range(len(names)), key=lambda i: -_or_inf(grad_norms[i]))
        level = median(self._norms) if self._norms else math.inf
        growth = total_norm / level if level > 0 else 0.0
        still = [i for i, ratio in enumerate(update_ratios or ()) if ratio < STAGNANT and weight_norms[i] > 0]
        stuck = self._loss_is_flat(step, loss) and len(still) > len(names) / 2
        # the bias of a layer before a normalization has no gradient
        still_layers = [i for i in still if is_matrix[i]]
        nonfinite = [i for i in by_norm if not math.isfinite(grad_norms[i])]
        if math.isfinite(total_norm) and growth <= EXPLOSION:
            self._norms.append(total_norm)
        conditions = (
            ("nonfinite", "nonfinite_gradient", nonfinite_fraction > 0, nonfinite, nonfinite_fraction),
            ("growing", "exploding_gradient", growth > EXPLOSION, by_norm, total_norm),
            ("exploding", "exploding_gradient", profile < -DEPTH_DECADES, layers, profile),
            ("vanishing", "vanishing_gradient", profile > DEPTH_DECADES, layers, profile),
            ("stagnant", "weight_stagnation", bool(still_layers), still_layers, _min(update_ratios)),
            ("stuck", "stuck_loss", stuck, still, loss),
        )
        symptoms = []
        if nonfinite_fraction > 0 and self._exploded is not None:
            symptoms.append(self._exploded)  # the explosion before a NaN is its cause, also in the warm-up
        self._exploded = None
        if math.isfinite(total_norm) and growth > EXPLOSION:
            self._exploded = Symptom("exploding_gradient", tuple(names[i] for i in by_norm[:5]), total_norm)
        for episode, kind, holds, where, value in conditions:
            early = step < self._warmup_steps and kind != "nonfinite_gradient"
            if self._episodes[episode].update(step, holds and not early):
                symptoms.append(Symptom(kind, tuple(names[i] for i in where[:5]), value))
        return symptoms

    def state_dict(self) -> dict[str, Any]:
        """Returns windows and episodes."""
        return {
            "norms": list(self._norms),
            "losses": list(self._losses),
            "exploded": None if self._exploded is None else dataclasses.asdict(self._exploded),
            "episodes": {kind: p.state_dict() for kind, p in self._episodes.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with saved windows and episodes."""
        self._norms = deque(state_dict["norms"], maxlen=self._norms.maxlen)
        self._losses = deque(map(tuple, state_dict["losses"]), maxlen=self._losses.maxlen)
        exploded = state_dict["exploded"]
        self._exploded = None if exploded is None else Symptom(**exploded)
        for kind, state in state_dict["episodes"].items():
            self._episodes[kind].load_state_dict(state)

    def _loss_is_flat(self, step: int, loss: float) -> bool:
        if math.isfinite(loss):
            self._losses.append((step, loss))
        if len(self._losses) < 10:
            return False
        steps = self._losses[-1][0] - self._losses[0][0]
        level = abs(median(value for _, value in self._losses))
        return abs(slope(list(self._losses)) * steps) < 0.01 * level


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _min(values: Sequence[float] | None) -> float:
    return min(values) if values else math.nan
