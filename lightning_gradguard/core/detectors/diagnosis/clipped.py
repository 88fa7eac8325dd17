"""Rules about updates that are small for a reason of their own: clipping elsewhere, weights that vanish."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from lightning_gradguard.core.detectors.constant_clipping import USUAL_UPDATE
from lightning_gradguard.core.detectors.diagnosis.progress import Progress
from lightning_gradguard.core.detectors.diagnosis.sample import Sample, Update
from lightning_gradguard.core.detectors.diagnosis.symptom import Symptom, modules_of
from lightning_gradguard.core.incidents import SymptomCause

#: Clipping to less than a tenth, with an update below the usual one, stops what does not learn.
CLIPPED_FAR = 10.0
#: Steps before which a loss that is high may only start slowly.
CLIPPED_STEPS = 25
#: Values to which people clip; the norm of gradients that are still scaled is far above.
LARGEST_CLIP_VALUE = 100.0
#: Share of their norm below which weights vanish: of a network that learns, and of another one.
VANISHED, VANISHED_IF_STUCK = 1e-3, 1e-2
#: The same by weight decay alone, in a network that learns nothing, with the steps from which on it should,
#: and the ratio of the decay to the gradient.
DECAYED, DECAY_STEPS, DOMINATES = 0.8, 20, 10.0
#: Share of the weights that a decay takes in each step which no network is meant to lose, and the share of
#: the loss that is left of one that learns nevertheless.
LARGE_DECAY, LEARNED = 0.05, 0.25


def clipped_elsewhere(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields gradients that code other than the suite has clipped to a value far below their norm."""
    for index, one in enumerate(sample.updates):
        scaled, _, after = progress.fixed_sizes(index)
        value = clipped_before(index, progress)
        hinders = one.ratio < USUAL_UPDATE and not progress.learns
        if one.loss_scale > 1 and not math.isnan(value) and (hinders or one.ratio < USUAL_UPDATE / 10):
            what = "norm" if value == scaled else "largest element"
            evidence = (
                f"the {what} of the gradients times the loss scale {one.loss_scale:g} is {value:.3g} in "
                "every sampled step: they were clipped before they were unscaled, and are far too small"
            )
            yield _symptom("scaled_gradients_clipped", evidence)
        elif one.loss_scale == 1 and sample.step >= CLIPPED_STEPS and hinders:
            yield from _clipped_far(one, value, after)


def _clipped_far(one: Update, before: float, after: float) -> Iterator[Symptom]:
    """Yields gradients that are clipped to one value after the suite has measured them, or before."""
    update = f"updates are {one.ratio:.1g} of the norm of the weights (usual: about 1e-3)"
    is_fixed = not math.isnan(after) or "value" in one.clipper
    if one.clipper and is_fixed and one.unclipped > CLIPPED_FAR:
        norm, clipped = one.total_norm, one.total_norm / one.unclipped
        evidence = f"gradients of norm {norm:.3g} are clipped to {clipped:.3g} by {one.clipper}; {update}"
        yield _symptom("clip_value_too_small", evidence)
    elif not math.isnan(before):
        yield _symptom("clip_value_too_small", f"{of_one_size(before)}; {update}")


def clipped_before(index: int, progress: Progress) -> float:
    """Returns the value to which gradients were clipped before they were measured; NaN if they were not."""
    return next((size for size in progress.fixed_sizes(index)[:2] if _is_clip_value(size)), math.nan)


def of_one_size(size: float) -> str:
    """Returns words for gradients that are clipped to one value."""
    return f"the gradients have the size {size:.3g} in every sampled step, as code of yours clips them"


def _symptom(cause: SymptomCause, evidence: str) -> Symptom:
    return Symptom("constant_clipping", cause, (), 1.0, evidence, "update", 3)


def _is_clip_value(size: float) -> bool:
    """True for a number of two digits, as people choose it."""
    return size <= LARGEST_CLIP_VALUE and math.isclose(size, float(f"{size:.2g}"), rel_tol=1e-4)


def vanishing_weights(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields weight matrices that have shrunk to a small share of their norm, or shrink by decay alone."""
    bound = VANISHED if progress.learns else VANISHED_IF_STUCK
    for one in sample.updates:
        is_large = one.decay * max(one.rates, default=0.0) > LARGE_DECAY and progress.over_constant > LEARNED
        is_stuck = sample.step >= DECAY_STEPS and (is_large or not progress.learns)
        left = {
            i: progress.shrunk(name, one.weights[i])
            for i, name in enumerate(one.names)
            if one.is_matrix[i] and i < len(one.weights)
        }
        bounds = {i: DECAYED if is_stuck and _decays(one, i, left[i], sample.step) else bound for i in left}
        found = sorted((i for i, share in left.items() if share < bounds[i]), key=lambda i: left[i])
        if not found:
            continue
        share = left[found[0]]
        is_decay = _decays(one, found[0], share, sample.step, 1.0)
        cause: SymptomCause | Literal["unknown"] = "weight_decay" if is_decay else "unknown"
        where = modules_of([one.names[i] for i in found])
        evidence = f"the weights of {where[0]} have shrunk to {share:.1g} of their norm"
        if is_decay:
            evidence += f", by weight_decay={one.decay:g}"
        yield Symptom("vanishing_weights", cause, where, share, evidence, "units", 3)


def _decays(one: Update, i: int, share: float, step: int, at_least: float = DOMINATES) -> bool:
    """True if weights shrink by decay: it is larger than their gradient, or explains half of the decrease."""
    explained = one.decay * max(one.rates, default=0.0) * step > -math.log(max(share, 1e-45)) / 2
    return one.decay > 0 and (explained or one.decay * one.weights[i] > at_least * one.gradients[i])
