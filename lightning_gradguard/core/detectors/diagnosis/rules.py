"""The rules: each yields the symptoms that one sample shows, to be confirmed by others."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Literal

from lightning_gradguard.core.detectors.best_constant import LEARNS, STUCK
from lightning_gradguard.core.detectors.diagnosis import depth
from lightning_gradguard.core.detectors.diagnosis.clipped import CLIPPED_FAR
from lightning_gradguard.core.detectors.diagnosis.contracts import (
    ALIKE,
    CONTRACT,
    SOME_UNREACHABLE,
    broken_contracts,
    has_no_gradient,
    mistakes,
)
from lightning_gradguard.core.detectors.diagnosis.progress import Progress
from lightning_gradguard.core.detectors.diagnosis.sample import CLIPPED_AT_ALL, MIN_TIMES, Sample, UnitSignal
from lightning_gradguard.core.detectors.diagnosis.signals.units import PASS_SMALL, RECTIFIERS
from lightning_gradguard.core.detectors.diagnosis.symptom import Symptom, describe_updates, modules_of
from lightning_gradguard.core.incidents import Cause, IncidentKind, SymptomCause

# thresholds of docs/diagnosis.md
DEAD, SATURATED, SATURATED_ROWS = 0.9, 0.5, 0.8
LARGE_UPDATE, HUGE_UPDATE, CLIPPED_UPDATE = 0.1, 0.3, 0.05
#: Steps in which updates are examined, and in which gates may be saturated while the loss falls.
UPDATE_STEPS, GATE_STEPS = 50, 100
#: Steps of a network that is nearly as it was initialized, and a decrease of the loss, relative to itself,
#: that is far beyond that of stable steps.
FIRST_STEPS, OVERSHOOT = 3, 16.0
#: Size of an update below which it explains a loss that is stuck.
LOW_UPDATE = 1e-4
#: Loss over the first one from which on an update has made it worse.
RISEN = 2.0
UNRELATED = 0.02
#: The same for a loss that is worse than a constant's, as under much noise, and for one that is better.
WORSE, UNRELATED_IF_WORSE = 1.0, 0.05
BETTER, UNRELATED_IF_BETTER = 0.99, 0.01
#: Rms of a layer's output up to which units after it that pass small inputs are small and not dead.
SMALL_OUTPUT = 0.1
LARGE_INPUT = 10.0
#: Rms of the inputs below which they explain a loss that is stuck.
SMALL_INPUT = 0.01
#: Largest rms of a column over the median one beyond which columns have different units.
UNEQUAL_COLUMNS = 50.0
#: Rms of the targets, and its ratio to that of the answers, from which on they are too large for the network.
LARGE_TARGET, FAR_TARGET = 100.0, 10.0
#: Power of the steps by which answers grow at most, as where three layers are moved.
GROWTH = 3
#: Ratio of the answers to the targets from which on the forward pass explodes; that of the loss of classes
#: to that of guessing, and the steps in which a network may come back from there.
FAR_ANSWER, FAR_GUESS, FIRST_GUESSES = 1e3, 5.0, 20
#: Spread of the answers over their size below which they are nearly the same, and that of answers that are no
#: better than a constant, and the loss over that of the constant up to which it is one.
SAME_ANSWERS, SAME_BESIDE, AT_CONSTANT = 0.03, 0.15, 1.2
#: Step from which on other terms are nearly gone for good, or tiny inputs explain that nothing is learned.
PRESSED_STEPS = 20
#: Spread of all losses over the first one up to which a loss is flat, and steps of updates of this size, over
#: the weights, after which it is so for good.
FLAT, FLAT_STEPS, MOVING = 0.003, 35, 1e-3
#: Steps after which a loss that has become worse than a constant's is no slow start.
WORSE_STEPS = 35
#: Nouns of rows of weights, and of what gates.
_ROWS, _GATES = "rows of the attention", "gates of the softmax"
#: Units that are no outputs of an activation.
_NOUNS = {kind: kind for kind in ("input gates", "update gates", "output gates", "candidates")} | {
    "attention": _ROWS,
    "softmax": _GATES,
}


def dead_or_saturated_units(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields layers whose units are dead or saturated."""
    no_gradient = has_no_gradient(sample, progress)
    grows = any(depth.grows(time) for time in sample.times)
    # behind weights of zero, or dead units, units are not dead of themselves
    outputs = {layer.name: layer.output for layer in sample.layers}
    groups: dict[tuple[str, str, str], list[UnitSignal]] = defaultdict(list)
    for signal in sample.units:
        groups[signal.layer, signal.module, signal.function].append(signal)
    dead, saturated = [], []
    for (layer, module, function), members in groups.items():
        is_head = members[-1].is_head or layer in sample.head  # of a critic, another call follows
        names = tuple(dict.fromkeys(filter(None, (layer, module))))
        share = min((s.dead for s in members if not math.isnan(s.dead)), default=0.0)
        is_silent = outputs.get(layer, 1.0) <= (SMALL_OUTPUT if function in PASS_SMALL else 0)
        if share >= DEAD and not is_silent and (not is_head or no_gradient):
            dead.append((share, names, "units"))
        share = min((s.saturated for s in members if not math.isnan(s.saturated)), default=0.0)
        noun = _NOUNS.get(function, "units")
        if share <= SATURATED and len(members) >= MIN_TIMES and not grows:
            share, noun = mean(s.outputs for s in members), "gates"  # by hand: other ones at each time
        is_harmless = is_head and not no_gradient and not progress.over_constant > LEARNS
        starts_well = sample.step < GATE_STEPS and progress.over_first < LEARNS
        is_harmless |= noun != "units" and (progress.learns or starts_well)
        is_harmless |= noun == _GATES and is_head  # probabilities of classes
        is_harmless |= progress.has_converged
        is_stuck = sample.step >= PRESSED_STEPS and progress.over_constant > STUCK
        bound = SATURATED_ROWS if noun in (_ROWS, _GATES) and not is_stuck else SATURATED
        if share > bound and not is_harmless:
            saturated.append((share, names, noun))
    origin = input_cause(sample)
    inputs = size_of_data(sample)
    if dead:
        share, where, _ = _first(dead)
        evidence = (
            f"{share:.0%} of the units of {where[0]} are zero for every sample (usual: below 60 %){inputs}"
        )
        is_certain = share == 1 and sample.step >= UPDATE_STEPS  # nothing passes, and samples are far apart
        where = _with_entry(where, origin, sample)
        yield Symptom("dead_units", origin, where, share, evidence, "units", 1 if is_certain else 2)
    elif inactive := inactive_output(sample, progress):
        yield inactive
    if saturated:
        share, where, noun = _first(saturated)
        evidence = f"{share:.0%} of the {noun} of {where[0]} are saturated (usual: below 25 %){inputs}"
        cause = "large_logits" if noun == _ROWS and origin == "unknown" else origin
        where = _with_entry(where, cause, sample)
        yield Symptom("saturated_units", cause, where, share, evidence, "units")


