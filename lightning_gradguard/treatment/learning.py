"""Decides if a run learns: by its held-out loss against the best constant answer, and its way there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from lightning_gradguard.core.detectors.best_constant import LEARNS
from lightning_gradguard.treatment.trials.trial import Trial

#: Loss over that of the best constant answer, and over that with permuted targets, below which a run has
#: learned; docs/treat.md has the ratios of runs that do and do not.
HAS_LEARNED, HAS_LEARNED_OVER_PERMUTED = 0.5, 1 / 3
#: Final loss over the lowest of the run above which it rises again: that of small batches varies by less.
RISES = 1.5
#: Loss over that at two thirds of the run below which it still falls, unless little is left; of classes, this
#: share of the bound of a run that has learned.
FALLS, LITTLE_LEFT = 0.8, 0.5
#: Held-out loss over that of the best constant answer above which more may be learned: of classes, and of
#: values, of which that is the share of the variance that is not explained.
LEARNED_ENOUGH, LEARNED_ENOUGH_OF_VALUES = LITTLE_LEFT * HAS_LEARNED, 0.1
#: Shares of a run of what another one reaches, below which it is far behind: of its loss that is left, of the
#: probability of the right class, and of the explained part of the loss of the best constant answer. At .91
#: of two classes a run is no less healthy for one at .98, and at .68 of ten it fails beside one at .97.
LEFT_BY_OTHER, FAR_BEHIND = 0.5, 0.75
#: Recorded losses of batches, of which the mean is compared with that of another time of the run.
N_COMPARED = 10
#: Loss over that of the best constant answer above which plain learners show nothing of what can be learned:
#: of parities, they learn as little as of noise.
LITTLE_REACHED = 0.7


@dataclass(frozen=True)
class Learning:
    """The extent to which a run has learned.

    Args:
        learns: True if the held-out loss is below that of a constant answer.
        has_learned: True if it is far below, finite, and not on its way up.
        is_settled: True if it has stopped falling, or has little left to fall.
        evidence: In words.
    """

    learns: bool
    has_learned: bool
    is_settled: bool
    evidence: str


def learning_of(trial: Trial) -> Learning:
    """Returns how far a run has learned.

    Where the loss of the best constant answer is unknown, that with permuted targets takes its place, which a
    network reaches that gives the same answer to each input; without targets, nothing is certain.
    """
    if not math.isfinite(trial.loss):
        return Learning(False, False, False, trial.error or "the held-out loss is nonfinite")
    is_known, ratio, bound = _ratio_and_bound(trial)
    reference = "of the best constant answer" if is_known else "with permuted targets"
    if not math.isfinite(ratio):
        first = trial.curve[0][1]
        falls = math.isfinite(first) and trial.loss < LEARNS * first
        return Learning(falls, False, False, f"the held-out loss goes from {first:.4g} to {trial.loss:.4g}")
    # a loss close to zero may rise by a factor and is no worse
    is_low = trial.loss <= RISES * trial.lowest or ratio < bound / 2
    evidence = f"the held-out loss is {trial.loss:.4g}, {ratio:.3g} times that {reference}"
    if is_known and bound > HAS_LEARNED:
        evidence += f" (plain learners: {trial.reachable:.2f})"
    learns = ratio < LEARNS and is_low
    is_overfit = not learns and overfits(trial)
    if is_overfit or not is_low:
        evidence += f", and has risen from {trial.lowest:.4g}"
        evidence += ", while that of training batches falls: it overfits" if is_overfit else ""
    before = next((loss for step, loss in trial.curve if 3 * step >= 2 * trial.curve[-1][0]), math.inf)
    has_ended = trial.job.enough is not None and trial.loss <= trial.job.enough
    is_settled = has_ended or learned_enough(trial) or trial.loss > FALLS * before
    if not is_settled:
        evidence += f", and still falls, from {before:.4g} after two thirds of the run"
    return Learning(learns, ratio <= bound and is_low, is_settled, evidence)


def exceeds_constant(trial: Trial) -> bool:
    """True if the final held-out loss is not below that of a constant answer, or with permuted targets."""
    _, ratio, _ = _ratio_and_bound(trial)
    return ratio >= LEARNS


def learned_enough(trial: Trial) -> bool:
    """True if a run leaves so little of the loss that no more is searched for."""
    is_known, ratio, bound = _ratio_and_bound(trial)
    of_values = is_known and not trial.is_likelihood
    enough = LEARNED_ENOUGH_OF_VALUES if of_values else max(LITTLE_LEFT * bound, _reachable(trial))
    return ratio <= enough


def learned_at_lowest(trial: Trial) -> bool:
    """True if a run has learned at some time, if not at its end."""
    _, ratio, bound = _ratio_and_bound(trial)
    reference = trial.loss / ratio if math.isfinite(trial.loss) else trial.curve[0][1]
    return trial.lowest <= bound * reference


def overfits(trial: Trial) -> bool:
    """True if a run has learned, and loses it on held-out batches alone: those of training are learned on."""
    if not math.isfinite(trial.loss):
        return False
    has_learned = trial.lowest * _ratio_and_bound(trial)[1] < LEARNS * trial.loss
    lowest = min(trial.curve, key=lambda point: point[1] if math.isfinite(point[1]) else math.inf)[0]
    then = [loss for step, loss in trial.training if step <= lowest][-N_COMPARED:]
    now = [loss for _, loss in trial.training][-N_COMPARED:]
    return has_learned and bool(then) and fmean(now) < LEARNS * fmean(then)


def settled_loss(trial: Trial) -> float | None:
    """Returns the held-out loss at which a run has learned as much as this one, or has little left."""
    _, ratio, bound = _ratio_and_bound(trial)
    return (
        max(LITTLE_LEFT * bound / ratio, 1) * trial.loss if math.isfinite(trial.loss) and ratio > 0 else None
    )


def fails_beside(trial: Trial, other: Trial) -> bool:
    """True if a run has not learned, or far less, at its lowest, than another shows to be reachable."""
    if not learning_of(trial).has_learned:
        return True
    if not other.loss <= LEFT_BY_OTHER * trial.lowest:
        return False
    if trial.is_likelihood:
        return math.exp(other.loss - trial.lowest) < FAR_BEHIND
    return 1 - trial.over_constant * trial.lowest / trial.loss < FAR_BEHIND * (1 - other.over_constant)


def _reachable(trial: Trial) -> float:
    """Returns the loss over that of the best constant answer that data with noise allow; 0 if unknown."""
    return trial.reachable if trial.is_likelihood and trial.reachable <= LITTLE_REACHED else 0.0


def _ratio_and_bound(trial: Trial) -> tuple[bool, float, float]:
    is_known = math.isfinite(trial.over_constant)
    if is_known:
        explained = FAR_BEHIND * (1 - _reachable(trial))
        return is_known, trial.over_constant, max(HAS_LEARNED, 1 - explained)
    return is_known, trial.over_permuted, HAS_LEARNED_OVER_PERMUTED
