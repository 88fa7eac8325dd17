"""Symptoms of layers that last to the end of a run: vanishing, exploding and stagnating ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from lightning_gradguard.core.detectors import DEPTH_DECADES, depth_profile
from lightning_gradguard.report.analysis.outcome import STAGNANT, Outcome, RunSymptom, SymptomSeverity
from lightning_gradguard.report.analysis.run_log import GradientLog, Series

#: Logged steps that are checked; of more steps, evenly spread ones.
MAX_CHECKS = 500
#: A symptom lasts if it shows at this many checks in a row, over this many steps or half of a shorter run.
LASTING_CHECKS, LASTING_STEPS = 3, 20


class _Sign(NamedTuple):
    """A symptom at one step: its layers, the first one first, and the measured number."""

    where: tuple[str, ...]
    value: float


def lasting_symptoms(gradients: GradientLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Yields symptoms that last, in the whole run and in its last third alone."""
    steps = thinned(sorted({s for series in gradients.layers.values() for s in series.steps}))
    late = _lasting(steps[-len(steps) // 3 :], gradients)
    severity: SymptomSeverity = "minor" if outcome.has_learned else "serious"
    for kind, (since, _) in _lasting(steps, gradients).items():
        if kind not in late:
            continue
        where, value = late[kind][1]
        evidence = f"updates are below {STAGNANT:g} of the weight norm from step {since} to the end"
        if kind != "weight_stagnation":
            evidence = _profile_in_words(gradients, value)
        elif len(where) > 1:
            evidence = f"{len(where)} layers or more: {evidence}"
        yield RunSymptom(kind, severity, since, evidence, value, where)


def layers_at(step: int, gradients: GradientLog) -> tuple[list[str], list[float]]:
    """Returns the names of the layers that are logged at a step, first layer first, and their norms."""
    norms = {name: series.at(step) for name, series in gradients.layers.items()}
    known = {name: norm for name, norm in norms.items() if norm is not None}
    return list(known), list(known.values())


def are_matrices(names: Iterable[str]) -> list[bool]:
    """Returns for each name True if it belongs to a weight matrix; names of modules all do."""
    names = list(names)
    if not any(re.search(r"(^|\.)(weight|bias)", name) for name in names):
        return [True] * len(names)
    return [
        not re.search(r"bias[^.]*$|(^|[._])(norm|bn|ln|batch_?norm|layer_?norm)[_\d]*\.", name, re.IGNORECASE)
        for name in names
    ]


def thinned(steps: Sequence[int]) -> Sequence[int]:
    """Returns at most `MAX_CHECKS` of them, evenly spread."""
    return steps[:: math.ceil(len(steps) / MAX_CHECKS) or 1]


def _lasting(steps: Sequence[int], gradients: GradientLog) -> dict[str, tuple[int, _Sign]]:
    """Returns for each symptom that lasts over these steps since when it does, and how it shows."""
    if not steps:
        return {}
    duration = min(LASTING_STEPS, (steps[-1] - steps[0]) // 2)
    found: dict[str, tuple[int, _Sign]] = {}
    shown: dict[str, list[int]] = {}
    for step in steps:
        signs = _signs(step, gradients)
        shown = {kind: [*shown.get(kind, ()), step] for kind in signs}  # without a break
        for kind, at in shown.items():
            if kind not in found and len(at) >= LASTING_CHECKS and step - at[0] >= duration:
                found[kind] = max(step - duration, steps[0]), signs[kind]
    return found


def _signs(step: int, gradients: GradientLog) -> dict[str, _Sign]:
    names, grads = layers_at(step, gradients)
    # without logged weights the profile is that of the gradient norms alone
    unknown = 0.0 if gradients.weights else 1.0
    weights = [_at(gradients.weights, name, step, unknown) for name in names]
    ratios = [_at(gradients.ratios, name, step, math.inf) for name in names]
    # the bias of a layer before a normalization has no gradient
    matrices = [i for i, is_matrix in enumerate(are_matrices(names)) if is_matrix]
    hidden = matrices[:-1]
    profile = depth_profile([grads[i] for i in hidden], [weights[i] for i in hidden])
    still = [names[i] for i in matrices if ratios[i] < STAGNANT and weights[i] > 0]
    signs = {}
    if abs(profile) > DEPTH_DECADES:
        kind = "vanishing_gradient" if profile > 0 else "exploding_gradient"
        signs[kind] = _Sign(tuple(names[i] for i in hidden[:5]), profile)
    if still:
        signs["weight_stagnation"] = _Sign(tuple(still[:5]), min(ratios))
    return signs


def _profile_in_words(gradients: GradientLog, profile: float) -> str:
    names = [name for name, series in gradients.layers.items() if series.last_half()]
    layers = [name for name, is_matrix in zip(names, are_matrices(names), strict=True) if is_matrix][:-1]
    first, last = layers[0], layers[-1]
    norms = [f"{median(gradients.layers[name].last_half()):.2g} at {name}" for name in (last, first)]
    change = "shrink" if profile > 0 else "grow"
    by = "to zero" if math.isinf(profile) else f"by {abs(profile):.1f} decades"
    return f"gradients {change} {by} from the last layer to the first: {norms[0]}, {norms[1]}"


def _at(family: Mapping[str, Series], name: str, step: int, default: float) -> float:
    value = family[name].at(step) if name in family else None
    return default if value is None else value
