"""Gradients that shrink or grow from the last layer back to the first, or through time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from lightning_gradguard.core.detectors.best_constant import STUCK
from lightning_gradguard.core.detectors.depth import slope
from lightning_gradguard.core.detectors.diagnosis.progress import Progress
from lightning_gradguard.core.detectors.diagnosis.sample import MIN_TIMES, LayerSignal, Sample, TimeSignal
from lightning_gradguard.core.detectors.diagnosis.signals.units import SATURATING
from lightning_gradguard.core.detectors.diagnosis.symptom import Symptom, modules_of
from lightning_gradguard.core.incidents import IncidentKind, SymptomCause

# thresholds of docs/diagnosis.md, in decades
VANISHING, EXPLODING = -3.0, 2.5
#: Decades that explode in a network that has learned nothing by step 50.
EXPLODING_IF_STUCK = 1.75
MIN_LAYERS = 3
#: Share of the decades from which on most of them are won or lost at one layer.
ONE_JUMP = 0.5
#: Decades of a gradient of exactly zero, and of that of the next layer where no underflow explains it.
ZERO, FAR_FROM_ZERO = -45, -12
TIME_EXPLODING = 3.0
#: Steps, decades through time, and the loss over that of the best constant, from which on a gradient
#: vanishes: a network that learns gets more of it back; one that is asked for the last steps begins to learn.
TIME_VANISHING = ((150, -3.0, STUCK), (75, -6.0, STUCK), (35, -6.0, 0.985))
#: The same where the end of sequences is padding, behind which nothing may be read.
VANISHING_BY_PADDING = (10, -6.0, STUCK)
#: Loss over that of the best constant from which on one sample shows that states explode.
FAR_LOSS = 1e3
#: Decades by which a gradient that explodes through time is larger than at the outputs.
LARGER = 1.0
#: Rms of inputs of tanh up to which it is nearly linear.
LINEAR = 0.5
#: Share of the steps at the end of sequences that are all the same, as padding is.
PADDED = 0.25
#: Norm of weights over that of the default initialization, below which they explain a gradient that vanishes.
SMALL = 0.5
#: Steps after which a network that is no better than a constant has learned nothing, and after which most
#: calls of a cell that get no gradient explain that.
STUCK_STEPS, CUT_STEPS = 50, 20


def through_layers(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields gradients that shrink or grow on the way from the last layer to the first."""
    passes: dict[int, list[LayerSignal]] = defaultdict(list)
    for layer in sample.layers:
        if not (layer.is_last or math.isnan(layer.gradient)):
            # of players, one gets gradients of its own losses and of those of the other
            passes[len(layer.gradients) if len(sample.updates) > 1 else 0].append(layer)
    for layers in passes.values():
        yield from _through(layers, sample, progress)


def _through(layers: Sequence[LayerSignal], sample: Sample, progress: Progress) -> Iterator[Symptom]:
    reached = [layer for layer in layers if layer.gradient > 0]
    if reached and any(layer.gradient == 0 for layer in layers[layers.index(reached[0]) :]):
        layers = reached  # what gets none between others that do is beside them, as an adapter
    heights = [math.log10(max(layer.gradient, 1e-45)) for layer in layers]
    if len(layers) < MIN_LAYERS or max(heights) == ZERO:
        return
    ends = heights[0] - heights[-1]
    trend = -slope(list(enumerate(heights))) * (len(heights) - 1)
    if ends <= VANISHING and trend <= VANISHING / 2 and sample.step > 0:
        if zero := _cut_at(heights):
            names = [layer.name for layer in layers]
            evidence = (
                f"the gradient at {names[zero]} is {layers[zero].gradient:.2g}, and exactly zero before"
            )
            where = tuple(names[:zero][::-1])[:5]
            yield Symptom(
                "weight_stagnation", "zero_gradient", where, 0.0, evidence, "depth", is_partial=True
            )
            return
        where, drop = _steepest(layers, heights)
        evidence = (
            f"the gradient shrinks by {-ends:.1f} decades from {layers[-1].name} back to {layers[0].name} "
            f"(usual: below 2){drop}"
        )
        yield Symptom("vanishing_gradient", _why(layers, sample), where, -ends, evidence, "depth")
    is_stuck = sample.step >= STUCK_STEPS and progress.over_constant > STUCK
    bound = EXPLODING_IF_STUCK if is_stuck else EXPLODING
    if ends >= bound and trend >= bound / 2 and not _is_scaled_branch(layers, heights):
        where, rise = _steepest(layers, heights)
        evidence = (
            f"the gradient grows by {ends:.1f} decades from {layers[-1].name} back to {layers[0].name} "
            f"(usual: below 2){rise}"
        )
        yield Symptom("exploding_gradient", _why(layers, sample), where, ends, evidence, "depth")