def _with_entry(where: tuple[str, ...], cause: str, sample: Sample) -> tuple[str, ...]:
    """Returns layers with the first one, which a normalization of the inputs is put before."""
    is_of_inputs = cause in ("input_scale", "data_scale")
    return tuple(dict.fromkeys([*sample.entry, *where]))[:5] if is_of_inputs else where


def input_cause(sample: Sample) -> Literal["input_scale", "data_scale", "unknown"]:
    """Returns the cause that lies in the scale of the inputs, alone or with the targets; or `"unknown"`."""
    largest, usual, _ = sample.columns or (0.0, 0.0, 0.0)
    is_unequal = largest > LARGE_INPUT and largest > UNEQUAL_COLUMNS * usual
    if not (sample.input_rms > LARGE_INPUT or is_unequal):
        return "unknown"
    return "data_scale" if largest_target(sample) > LARGE_TARGET else "input_scale"


def largest_target(sample: Sample) -> float:
    """Returns the largest rms of the targets of a regression; 0 without one."""
    return max((call.target for call in sample.calls if not math.isnan(call.target)), default=0.0)


def inactive_output(sample: Sample, progress: Progress) -> Symptom | None:
    """Returns an output behind a rectifier that gets no gradient from the samples with a higher target.

    Its gradient has one sign, as the rectifier is flat for the others, and the loss is above that of a
    constant. Targets below zero, which a rectifier does not reach, look alike and are excluded.
    """
    heads = [layer for layer in sample.layers if layer.is_last]
    is_rectified = any(layer.activation in RECTIFIERS for layer in heads)
    reaches = all(call.flags.get("unreachable_targets", 0.0) < SOME_UNREACHABLE for call in sample.calls)
    if not (is_rectified and sample.one_signed and reaches and sample.step >= UPDATE_STEPS):
        return None
    if not progress.over_constant > STUCK:
        return None
    name, ratio = heads[0].name, progress.over_constant
    evidence = (
        f"behind {heads[0].activation}, {name} gets a gradient of one sign only, and the loss is {ratio:.2f} "
        "times that of the best constant answer"
    )
    return Symptom("dead_units", "inactive_output", (name,), math.nan, evidence, "units", 3)


