"""What was wrong with a run, from when to when, as hindsight knows it."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median

from lightning_gradguard.core.detectors import (
    ADVERSARIAL_DIVERGENCE_RATIO,
    EXPLOSION,
    MIN_LOSS_RATIO,
    STAGNANT,
    CollapseDetector,
    DivergenceDetector,
    SpikeDetector,
    Symptom,
    SymptomDetector,
)
from lightning_gradguard.core.incidents import label
from lightning_gradguard.core.remedies import advice_for_cause, remedies
from lightning_gradguard.report.analysis.failure import failure_cause, largest_at
from lightning_gradguard.report.analysis.outcome import CLEAR, Outcome, ends, noise_of
from lightning_gradguard.report.analysis.run_log import GradientLog, RecordedIncident, RunLog, Series
from lightning_gradguard.report.analysis.run_symptom import RunSymptom, Severity, run_symptom

#: Logged steps that detectors look at; of more, evenly spread ones.
LOOKS = 500
#: Logged steps below which a run without symptoms is too short to be called healthy.
LEAST_POINTS = 10
#: A loss that stays within this share of what it began with, over so many logged values and steps, is stuck.
STUCK, STUCK_POINTS, STUCK_STEPS = 0.02, 30, 100
#: A loss that has lost again this share of what it had learned has diverged.
UNLEARNED = 0.5
#: Levels differ if they do by this many times the noise that they have as medians.
SURE = 4.5
#: Values that a level is told from, at least.
LEAST_WINDOW = 5
#: A spike of the norm counts only this many times above where the run began: late in a run all is small.
ABOVE_START = 10.0
#: A loss spike counts from this share of where the loss began.
SPIKE_FLOOR = 0.25
#: Share of steps clipped that is all the time, and coefficients that are hard.
ALWAYS, HARD = 0.9, 0.5
#: A learning-rate scale that has fallen to this, and not come back.
BACKED_OFF = 1 / 8
#: Share of nonfinite steps that is no accident any more.
OFTEN = 0.05
#: What was found out about so many batches is told in full.
DETAILS = 5
#: Spikes that are no accident any more.
SPIKES = 3

#: What was done, not what was wrong.
_ANSWERS = ("rollback", "learning_rate_backoff", "training_diverged", "lost_batch")
_INITIAL = ("poor_initialization", "dead_units", "saturated_units")


def symptoms_of(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Everything that was wrong, in no order.

    Args:
        log: What the run logged.
        outcome: How it ended.
    """
    found = [] if outcome.died_at is None else [failure_cause(outcome.died_at, log)]
    for gradients in log.gradients:
        found += _explosion(log, gradients, outcome)
        found += _lasting(gradients, outcome)
        found += _collapse(gradients, outcome)
        found += _constant_clipping(gradients, outcome)
    found += _divergence(log, outcome)
    found += _stuck_loss(log, outcome)
    found += _nonfinite_now_and_then(log, outcome)
    found += _spikes(log, outcome)
    found += _falling_learning_rate(log, outcome)
    yield from found
    yield from _incidents(log, outcome, {symptom.kind for symptom in found})