def saturated_losses(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields networks that learn through one of another optimizer, which leaves them no gradient.

    Their loss has not fallen by it: it is flat where the other network is certain.
    """
    n_calls = {layer.name: sum(gradient > 0 for gradient in layer.gradients) for layer in sample.layers}
    for one in sample.updates:
        own = {name.rpartition(".")[0] for name in one.names}
        # the other network is called with data, too, for a step of its own
        more = max((n for name, n in n_calls.items() if name not in own), default=0)
        is_fed = more > max((n_calls.get(name, 0) for name in own), default=0)
        shrunk = progress.vanished(one)
        if is_fed and shrunk >= -VANISHING and len(sample.updates) > 1:
            where = modules_of(one.names)
            evidence = f"the gradient of {where[0]} has shrunk by {shrunk:.1f} decades, and its loss not: "
            evidence += f"it is {one.loss:.3g}"
            yield Symptom("vanishing_gradient", "saturating_loss", where, shrunk, evidence, "depth")


def cut_recurrences(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields cells in a loop that get a gradient at few steps alone, in a network that does not learn."""
    if sample.step < CUT_STEPS or not progress.over_constant > STUCK:
        return
    cut = [one for one in sample.layers if 0 < len(one.gradients) * MIN_TIMES <= one.n_attached]
    if cut:
        where, cell = tuple(layer.name for layer in cut[::-1])[:3], cut[-1]
        evidence = (
            f"of {cell.n_attached} calls of {cell.name} in one pass, {len(cell.gradients)} get a gradient"
        )
        yield Symptom("vanishing_gradient", "detached", where, len(cell.gradients), evidence, "depth")


def through_time(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields gradients that shrink or grow in a recurrent network that does not learn."""
    ratio = progress.over_constant_now
    is_flat = math.isnan(ratio) and not progress.over_first <= STUCK
    outputs = {layer.name: layer.gradient for layer in sample.layers if len(layer.gradients) == 1}
    n_calls = {layer.name: len(layer.gradients) for layer in sample.layers}
    recurrences: dict[int, float] = {}  # by their length: what passes at one layer of a cell, passes
    for time in sample.times:
        n = n_calls.get(time.name, 1)
        recurrences[n] = max(_back(time), recurrences.get(n, -math.inf))
    for time in sample.times:
        if not time.largest > 0:
            continue
        n = n_calls.get(time.name, 1)
        back = recurrences[n] if n > 1 else _back(time)
        is_padded = time.padded >= PADDED
        bounds = (*TIME_VANISHING, VANISHING_BY_PADDING) if is_padded else TIME_VANISHING
        never = (0, -math.inf, math.inf)
        _, bound, least = next((found for found in bounds if sample.step >= found[0]), never)
        if (is_flat or ratio > least) and back <= bound:
            evidence = (
                f"the gradient shrinks by {-back:.1f} decades from the last step of {time.name} to the first"
            )
            symptom = _through_time("vanishing_gradient", time, -back, evidence)
            if is_padded:
                evidence = f"{symptom.evidence}; {time.padded:.0%} of its steps, at the end, are all the same"
                symptom = replace(symptom, cause="padding", evidence=evidence)
            yield symptom
        output = outputs.get(time.name, math.nan)
        through = _decades(time.largest, output)
        if through <= VANISHING and sample.step > 0 and not progress.learns:
            evidence = f"the gradient shrinks by {-through:.1f} decades from the outputs of {time.name}"
            evidence += " to its inputs (usual: below 2)"
            yield Symptom("vanishing_gradient", "small_weights", (time.name,), -through, evidence, "depth")
        forth = _decades(time.first, time.last)
        # where each step has a loss, their gradients add up at the first one, and nothing explodes
        is_larger = not _decades(time.first, output) < LARGER
        if grows(time) and is_larger and not progress.learns:
            evidence = (
                f"the gradient grows by {forth:.1f} decades from the last step of {time.name} to the first"
            )
            symptom = _through_time("exploding_gradient", time, forth, evidence)
            if ratio > FAR_LOSS:
                loss = f"the loss is {ratio:.2g} times that of the best constant answer"
                symptom = replace(symptom, evidence=f"{symptom.evidence}; {loss}", needs=1)
            loop = [name for name, calls in n_calls.items() if calls == n > 1]
            yield replace(symptom, where=tuple(loop) or symptom.where)


def _back(time: TimeSignal) -> float:
    """Returns the decades by which the gradient is smaller at the first step than at any."""
    return _decades(time.first, time.largest)


def grows(time: TimeSignal) -> bool:
    """True if the gradient grows back through time, as where the states grow."""
    return _decades(time.first, time.last) >= TIME_EXPLODING


def _through_time(kind: IncidentKind, time: TimeSignal, value: float, evidence: str) -> Symptom:
    found = f"{evidence} (usual: below {TIME_EXPLODING:g})"
    return Symptom(kind, "through_time", (time.name,), value, found, "depth", n_times=time.n_times)


def _why(layers: Sequence[LayerSignal], sample: Sample) -> SymptomCause:
    """Returns the likeliest cause of a gradient that shrinks or grows with depth."""
    outputs = [math.log10(layer.output) for layer in layers if layer.output > 0]
    if outputs and outputs[0] - outputs[-1] > 1:
        return "small_weights"
    if outputs and outputs[-1] - outputs[0] > 1:
        return "large_weights"
    flat = [layer for layer in layers if layer.activation in SATURATING]
    if len(flat) <= len(layers) / 2:
        # biases may keep up outputs
        return "small_weights" if _size_of_weights(layers, sample) < SMALL else "depth"
    # around 0, tanh and its like pass all of the gradient, a sigmoid a quarter
    is_linear = all(not f.activation.endswith("sigmoid") and f.output < LINEAR for f in flat)
    return "small_weights" if is_linear else "saturating_activations"


def _size_of_weights(layers: Sequence[LayerSignal], sample: Sample) -> float:
    """Returns the median norm of the layers' weights over that of the default initialization."""
    names = {layer.name for layer in layers}
    sizes = [
        weight / default
        for one in sample.updates
        for name, weight, default in zip(one.names, one.weights, one.default_norms, strict=False)
        if default > 0 and name.rpartition(".")[0] in names
    ]
    return median(sizes) if sizes else math.nan


def _cut_at(heights: Sequence[float]) -> int:
    """Returns the index of the layer before which no gradient is left, 0 if it only shrinks."""
    n_zero = next(i for i, height in enumerate(heights) if height > ZERO)
    return n_zero if heights[n_zero] > FAR_FROM_ZERO and ZERO not in heights[n_zero:] else 0


def _is_scaled_branch(layers: Sequence[LayerSignal], heights: Sequence[float]) -> bool:
    """True if most of a growth is at one layer whose output is no larger: little of it reaches the loss.

    The end of a residual branch may be scaled by 1e-6, or 0, at the start. Where weights or a normalization
    amplify the gradient, they amplify the output too.
    """
    share, at = _largest_jump(heights)
    before, after = layers[at].output, layers[at + 1].output
    jump = share * (heights[0] - heights[-1])
    return share >= ONE_JUMP and not _decades(after, before) >= jump / 2


def _largest_jump(heights: Sequence[float]) -> tuple[float, int]:
    """Returns the largest share of the change that is between two layers, and the index of the first."""
    ends = heights[0] - heights[-1]
    return max(((heights[i] - heights[i + 1]) / ends, i) for i in range(len(heights) - 1))


def _steepest(layers: Sequence[LayerSignal], heights: Sequence[float]) -> tuple[tuple[str, ...], str]:
    """Returns the layers at fault: the one at which most is lost or won, then the first ones."""
    names = [layer.name for layer in layers]
    share, at = _largest_jump(heights)
    if share < ONE_JUMP or len(heights) == 2:
        return tuple(names[:3]), ""
    order = dict.fromkeys([names[at + 1], names[at], *names])
    return tuple(order)[:3], f", {share:.0%} of it at {names[at + 1]}"


def _decades(value: float, reference: float) -> float:
    if not reference > 0:
        return math.nan if math.isnan(reference) else 0.0
    return math.log10(max(value, 1e-45)) - math.log10(reference)