def large_updates(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields updates that are too large for the weights."""
    if sample.step > UPDATE_STEPS or progress.learns or _is_enlarged(sample):
        return
    is_rising = progress.rise > RISEN
    for one in sample.updates:
        # decay alone does not raise a loss, unless it enlarges weights
        gain = 1 / (1 - one.momentum) if one.momentum < 1 else 1.0  # momentum adds up what decay takes
        decayed = one.decay * max(one.rates, default=0.0) * gain
        enlarges = min(decayed, one.share * one.unclipped) > 2
        is_decay = (enlarges or not is_rising) and decayed > one.share * one.unclipped / 2
        after = one.share if is_decay else one.ratio
        before = after * one.unclipped
        is_huge = before > HUGE_UPDATE
        has_risen = is_rising and max(before, progress.largest_update) > HUGE_UPDATE
        is_certain = before > 1 or has_risen
        # of few weights that are far from their values, updates are large while the loss falls
        is_certain |= is_huge and progress.rise >= 1 and input_cause(sample) != "unknown"
        has_stayed = min(sample.step, sample.n_updates) >= 5 and progress.has_stayed
        is_certain |= has_stayed and len(sample.updates) == 1  # losses of players move by nature
        if before > LARGE_UPDATE and is_certain and (is_huge or after > CLIPPED_UPDATE):
            where = modules_of(one.steepest)
            if is_decay:
                does = f"shrinks weights by {before:.0%} in a step (usual: below 1 %)"
                if enlarges:
                    does = f"multiplies weights by {1 - before:.2g} in a step (usual: above 0.99)"
                evidence = f"a weight decay of {one.decay:g} {does}"
                kind: IncidentKind = "exploding_gradient" if enlarges else "vanishing_weights"
                yield Symptom(kind, "weight_decay", where, 1 - before, evidence, "update")
                continue
            cause: Cause | SymptomCause = input_cause(sample)
            if cause == "unknown":
                cause = "target_scale" if largest_target(sample) > LARGE_TARGET else "update_too_large"
            where = _with_entry(where, cause, sample)
            if cause == "target_scale":  # its answers are scaled back
                where = sample.head or where
            evidence = f"an update of {before:.2g} of the norm of the weights (usual: below 0.1)"
            if one.unclipped > CLIPPED_AT_ALL:
                evidence += f", {after:.2g} after clipping{one.by_clippers}"
            if is_rising:
                evidence += f"; the loss has risen to {progress.rise:.2g} times the first"
            evidence += size_of_data(sample)
            yield Symptom("exploding_gradient", cause, where, before, evidence, "update")


def overshooting_steps(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields first steps of SGD that clipping alone keeps from going far beyond where they lower the loss."""
    is_explained = any(map(depth.grows, sample.times)) or _is_enlarged(sample)
    for one in () if is_explained else sample.updates:
        promised = one.promise(sample.loss)
        if sample.step < FIRST_STEPS and promised > OVERSHOOT and one.unclipped > CLIPPED_FAR:
            far = promised / (4 * (1 + one.momentum) ** 2)
            evidence = f"a step along the gradient, of norm {one.total_norm:.3g}, goes {far:.2g} times as far"
            evidence += f" as is stable; clipping makes it {one.unclipped:,.0f} times shorter"
            origin = input_cause(sample)
            cause: Cause | SymptomCause = "update_too_large" if origin == "unknown" else origin
            where = modules_of(one.steepest) if origin == "unknown" else sample.entry
            evidence += size_of_data(sample)
            yield Symptom("exploding_gradient", cause, where, promised, evidence, "update", 1)


def far_answers(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields answers far beyond targets, or what classes need; large inputs explain them."""
    origin = input_cause(sample)
    cause: SymptomCause = "large_answers" if origin == "unknown" else origin
    where = sample.head if origin == "unknown" else sample.entry
    for call in sample.calls:
        is_far = call.answer > max(LARGE_TARGET, FAR_ANSWER * call.target) and not progress.learns
        is_far &= math.isfinite(call.answer + call.target)
        if is_far and origin == "unknown":  # else the loss that is stuck has the inputs as its cause
            sizes = f"answers is {call.answer:.2g}, that of the targets {call.target:.2g}"
            evidence = f"{call.function}: the rms of the {sizes} (usual: alike)"
            ratio = call.answer / max(call.target, 1e-45)
            yield Symptom("exploding_gradient", cause, where, ratio, evidence, "update")
        if call.value > FAR_GUESS * call.guess and sample.step >= FIRST_GUESSES:
            ratio = call.value / call.guess
            evidence = f"{call.function}: the loss is {ratio:.2g} times that of guessing (usual: below 1.2)"
            evidence += size_of_data(sample)
            yield Symptom("exploding_gradient", cause, where, ratio, evidence, "update")


def unbounded_loss(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields a loss that falls without bound, as one whose sign is wrong."""
    for call in sample.calls:
        is_negated = math.isclose(sample.loss, -call.value, rel_tol=0.01) and call.value > 0
        if is_negated and call.value > RISEN * call.constant_here:
            evidence = f"the loss is minus {call.function}, which rises: {call.value:.3g}, or "
            evidence += f"{call.value / call.constant_here:.3g} times that of the best constant answer"
            yield Symptom(
                "exploding_gradient", "unbounded_loss", sample.head, sample.loss, evidence, "update"
            )
    if progress.is_unbounded:
        evidence = f"the loss falls without bound, from {progress.first:.3g} to {sample.loss:.3g}"
        yield Symptom(
            "exploding_gradient", "unbounded_loss", sample.head, sample.loss, evidence, "update", needs=1
        )


def far_targets(sample: Sample, progress: Progress, patience: int) -> Iterator[Symptom]:
    """Yields targets that the answers have not come near, or will not: they grow by a power of the steps."""
    if sample.step < min(patience, PRESSED_STEPS):
        return
    ahead = max(patience / max(sample.step, 1), 1) ** GROWTH
    for call in sample.calls:
        if call.target > LARGE_TARGET and call.target > FAR_TARGET * ahead * call.answer:
            evidence = (
                f"{call.function}: the rms of the targets is {call.target:.2g}, that of the answers "
                f"{call.answer:.2g}"
            )
            if not math.isnan(progress.over_first):
                evidence += f", and the loss is {progress.over_first:.3g} times the first"
            cause: SymptomCause = "target_scale"
            where, value = sample.head, call.target
            if input_cause(sample) != "unknown":
                cause = "data_scale"
                value = value if math.isnan(progress.over_constant) else progress.over_constant
                where = (*sample.entry, *where)
                evidence += size_of_data(sample)
            yield Symptom("stuck_loss", cause, where, value, evidence, "contract", 2)


def of_first_losses(sample: Sample) -> Iterator[Symptom]:
    """Yields what the first sample alone shows: how losses are called, wrong dimensions, far targets."""
    yield from broken_contracts(sample, Progress())
    yield from mistakes(sample, CONTRACT["inverted_mask"][0])
    yield from far_targets(sample, Progress(), patience=0)


def same_answers(sample: Sample, progress: Progress, patience: int) -> Iterator[Symptom]:
    """Yields a network that answers all inputs alike under a loss that does not show it.

    It is one of distances between answers, or has a second term beside that of the targets.
    """
    is_worse = STUCK < progress.over_constant < AT_CONSTANT and not progress.began_whole
    is_alone = math.isnan(progress.over_constant) and not sample.meets_data
    if (sample.step < patience and not (is_alone and progress.has_collapsed)) or progress.spreads_out:
        return
    is_beside = is_worse or (is_alone and progress.has_collapsed and progress.has_converged)
    if sample.spread < (SAME_BESIDE if is_beside else SAME_ANSWERS if is_alone else 0):
        name, spread = ", ".join(sample.head), f"{sample.spread:.1g} of their size"
        evidence = f"the rows of the output of {name} differ by {spread}: all inputs get nearly one answer"
        if is_worse:
            evidence += f", and its loss is {progress.over_constant:.3g} times that of the best constant"
        needs = 3 if is_worse else 2  # most autoencoders begin with the mean of all inputs
        yield Symptom("stuck_loss", "same_answers", sample.head, sample.spread, evidence, "stuck", needs)


def stuck_loss(sample: Sample, progress: Progress, patience: int) -> Iterator[Symptom]:
    """Yields a loss that is no better than that of the best constant, or does not depend on the targets."""
    ratio, permuted = progress.over_constant, sample.permuted
    largest = max((one.ratio for one in sample.updates), default=math.nan)
    if sample.input_rms < SMALL_INPUT:
        patience = PRESSED_STEPS
    elif math.isnan(ratio) and progress.spread <= FLAT and largest > MOVING:
        patience = min(patience, FLAT_STEPS)
    elif progress.gets_worse and not math.isnan(permuted):
        patience = min(patience, WORSE_STEPS)
    if sample.step < patience or ratio <= STUCK or progress.falls or is_related(permuted, ratio):
        return
    if permuted >= UNRELATED_IF_BETTER and progress.spreads_out:
        return  # a slow start: answers begin to differ, by what is asked for
    if (
        math.isnan(ratio)
        and math.isnan(permuted)
        and progress.spread <= FLAT
        and not math.isclose(sample.loss, 0)
    ):
        evidence = f"all losses so far are within {progress.spread:.1%} of the first, {progress.first:.3g}"
        yield Symptom("stuck_loss", "unknown", sample.head, sample.loss, evidence, "stuck", 2)
    if math.isnan(permuted) and (math.isnan(ratio) or not sample.is_whole):
        return  # beside a second term, as in a VAE, a reconstruction may be no better than a constant
    if math.isnan(ratio) and permuted < -UNRELATED:
        return  # the loss depends on them, or they are flags, such as the ends of episodes
    is_unused = abs(permuted) < ALIKE and sample.spread > SAME_BESIDE and progress.over_first < LEARNS
    if math.isnan(ratio) and is_unused:
        return  # answers differ, and the loss falls without a use of the targets, as between views
    facts = []
    if not math.isnan(ratio):
        facts.append(f"the loss is {ratio:.3g} times that of the best constant answer")
    if not math.isnan(permuted):
        facts.append(f"it changes by {round(permuted, 3) + 0.0:.1%} if the targets are permuted")
    if sample.one_signed:
        facts.append("all answers lie on one side of their targets")
    has_range = any(call.flags.get("unreachable_targets", 0.0) > 0 for call in sample.calls)
    where = sample.head
    cause: Cause | SymptomCause = "unreachable_targets" if sample.one_signed and has_range else "unknown"
    is_far = input_cause(sample) != "unknown" or sample.input_rms < SMALL_INPUT
    if cause == "unknown" and is_far and sample.layers:
        # of tiny inputs, too
        cause = "data_scale" if largest_target(sample) > LARGE_TARGET else "input_scale"
        where = sample.entry
        facts += filter(None, [size_of_data(sample).strip("; ")])
    is_bounded = any(layer.is_last and layer.activation for layer in sample.layers)
    if cause == "unknown" and sample.one_signed and not is_bounded and progress.over_first < 1:
        cause = "learning_rate_too_low"  # the answers are on their way to the targets
    if cause == "unknown" and largest < LOW_UPDATE:
        cause = "learning_rate_too_low"
        facts.append(describe_updates(largest))
    if cause == "unknown" and ratio > 2 and progress.has_fallen:
        return  # on its way, however far, as where the targets are tiny
    value = permuted if math.isnan(ratio) else ratio
    yield Symptom("stuck_loss", cause, where, value, "; ".join(facts), "stuck", 2)


def size_of_data(sample: Sample) -> str:
    """Returns the size of the inputs in words, if they are large or small, and of targets that are large."""
    rms, target = sample.input_rms, largest_target(sample)
    is_usual = SMALL_INPUT <= rms <= LARGE_INPUT or math.isnan(rms)
    named = "" if sample.input_name in ("", "batch", "batch[0]") else f" {sample.input_name}"
    sizes = [] if is_usual else [f"inputs{named} have an rms of {rms:.3g}"]
    sizes += [f"targets have an rms of {target:.3g}"] if target > LARGE_TARGET else []
    return f"; {', '.join(sizes)} (usual: about 1)" if sizes else ""


def is_related(permuted: float, ratio: float) -> bool:
    """True if permuted targets raise the loss so much that it depends on them; NaN is unknown."""
    if ratio < BETTER:
        return permuted >= UNRELATED_IF_BETTER
    return permuted >= (UNRELATED_IF_WORSE if ratio > WORSE else UNRELATED)


def _is_enlarged(sample: Sample) -> bool:
    """True if dropout of most inputs enlarges those that it leaves, and gradients with them."""
    return any(cause == "dropout" for cause, *_ in sample.mistakes)


def _first(found: Sequence[tuple[float, tuple[str, ...], str]]) -> tuple[float, tuple[str, ...], str]:
    share, where, noun = found[0]
    return share, tuple(dict.fromkeys([*where, *(names[0] for _, names, _ in found[1:4])])), noun