def _explosion(log: RunLog, gradients: GradientLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Norms far above those before them, in a run that went on."""
    points = gradients.total.finite()
    if outcome.died_at is not None or not points:
        return
    norms = [value for _, value in points]
    start, end = ends(norms)
    # what learns at once has small norms within the first tenth; the next hard batch is no explosion
    start = max(start, median(norms[:3]))
    least = max(ABOVE_START * start, EXPLOSION * min(norms))
    peaks = [
        (value, step, usual)
        for i, (step, value) in enumerate(points)
        if i and value > least and value / EXPLOSION > (usual := median(norms[max(i - 100, 0) : i])) > 0
    ]
    if not peaks:
        return
    value, step, usual = max(peaks)
    where, share = largest_at(step, gradients)
    evidence = (
        f"the total norm reached {value:.3g} at step {step}, those before were about {usual:.3g}{share}"
    )
    if len(peaks) > 1:
        evidence += f"; {len(peaks)} such steps up to step {max(step for _, step, _ in peaks)}"
    clipped = gradients.clipped.at(step)
    was_clipped = clipped is not None and clipped < value
    if was_clipped:
        evidence += f"; clipping brought it down to {clipped:.3g}"
    is_handled = was_clipped or any(times > 0 for times in log.rollbacks.values[-1:])
    severity: Severity = "handled" if is_handled else "minor"
    if not outcome.has_learned and (end > EXPLOSION * start or not is_handled):
        severity = "serious"
    since = min(step for _, step, _ in peaks)
    yield run_symptom("exploding_gradient", severity, since, evidence, value, where)


def _lasting(gradients: GradientLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """What the detectors find and, shown the last third alone, find again."""
    steps = _thinned(sorted({s for series in gradients.layers.values() for s in series.steps}))
    late = {symptom.kind: symptom for _, symptom in _alarms(steps[-len(steps) // 3 :], gradients)}
    for since, symptom in _alarms(steps, gradients):
        now = late.pop(symptom.kind, None)
        if now is None:
            continue
        if now.kind == "weight_stagnation":
            evidence = f"its updates are below {STAGNANT:g} of its norm from step {since} to the end"
            if len(now.where) > 1:
                evidence = f"{len(now.where)} layers or more: {evidence}"
        else:
            evidence = _profile_in_words(gradients, now.value)
        severity: Severity = "minor" if outcome.has_learned else "serious"
        yield run_symptom(now.kind, severity, since, evidence, now.value, now.where)


def _alarms(steps: Sequence[int], gradients: GradientLog) -> Iterator[tuple[int, Symptom]]:
    """The first alarm of each kind of a detector that is shown these steps."""
    if not steps:
        return
    persistence_steps = min(20, (steps[-1] - steps[0]) // 2)
    detector = SymptomDetector(warmup_steps=0, persistence_steps=persistence_steps)
    told = set()
    for step in steps:
        names, grads = _layers_at(step, gradients)
        # where no weights were logged, norms of gradients have to do
        unknown = 0.0 if gradients.weights else 1.0
        weights = [_at(gradients.weights, name, step, unknown) for name in names]
        ratios = [_at(gradients.ratios, name, step, math.inf) for name in names]
        for symptom in detector.update(
            step,
            names=names,
            is_matrix=_are_matrices(names),
            grad_norms=grads,
            weight_norms=weights,
            update_ratios=ratios,
            # for jumps of the total norm, for the loss and for nonfinite values there are rules of their own
            total_norm=math.nan,
            loss=math.nan,
            nonfinite_fraction=0.0,
        ):
            if symptom.kind not in told:
                told.add(symptom.kind)
                yield max(step - persistence_steps, steps[0]), symptom


def _profile_in_words(gradients: GradientLog, profile: float) -> str:
    names = [name for name, series in gradients.layers.items() if series.last_half()]
    layers = [name for name, is_matrix in zip(names, _are_matrices(names), strict=True) if is_matrix][:-1]
    first, last = layers[0], layers[-1]
    ends = [f"{median(gradients.layers[name].last_half()):.2g} at {name}" for name in (last, first)]
    change = "lose" if profile > 0 else "gain"
    decades = "everything" if math.isinf(profile) else f"{abs(profile):.1f} decades"
    return f"on the way back gradients {change} {decades}: {ends[0]}, {ends[1]}"


def _collapse(gradients: GradientLog, outcome: Outcome) -> Iterator[RunSymptom]:
    detector = CollapseDetector()
    # with hindsight, a network that has never lived is dead as well
    detector.update(is_collapsed=False)
    has_died = False
    since: int | None = None
    for step in _thinned(gradients.total.steps):
        names, grads = _layers_at(step, gradients)
        matrices = [g for g, is_matrix in zip(grads, _are_matrices(names), strict=True) if is_matrix]
        is_collapsed = bool(matrices) and not any(matrices) and any(grads)
        since = (step if since is None else since) if is_collapsed else None
        has_died = detector.update(is_collapsed)
    if has_died and since is not None and not outcome.has_learned:
        evidence = f"no weight matrix has had a gradient since step {since}, while biases still do"
        yield run_symptom("gradient_collapse", "serious", since, evidence, 0.0)


def _constant_clipping(gradients: GradientLog, outcome: Outcome) -> Iterator[RunSymptom]:
    fractions = gradients.clip_fraction.last_half()
    coefficients = gradients.clip_coefficient.last_half()
    if not fractions:
        return
    share = sum(fractions) / len(fractions)
    usual = median(coefficients) if coefficients else 0.0
    if share < ALWAYS or usual > HARD:
        return
    evidence = f"{share:.0%} of the steps in the second half were clipped, to {usual:.2g} times their norm"
    is_sure = len(fractions) >= LEAST_POINTS and not outcome.has_learned
    severity: Severity = "serious" if is_sure else "minor"
    since = gradients.clip_fraction.steps[len(gradients.clip_fraction) // 2]
    yield run_symptom("constant_clipping", severity, since, evidence, share)


def _divergence(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """A loss that ends far above where it began, or far above where it has been."""
    points = log.loss.finite()
    losses = [value for _, value in points]
    if outcome.died_at is not None or len(losses) < LEAST_POINTS:
        return
    first, final = ends(losses)
    window = max(len(losses) // 10, LEAST_WINDOW)
    starts = range(0, len(losses) - window + 1, max(window // LEAST_WINDOW, 1))
    best, at = min((median(losses[i : i + window]), points[i][0]) for i in starts)
    had_learned = _is_far_above(first, best, losses, 10)
    if had_learned:
        has_risen = final - best > UNLEARNED * (first - best) and _is_far_above(final, best, losses, 10)
    else:
        # a jump at the end shows in tenths, a slow rise among noise in thirds
        has_risen = any(_is_far_above(*ends(losses, share)[::-1], losses, share) for share in (10, 3))
    # rivals take from each other what they have learned
    if not has_risen or (len(log.gradients) > 1 and not _rivals_lose(log)):
        return
    low = best if had_learned else first
    since = _last_rise(points, (low + final) / 2)
    evidence = f"the loss began at {first:.3g} and ended at {final:.3g}"
    if had_learned:
        evidence = f"the loss had fallen from {first:.3g} to {best:.3g} (step {at}) and ended at {final:.3g}"
    yield run_symptom("divergence", "serious", since, evidence, final)


def _is_far_above(high: float, low: float, losses: Sequence[float], share: int) -> bool:
    """Whether a level is above another by more than half of it, and by more than the noise of the series.

    Args:
        high: Median of a part of the losses.
        low: That of another.
        losses: All of them.
        share: How many such parts there are.
    """
    n = max(len(losses) // share, 1)
    # the noise of a difference of two medians
    scale = SURE * math.sqrt(math.pi / n)
    if min(losses) > 0:
        return math.log(high) - math.log(low) > max(
            math.log(MIN_LOSS_RATIO), scale * noise_of([*map(math.log, losses)])
        )
    return high - low > max((MIN_LOSS_RATIO - 1) * abs(low), scale * noise_of(losses))


def _rivals_lose(log: RunLog) -> bool:
    """Whether networks trained against each other have lost more than they take from each other."""
    detector, ratio = DivergenceDetector(), 0.0
    totals = [g.total for g in log.gradients]
    for step, loss in log.loss.finite():
        norms = [norm for total in totals if (norm := total.at(step)) is not None and math.isfinite(norm)]
        ratio = detector.update(loss, max(norms, default=1.0))
    return ratio > ADVERSARIAL_DIVERGENCE_RATIO


def _last_rise(points: Sequence[tuple[int, float]], level: float) -> int:
    """The step after which the loss was above a level, but for single values."""
    below = [i for i, (_, value) in enumerate(points) if value < level]
    # noise falls below now and then: what counts is when most of what follows is above
    for i in below[::-1]:
        if median(value for _, value in points[max(i - LEAST_WINDOW, 0) : i + 1]) < level:
            return points[min(i + 1, len(points) - 1)][0]
    return points[0][0]


def _stuck_loss(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    points = log.loss.finite()
    is_long = len(points) >= STUCK_POINTS and points[-1][0] - points[0][0] >= STUCK_STEPS
    if outcome.died_at is not None or not is_long or len(log.gradients) > 1:
        return
    losses = [value for _, value in points]
    first, final = ends(losses)
    if abs(first - final) > STUCK * abs(first) or abs(first - final) > CLEAR * noise_of(losses):
        return
    evidence = f"the loss began at {first:.4g} and ended at {final:.4g}, {outcome.steps} steps later"
    ratios = [median(known) for g in log.gradients for s in g.ratios.values() if (known := s.last_half())]
    still = sum(ratio < STAGNANT for ratio in ratios)
    if 2 * still > len(ratios):
        evidence += f"; {still} of {len(ratios)} weights stood still"
        yield run_symptom("stuck_loss", "serious", points[0][0], evidence, final)
    else:
        evidence += ": it is stuck, or had converged before"
        yield run_symptom("stuck_loss", "minor", points[0][0], evidence, final)


def _nonfinite_now_and_then(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Nonfinite steps that nobody has written down, in a run that went on."""
    told = any(i.kind.startswith("nonfinite") or i.kind == "amp_overflow" for i in log.incidents)
    if outcome.died_at is not None or told:
        return
    seen = [("nonfinite_loss", log.loss)]
    seen += [("nonfinite_gradient", g.total) for g in log.gradients]
    for kind, series in seen:
        sick = [i for i, value in enumerate(series.values) if not math.isfinite(value)]
        if not sick:
            continue
        late = [i for i in sick if i >= len(series) // 2]
        severity: Severity = "serious" if len(late) > OFTEN * len(series) / 2 else "minor"
        evidence = (
            f"{len(sick)} of {len(series)} logged values, from step {series.steps[sick[0]]} "
            f"to step {series.steps[sick[-1]]}; the run went on"
        )
        yield run_symptom(kind, severity, series.steps[sick[0]], evidence, math.nan)
        return


def _spikes(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Loss and total norm both far above their recent past."""
    if outcome.died_at is not None or any(i.kind == "loss_spike" for i in log.incidents):
        return
    losses, norms = SpikeDetector(), SpikeDetector()
    spikes: list[tuple[int, float]] = []
    totals = [g.total for g in log.gradients if len(g.total)]
    for step, loss in log.loss.finite():
        known = [norm for total in totals if (norm := total.at(step)) is not None]
        seen = [losses.update(loss), *(norms.update(max(known)) for _ in known[:1])]
        is_new = not spikes or step - spikes[-1][0] > 10
        if all(seen) and is_new and loss > SPIKE_FLOOR * abs(outcome.first_loss or 0.0):
            spikes.append((step, loss))
    if spikes:
        step, value = max(spikes, key=lambda spike: spike[1])
        severity: Severity = "serious" if len(spikes) >= SPIKES and not outcome.has_learned else "minor"
        times = "once" if len(spikes) == 1 else f"{len(spikes)} times"
        evidence = f"{times}, the highest at step {step} with a loss of {value:.3g}"
        yield run_symptom("loss_spike", severity, spikes[0][0], evidence, value)


def _falling_learning_rate(log: RunLog, outcome: Outcome) -> Iterator[RunSymptom]:
    """Cuts from which the rate has not come back."""
    points = log.backoff_scale.finite()
    if not points:
        return
    scales = [scale for _, scale in points]
    told = [i for i in log.incidents if i.kind == "learning_rate_backoff"]
    if told:
        # right after a cut the rate is re-warmed from a tenth of what the incident tells
        cuts, level = [i.step for i in told], told[-1].value or scales[-1]
    else:
        lows = [step for i, (step, scale) in enumerate(points) if scale < min(scales[:i], default=0.0)]
        cuts, level = lows, scales[-1]
    if len(cuts) < 2 or max(level, scales[-1]) > BACKED_OFF:
        return
    evidence = f"lowered {len(cuts)} times since step {cuts[0]}, to {level:.2g} of what was asked for"
    severity: Severity = "minor" if outcome.has_learned else "serious"
    yield run_symptom("falling_learning_rate", severity, cuts[0], evidence, level)


def _incidents(log: RunLog, outcome: Outcome, known: set[str]) -> Iterator[RunSymptom]:
    """What was written down while the run was on, and is not yet told."""
    by_kind: dict[str, list[RecordedIncident]] = defaultdict(list)
    for incident in log.incidents:
        by_kind[incident.kind].append(incident)
    wrong = [kind for kind in by_kind if kind not in _ANSWERS and kind not in known]
    last = next((i.kind for i in reversed(log.incidents) if i.kind in wrong), None)
    on_rollback = {step for i in by_kind["rollback"] for step in (i.step - 1, i.step)}
    stops = by_kind["training_diverged"]
    if outcome.was_stopped and stops and not wrong and not known:
        yield _incident_symptom("training_diverged", "fatal", stops)
    for kind in wrong:
        if outcome.died_at is not None and kind.startswith("nonfinite"):
            continue  # what follows from the death that is told
        members = by_kind[kind]
        answered = [i for i in members if i.action not in ("none", "stopped") or i.step in on_rollback]
        severity: Severity = "minor"
        if outcome.was_stopped and kind == last:
            severity = "fatal"
        elif answered:
            severity = "handled"
        elif kind in _INITIAL and not outcome.has_learned:
            severity = "serious"
        yield _incident_symptom(kind, severity, members)


def _incident_symptom(kind: str, severity: Severity, members: Sequence[RecordedIncident]) -> RunSymptom:
    causes = Counter(i.cause for i in members if i.cause)
    cause, times = causes.most_common(1)[0] if causes else ("", 0)
    example = next(i for i in reversed(members) if i.cause == cause)
    steps = [i.step for i in members]
    first, last = min(steps), max(steps)
    often = "once" if len(members) == 1 else f"{len(members)} times"
    evidence = f"{often}, at step {first}" if first == last else f"{often}, from step {first} to {last}"
    answers = Counter(i.action for i in members if i.action != "none")
    evidence += "".join(f"; {n} {label(action)}" for action, n in answers.items())
    if cause:
        evidence += (
            f"; cause: {label(cause)}" if times == len(members) else f"; cause of {times}: {label(cause)}"
        )
        details = dict.fromkeys(i.detail.rstrip(".") for i in members if i.cause == cause and i.detail)
        evidence += f": {_several([*details])}" if details else ""
    value = math.nan if example.value is None else example.value
    told = advice_for_cause(cause, example.where)
    # a kind of somebody's own brings its advice along
    todo = (told,) if told else remedies(kind, example.where) or tuple(filter(None, [example.advice]))
    return RunSymptom(kind, example.where, value, severity, first, evidence, todo)


def _several(texts: Sequence[str]) -> str:
    more = len(texts) - DETAILS
    return "; ".join(texts[:DETAILS]) + (f"; and {more} more" if more > 0 else "")


def _layers_at(step: int, gradients: GradientLog) -> tuple[list[str], list[float]]:
    norms = {name: series.at(step) for name, series in gradients.layers.items()}
    known = {name: norm for name, norm in norms.items() if norm is not None}
    return list(known), list(known.values())


def _at(family: Mapping[str, Series], name: str, step: int, default: float) -> float:
    value = family[name].at(step) if name in family else None
    return default if value is None else value


def _are_matrices(names: Iterable[str]) -> list[bool]:
    """Which names are those of layers' weights, as far as names tell it; modules all are."""
    names = list(names)
    if not any(re.search(r"(^|\.)(weight|bias)", name) for name in names):
        return [True] * len(names)
    return [
        not re.search(r"bias[^.]*$|(^|[._])(norm|bn|ln|batch_?norm|layer_?norm)[_\d]*\.", name, re.IGNORECASE)
        for name in names
    ]


def _thinned(steps: Sequence[int]) -> Sequence[int]:
    """At most `LOOKS` of them."""
    return steps[:: math.ceil(len(steps) / LOOKS) or 1]
