"""The rules on weights that their optimizer hardly moves, or never, as those of layers that are frozen."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from statistics import median

from lightning_gradguard.core.detectors.best_constant import STUCK
from lightning_gradguard.core.detectors.diagnosis.clipped import CLIPPED_FAR, clipped_before, of_one_size
from lightning_gradguard.core.detectors.diagnosis.progress import Progress
from lightning_gradguard.core.detectors.diagnosis.rules import SMALL_INPUT, input_cause, size_of_data
from lightning_gradguard.core.detectors.diagnosis.sample import Sample, Update
from lightning_gradguard.core.detectors.diagnosis.symptom import Symptom, Tier, modules_of
from lightning_gradguard.core.incidents import SymptomCause

#: Update over weight below which weights hardly move, and below which one does not; see docs/diagnosis.md.
SMALL_UPDATE, NO_UPDATE = 1e-5, 1e-7
#: Norm of a gradient below which no learning rate that is in use moves a weight.
TINY_NORM = 1e-9
#: Share of the smallest update that a dtype keeps, below which most are lost, and steps of a slow start.
ROUNDED, ROUNDED_STEPS = 0.25, 100
#: Steps after which a warm-up may be too long, and the share of its norm that a weight moves at most by it.
LONG_STEPS, SHORT_WAY = 20, 0.01
#: Steps of a run that is meant to train, and loss over the first one from which on it is as it was.
SHORT_RUN, UNCHANGED = 100, 0.99


def stagnation(
    sample: Sample, progress: Progress, planned: int = 0, *, rate_changes: bool = False
) -> Iterator[Symptom]:
    """Yields weights that do not move, or hardly, also in all of the `planned` steps (0 if unknown).

    While their rate changes, they have to be those of a run that ends before they move, as in a warm-up that
    is longer than the run.
    """
    if sample.step < (LONG_STEPS if rate_changes else 5):
        return
    is_flat = sample.step >= LONG_STEPS and progress.over_first > UNCHANGED
    is_flat &= len(sample.updates) == 1 and not progress.over_constant <= STUCK and not size_of_data(sample)
    for index, one in enumerate(sample.updates):
        scheduled = one.scheduled(has_begun=progress.has_rate)
        if one.rates and not any(one.rates) and not rate_changes:
            where = modules_of(one.names[:3])
            evidence = f"the learning rate of every parameter group is 0{scheduled}"
            yield Symptom("weight_stagnation", _too_low(one, sample), where, 0.0, evidence, "stagnation", 3)
            continue
        if progress.had_no_gradient(one) and len(sample.updates) == 1 and not progress.learns:
            evidence = "the gradient of every weight has been exactly zero in all samples"
            where = modules_of(one.names)
            yield Symptom("weight_stagnation", "zero_gradient", where, 0.0, evidence, "stagnation", 2)
            continue
        matrices = [i for i, is_matrix in enumerate(one.is_matrix) if is_matrix and one.weights[i] > 0]
        if not one.ratios or not matrices or not math.isfinite(one.total_norm):
            continue
        if one.total_norm == 0 and not progress.is_constant:
            continue
        ratios = {i: one.ratios[i] for i in matrices}
        largest, where = max(ratios.values()), modules_of([one.names[i] for i in matrices[:3]])
        if rate_changes:
            moves = largest * planned**2 / (2 * sample.step)  # by a rate in proportion to the steps
            if not (0 < moves < SHORT_WAY and progress.over_constant > STUCK):
                continue
        if sample.updates_are_undone and largest > SMALL_UPDATE and not progress.learns:
            evidence = f"updates are up to {largest:.1g} of a weight's norm, and before the next step, "
            evidence += "weights are nearly what they were before"
            yield Symptom("weight_stagnation", "overwritten_weights", where, largest, evidence, "coverage", 4)
            continue
        is_late = sample.step >= ROUNDED_STEPS and progress.over_constant > STUCK
        bound = max(SMALL_UPDATE, ROUNDED * one.resolution) if is_late else SMALL_UPDATE
        is_cut_short = bool(scheduled) and sample.step < progress.ends_early and progress.is_halfway
        way = one.share * planned
        is_slow = is_flat and planned >= SHORT_RUN and not rate_changes and 0 < way < SHORT_WAY
        if (largest < bound or is_slow) and (is_cut_short or not progress.learns):
            if not any(one.gradients[i] for i in matrices):
                evidence = "the gradient of every weight matrix is exactly zero"
                yield Symptom("weight_stagnation", "zero_gradient", where, 0.0, evidence, "stagnation", 2)
                continue
            evidence = (
                f"updates are at most {largest:.1g} of any weight's norm (usual: about 1e-3){scheduled}"
            )
            if is_slow:
                evidence += f"; in all {planned} steps, weights move by at most {way:.1g} of their norm"
            is_clipped = one.unclipped > CLIPPED_FAR and largest * one.unclipped > SMALL_UPDATE
            size = clipped_before(index, progress)
            is_of_clipping = is_clipped or not math.isnan(size)
            small = "clip_value_too_small" if is_of_clipping else _too_low(one, sample)
            if small == "tiny_gradient":
                evidence += (
                    f"; the gradient has a norm of {one.total_norm:.1g}, the loss is {sample.loss:.1g}"
                )
            if small == "rounded_updates":
                evidence += f", and those below {one.resolution:.1g} of a weight are lost by rounding"
            if is_clipped:
                clipped = one.total_norm / one.unclipped
                evidence += f", as gradients of norm {one.total_norm:.3g} are clipped to {clipped:.3g}"
                evidence += one.by_clippers
            elif is_of_clipping:
                evidence += f"; {of_one_size(size)}"
            evidence += size_of_data(sample)
            yield Symptom("weight_stagnation", small, where, largest, evidence, _tier(small), 2)
            continue
        if not progress.has_converged:
            yield from _some_stagnate(one, sample, ratios)


def random_layers(
    sample: Sample, progress: Progress, patience: int, frozen: Collection[str]
) -> Iterator[Symptom]:
    """Yields random first layers that are not trained, where next to nothing of what they pass is learned."""
    ratio, untrained = progress.over_constant, tuple(one.name for one in sample.layers if one.name in frozen)
    if sample.step < patience or not ratio > STUCK or not untrained:
        return
    is_explained = input_cause(sample) != "unknown" or sample.input_rms < SMALL_INPUT
    if untrained[0] == sample.layers[0].name and sample.is_whole and not is_explained:
        evidence = (
            f"the loss is {ratio:.3g} times that of the best constant answer; the weights of the first "
            "layers are random, and have requires_grad=False"
        )
        yield Symptom("weight_stagnation", "frozen_weights", untrained[:5], ratio, evidence, "stuck", 2)


def _too_low(one: Update, sample: Sample) -> SymptomCause:
    """Returns why a learning rate moves no weight."""
    if one.has_no_rate:
        return "learning_rate_schedule"
    if sample.input_rms < SMALL_INPUT and any(one.rates):
        return "input_scale"
    if 0 < one.total_norm < TINY_NORM and any(one.rates):
        return "tiny_gradient"
    return "rounded_updates" if one.resolution > SMALL_UPDATE and any(one.rates) else "learning_rate_too_low"


def _tier(cause: SymptomCause) -> Tier:
    """Returns the tier of a cause: tiny inputs explain what units and gradients show, too."""
    return "contract" if cause == "input_scale" else "stagnation"


def _some_stagnate(one: Update, sample: Sample, ratios: dict[int, float]) -> Iterator[Symptom]:
    usual = median(ratios.values())
    still = [i for i, r in ratios.items() if r < NO_UPDATE or (r < SMALL_UPDATE / 10 and r < usual / 1e3)]
    moving = {one.names[i].rpartition(".")[0] for i in ratios if i not in still}
    still = [i for i in still if one.names[i].rpartition(".")[0] not in moving]  # a part is not needed
    if still and max(ratios.values()) > SMALL_UPDATE:
        has_gradient = any(one.gradients[i] > 0 for i in still)
        cause = _too_low(one, sample) if has_gradient else "zero_gradient"
        where = modules_of([one.names[i] for i in still[:5]])
        value = max(ratios[i] for i in still)
        evidence = f"updates of {len(still)} of {len(ratios)} weights are at most {value:.1g} of their norm"
        if not all(one.rates):
            evidence += "; the learning rate of a parameter group is 0"
        evidence += size_of_data(sample)
        yield Symptom("weight_stagnation", cause, where, value, evidence, _tier(cause), 4, is_partial=True)
