"""Changes that a diagnosis suggests, the likeliest first, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lightning_gradguard.core.detectors.diagnosis import Symptom
from lightning_gradguard.core.remedies.changes import Change, places
from lightning_gradguard.core.remedies.gates import forget_bias, input_bias
from lightning_gradguard.core.remedies.kinds import KINDS, Argument, ChangeKind
from lightning_gradguard.core.remedies.surgery.data_flow import ACTIVATIONS
from lightning_gradguard.treatment.probe import Probe, in_words

#: Candidates of a treatment at most.
MAX_CANDIDATES = 8
#: Changes of a candidate that is against several symptoms at once.
MAX_TOGETHER = 3
#: Ratio of an update to the weights at which a learning rate is tried.
TRIED_UPDATE = 1e-2
#: Distance that a weight goes in a run, over its norm, below which the learning rate is raised, and that at
#: which it is tried: a trial, which is shorter, must show something.
LITTLE_MOVED, TRIED_MOVED = 0.05, 10.0
#: Learning rate without momentum that is tried where inputs and targets are standardized.
TRIED_PLAIN_RATE = 0.05
#: Factor from a scale of 1 at which values that are predicted are scaled.
FAR_FROM_UNIT = 10.0


@dataclass(frozen=True)
class Candidate:
    """Changes to try together.

    Args:
        changes: None for the suite's callbacks alone.
        reason: What suggests them.
        is_suggested: False for one that no symptom suggests.
    """

    changes: tuple[Change, ...]
    reason: str
    is_suggested: bool = True


def _of(kind: ChangeKind, **arguments: Argument) -> Change:
    return Change(kind, arguments)


_INITIALIZE = (_of("initialize"),)
_SCALED = (_of("initialize", to="lsuv"),)
# queries and keys of the usual size, whose products no width divides, saturate attention at any width
_SMALL = (_of("initialize", to="small"),)
_NORMALIZE = (_of("add_normalization"),)
_RESIDUAL = (_of("add_residual"),)
_CLIP = (_of("clipping", max_norm=1.0),)
_ACTIVATE = (_of("replace_activation", to="relu"), *_INITIALIZE)
# narrow networks of 10 to 17 layers, of whatever activation and weights, train with these three
_WHOLE = (_ACTIVATE[0], *_NORMALIZE, *_RESIDUAL)
_LEAKY = (_of("replace_activation", to="leaky_relu"), *_INITIALIZE)
_LOWER, _LOWEST, _HIGHER, _HIGHEST = ((_of("learning_rate", scale=s),) for s in (0.1, 0.01, 10.0, 100.0))
_ORTHOGONAL = (_of("orthogonal_recurrent"),)
# gates that forget a twentieth a step: over 60 steps, a GRU with a bias of 0 or 1 learns at no rate
_KEEPS = (_of("gate_bias", value=3.0),)
_OPEN, _GATED = _ORTHOGONAL + _KEEPS, (_of("rnn_to_gru"), *_KEEPS)
# closed input gates keep what comes later from adding up, and slow down what is learned
_SHUT = (*_ORTHOGONAL, _of("gate_bias", value=3.0, input_value=-3.0), *_HIGHER)
_STANDARDIZE = (_of("standardize_input"),)
_EPSILON = (_of("epsilon", value=1e-4),)
_CONSTANT = (_of("constant_rate"),)
_WARM_UP = (_of("warm_up", steps=50),)
_MAX_NORM = (_of("weight_norm", max_norm=3.0),)
_NO_DECAY = (_of("weight_decay", value=0.0),)
_SUITE: tuple[Change, ...] = ()

#: What helps against a cause, the likeliest first; the order of AUTOTRAINER's repairs where it has one.
_BY_CAUSE: Mapping[tuple[str, str], Sequence[tuple[Change, ...]]] = {
    ("vanishing_gradient", "small_weights"): (
        _SCALED,
        _INITIALIZE + _NORMALIZE,
        _WHOLE,
        _ACTIVATE,
        _ACTIVATE + _NORMALIZE,
    ),
    ("vanishing_gradient", "saturating_activations"): (
        _ACTIVATE,
        _ACTIVATE + _RESIDUAL,
        _WHOLE,
        _ACTIVATE + _NORMALIZE,
        _NORMALIZE,
    ),
    ("vanishing_gradient", "depth"): (
        _RESIDUAL,
        _RESIDUAL + _NORMALIZE,
        _INITIALIZE,
        _WHOLE,
        _ACTIVATE + _RESIDUAL,
    ),
    ("vanishing_gradient", "through_time"): (
        _OPEN,
        _GATED,
        _RESIDUAL,
        _GATED + _HIGHER,
        _RESIDUAL + _HIGHER,
        _SHUT,
        _ORTHOGONAL,
    ),
    ("vanishing_gradient", "padding"): (_OPEN, _GATED, _GATED + _HIGHER, _SHUT, _ORTHOGONAL),
    ("exploding_gradient", "through_time"): (_ORTHOGONAL, _SUITE, _GATED, _CLIP, _LOWER),
    ("exploding_gradient", "large_weights"): (_INITIALIZE, _INITIALIZE + _NORMALIZE, _NORMALIZE, _LOWER),
    ("exploding_gradient", "depth"): (_NORMALIZE, _RESIDUAL, _INITIALIZE, _RESIDUAL + _NORMALIZE, _LOWER),
    ("exploding_gradient", "input_scale"): (_STANDARDIZE, _STANDARDIZE + _INITIALIZE, _LOWER, _LOWEST),
    ("exploding_gradient", "update_too_large"): (_LOWER, _LOWEST, _SUITE, _WARM_UP + _LOWER, _MAX_NORM),
    ("dead_units", "input_scale"): (_STANDARDIZE, _STANDARDIZE + _INITIALIZE, _NORMALIZE, _LEAKY),
    ("saturated_units", "input_scale"): (_STANDARDIZE, _STANDARDIZE + _INITIALIZE, _NORMALIZE, _ACTIVATE),
    ("saturated_units", "large_logits"): (_SMALL, _INITIALIZE, _NORMALIZE, _LOWER),
    ("weight_stagnation", "learning_rate_too_low"): (_HIGHER, _HIGHEST),
    ("vanishing_weights", "weight_decay"): (_NO_DECAY, _NO_DECAY + _LOWER),
}
_NONFINITE = (_SUITE, _LOWER, _ACTIVATE, _WHOLE, _STANDARDIZE, _INITIALIZE, _NORMALIZE)
_BY_KIND: Mapping[str, Sequence[tuple[Change, ...]]] = {
    "vanishing_gradient": (_ACTIVATE, _INITIALIZE, _RESIDUAL, _NORMALIZE, _ACTIVATE + _NORMALIZE),
    "exploding_gradient": (_LOWER, _INITIALIZE, _NORMALIZE, _CLIP),
    "dead_units": (_INITIALIZE, _LEAKY, _WHOLE, _NORMALIZE, _LEAKY + _LOWER, _LOWER),
    "saturated_units": (_INITIALIZE, _INITIALIZE + _NORMALIZE, _ACTIVATE, _ORTHOGONAL, _LOWER),
    "weight_stagnation": (_ACTIVATE, _NORMALIZE, _HIGHER, _INITIALIZE),
    "stuck_loss": (_HIGHER, _LOWER, _NORMALIZE, _INITIALIZE, _ACTIVATE, _WHOLE, _STANDARDIZE),
    "nonfinite_gradient": (*_NONFINITE, _EPSILON, _LOWEST),
    "nonfinite_loss": (*_NONFINITE, _ACTIVATE + _NORMALIZE, _LOWEST),
}
#: What a network with a failing criterion of the initialization needs.
_BY_CRITERION: Mapping[str, Sequence[tuple[Change, ...]]] = {
    "gradient_gain": (_SCALED, _ACTIVATE, _NORMALIZE),
    "layer_gain": (_SCALED,),
    "gain_through_time": (_OPEN, _GATED),
    "dead_units": (_INITIALIZE, _LEAKY),
    "saturated_units": (_INITIALIZE, _NORMALIZE),
    "symmetric_units": (_INITIALIZE,),
    "zero_weights": (_INITIALIZE,),
    "nonfinite_weights": (_INITIALIZE,),
    "loss_over_guessing": (_INITIALIZE, _INITIALIZE + _NORMALIZE, _NORMALIZE),
    "loss": (_INITIALIZE, _ACTIVATE + _NORMALIZE, _NORMALIZE),
}


def candidates(found: Probe) -> list[Candidate]:
    """Returns what to try for a program that fails, at most `MAX_CANDIDATES`, each fit for its module."""
    suggestions = list(_suggestions(found))
    lists = [*suggestions, *_rates_to_move(found)]
    # no factor of the rates makes good what a schedule takes away
    always = _CONSTANT if found.decay else ()
    # the first of each list, then the second of each: several symptoms share the trials
    longest = max(map(len, lists), default=0)
    ordered = [suggested[rank] for rank in range(longest) for suggested in lists if rank < len(suggested)]
    # with what helps against several symptoms, weights move at the rate that they have
    ordered[len(lists) : len(lists)] = _together(suggestions) or _together(lists)
    reason = f"the loss {'falls little' if found.learning.learns else 'is stuck'}"
    reason += "" if found.symptoms else ", and no cause was found"
    ordered += [Candidate(one, reason, not lists) for one in _BY_KIND["stuck_loss"]]
    chosen: dict[str, Candidate] = {}
    for candidate in ordered:
        fitting = _fitting(found, tuple(dict.fromkeys([*always, *candidate.changes])))
        if fitting is not None and not _contradicts(found, fitting):
            chosen.setdefault(str(sorted(map(str, fitting))), replace(candidate, changes=fitting))
    return list(chosen.values())[:MAX_CANDIDATES]


def unfit(found: Probe) -> list[str]:
    """Returns the kinds of changes that symptoms suggest, and that find no place in the module."""
    suggested = [change for one in _suggestions(found) for suggestion in one for change in suggestion.changes]
    kinds = {c.kind: applies(found.module, c, found.run_loss) for c in suggested if found.is_automatic}
    return sorted(kind for kind, fits in kinds.items() if not fits)


def _together(lists: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """Returns what is likeliest against each of several symptoms as one candidate."""
    firsts = [suggested[0] for suggested in lists if suggested]
    by_kind = {change.kind: change for one in reversed(firsts) for change in one.changes}
    reason = "; ".join(dict.fromkeys(one.reason for one in firsts))
    are_several = len(firsts) > 1 and 1 < len(by_kind) <= MAX_TOGETHER
    return [Candidate(tuple(by_kind.values()), reason)] if are_several else []


def _suggestions(found: Probe) -> Iterator[list[Candidate]]:
    if found.decay:
        yield [Candidate(_CONSTANT, found.decay)]
    yield from _of_scales(found)
    for symptom in found.symptoms:
        cause = "input_scale" if symptom.cause == "data_scale" else symptom.cause
        changes = _BY_CAUSE.get((symptom.kind, cause)) or _BY_KIND.get(symptom.kind, ())
        if changes is _BY_KIND["stuck_loss"]:
            continue  # what helps against a loss that is stuck for no known reason is tried after all else
        fitted = [_for_length(one, symptom.n_times) for one in changes]
        yield [Candidate(one, in_words(symptom)) for one in [*_estimated(symptom), *fitted]]
    for criterion in dict.fromkeys(f.criterion for f in found.initialization if f.severity == "fail"):
        unmet = next(f for f in found.initialization if f.criterion == criterion)
        yield [Candidate(one, unmet.describe()) for one in _BY_CRITERION.get(criterion, ())]
    if not math.isfinite(found.trial.loss):
        yield [Candidate(one, "the loss is nonfinite") for one in _BY_KIND["nonfinite_loss"]]


def _for_length(changes: tuple[Change, ...], n_steps: int) -> tuple[Change, ...]:
    """Returns changes with gates for sequences of a length, if it is known."""
    of_gates = {"value": forget_bias(n_steps), "input_value": input_bias(n_steps)}
    return tuple(
        Change(c.kind, {name: of_gates[name] for name in c.arguments})
        if n_steps and c.kind == "gate_bias"
        else c
        for c in changes
    )


def _of_scales(found: Probe) -> Iterator[list[Candidate]]:
    """Yields what helps if inputs, or the values that are predicted, are far from a scale of 1."""
    changes: tuple[Change, ...] = ()
    reason = ""
    if found.has_large_inputs:
        changes, reason = _STANDARDIZE, "inputs of the first layer are far from a scale of 1"
    if found.targets is not None and has_far_targets(found):
        mean, std = (float(f"{number:.4g}") for number in found.targets)
        changes = (_of("scale_output", mean=mean, std=std), *_STANDARDIZE)
        reason = f"targets have a mean of {mean:g} and a standard deviation of {std:g} (usual: 0 and 1)"
        orders = round(math.log10(TRIED_PLAIN_RATE / found.plain_rate)) if found.plain_rate > 0 else 0
        if orders:  # the rate that did for large values does not for standardized ones
            changes = (*changes, _of("learning_rate", scale=10.0**orders))
    if changes:
        yield [Candidate(one, reason) for one in dict.fromkeys((changes, changes[:2], changes[:1]))]


def has_far_targets(found: Probe) -> bool:
    """True if the values that are predicted are far from what a network gives as it is initialized."""
    mean, std = found.targets or (0.0, 1.0)
    return std > 0 and not (1 / FAR_FROM_UNIT < std < FAR_FROM_UNIT and abs(mean) < FAR_FROM_UNIT * std)


def _rates_to_move(found: Probe) -> Iterator[list[Candidate]]:
    """Yields rates at which weights move that have not moved, after what helps if gradients vanish."""
    # without a gradient nothing moves at any rate, and beside large weights, all steps are small
    others = any(s.kind == "dead_units" or s.cause == "large_weights" for s in found.symptoms)
    if 0 < found.moved < LITTLE_MOVED and not others:
        scale = 10.0 ** round(math.log10(TRIED_MOVED / found.moved))
        reason = f"no weight has gone further than {found.moved:.2g} of its norm in the whole run"
        yield [Candidate((_of("learning_rate", scale=s),), reason) for s in (scale, scale / 10)]


def _contradicts(found: Probe, changes: tuple[Change, ...]) -> bool:
    """True for a learning rate that is changed against what was measured."""
    causes = {symptom.cause for symptom in found.symptoms}
    rates = [change["scale"] for change in changes if change.kind == "learning_rate"]
    too_high = "update_too_large" in causes
    too_low = not found.decay and ("learning_rate_too_low" in causes or found.moved < LITTLE_MOVED)
    return any((rate > 1 and too_high) or (rate < 1 and too_low) for rate in rates)


def _estimated(symptom: Symptom) -> Iterator[tuple[Change, ...]]:
    """Yields the learning rate at which the measured update would be `TRIED_UPDATE` of the weights.

    One that is too low is raised further: without an adaptive step, small gradients need more.
    """
    is_rate = symptom.cause in ("update_too_large", "learning_rate_too_low")
    if is_rate and symptom.value > 0 and math.isfinite(symptom.value):
        exponent = round(math.log10(TRIED_UPDATE / symptom.value))
        more = (0, 1, 2) if symptom.cause == "learning_rate_too_low" else (0,)
        if exponent and abs(exponent) <= 6:
            yield from ((_of("learning_rate", scale=10.0 ** (exponent + n)),) for n in more)


def _fitting(found: Probe, changes: tuple[Change, ...]) -> tuple[Change, ...] | None:
    """Returns the changes that apply to the module; `None` if none does."""
    if not changes:
        return changes
    allowed = [c for c in changes if found.is_automatic or not KINDS[c.kind].needs_one_optimizer]
    allowed = [c for c in allowed if found.has_epsilon or c.kind != "epsilon"]
    applicable = [c for c in allowed if applies(found.module, c, found.run_loss)]
    applicable += [c for c in allowed if c not in applicable and _is_made_to_fit(found, c, applicable)]
    return tuple(applicable) or None


def _is_made_to_fit(found: Probe, change: Change, others: Sequence[Change]) -> bool:
    """True for a change that finds its place once others are made: gates, and known activations of blocks."""
    kinds = {other.kind: other for other in others}
    if change.kind == "gate_bias":
        return "rnn_to_gru" in kinds
    if change.kind != "add_residual" or "replace_activation" not in kinds:
        return False
    replaced = places(found.module, kinds["replace_activation"], found.run_loss)
    return any(not isinstance(found.module.get_submodule(name), ACTIVATIONS) for name in replaced)


def applies(module: nn.Module, change: Change, run_loss: Callable[[], Tensor] | None) -> bool:
    """True for a change of training, and for one of the module that finds a place in it."""
    return not change.is_of_module or bool(places(module, change, run_loss))
