"""What hindsight knows of a run: how it ended, and what was wrong from when to when."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from lightning_gradguard.core.anomalies import EXPLOSION, STAGNANT, SpikeDetector, Symptom, SymptomDetector
from lightning_gradguard.core.diagnosis import advice_for_cause, remedies
from lightning_gradguard.core.divergence import LEAST_RISE, CollapseDetector, DivergenceDetector
from lightning_gradguard.core.recovery import WORSE_AMONG_RIVALS
from lightning_gradguard.core.run_log import GradientLog, RecordedIncident, RunLog, Series

#: Logged steps that detectors look at; of more, evenly spread ones.
LOOKS = 500
#: Logged steps below which a run without symptoms is too short to be called healthy.
LEAST_POINTS = 10
#: A loss that lost this share of what it began with has been learned from.
LEARNED = 0.2
#: A loss that stays within this share of what it began with, over so many logged values and steps, is stuck.
STUCK, STUCK_POINTS, STUCK_STEPS = 0.02, 30, 100
#: A norm as large as this ahead of NaN has exploded, even if too little was logged to compare it with.
HUGE = 1e3
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
#: Spikes that are no accident any more.
SPIKES = 3

Severity = Literal["fatal", "serious", "handled", "minor"]

#: What was done, not what was wrong.
_ANSWERS = ("rollback", "learning_rate_backoff", "training_diverged", "lost_batch")
_INITIAL = ("poor_initialization", "dead_units", "saturated_units")


@dataclass(frozen=True)
class LastingSymptom(Symptom):
    """A symptom as hindsight sees it.

    Args:
        kind: Its name, as `core.diagnosis.title` takes it.
        where: Names of the parameters or modules that show it most, the worst first.
        value: The number that gave it away.
        severity: `"fatal"`: the run ended of it. `"serious"`: it was there to the end. `"handled"`: something
            was done about it, and the run went on. `"minor"`: it is worth knowing.
        since: The step at which it showed first.
        evidence: What was seen, in one sentence.
        remedies: What to do, the likeliest first.
    """

    severity: Severity
    since: int
    evidence: str
    remedies: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        steps: How many it made, as far as they were logged.
        survived: How many of them ahead of the first from which on all was nonfinite.
        died_at: That step; `None` if there is none.
        was_stopped: Whether the suite gave it up.
        first_loss: Median of the first tenth; NaN if unknown.
        final_loss: Median of the last tenth; NaN if the run died or it is unknown.
    """

    steps: int
    survived: int
    died_at: int | None
    was_stopped: bool
    first_loss: float
    final_loss: float

    @property
    def has_learned(self) -> bool:
        """Whether the loss has fallen by a fifth at least."""
        return self.first_loss - self.final_loss > LEARNED * abs(self.first_loss)


def outcome_of(log: RunLog) -> Outcome:
    """How the run ended.

    Args:
        log: What it logged.
    """
    pulses = [log.loss] if len(log.loss) else [g.total for g in log.gradients if len(g.total)]
    everything = [s for s in (log.loss, *(g.total for g in log.gradients), log.skips) if len(s)]
    steps = max((_steps_made(series) for series in everything), default=0)
    was_stopped = any(i.kind == "training_diverged" or i.action == "stopped" for i in log.incidents)
    # while there is somebody who skips nonfinite steps, one at the end is no death
    ends = [] if len(log.skips) else [_end_of_life(series) for series in pulses]
    died_at = None if not ends or None in ends else min(end for end in ends if end is not None)
    if died_at is not None:
        totals = (_end_of_life(g.total) for g in log.gradients)
        died_at = min([died_at, *(end for end in totals if end is not None)])
    survived = steps
    if died_at is not None:
        alive = [s for series in everything for s, _ in series.finite() if s < died_at]
        survived = steps - (max(s.steps[-1] for s in everything) - max(alive)) if alive else 0
    losses = [value for _, value in log.loss.finite()]
    first, final = _ends(losses) if losses else (math.nan, math.nan)
    return Outcome(steps, survived, died_at, was_stopped, first, math.nan if died_at is not None else final)


def symptoms_of(log: RunLog, outcome: Outcome) -> Iterator[LastingSymptom]:
    """Everything that was wrong, in no order.

    Args:
        log: What the run logged.
        outcome: How it ended.
    """
    found = list(_death(log, outcome))
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


def _steps_made(series: Series) -> int:
    steps = series.steps
    # whose first step is as large as the distance to the next counts from one
    counts_from_one = len(steps) > 1 and steps[0] == steps[1] - steps[0]
    return steps[-1] + (0 if counts_from_one else 1)


def _end_of_life(series: Series) -> int | None:
    """The step from which on every value is nonfinite."""
    if not len(series) or math.isfinite(series.values[-1]):
        return None
    last = max((i for i, value in enumerate(series.values) if math.isfinite(value)), default=-1)
    return series.steps[last + 1]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and of the last tenth."""
    n = max(len(values) // 10, 1)
    return median(values[:n]), median(values[-n:])


def _death(log: RunLog, outcome: Outcome) -> Iterator[LastingSymptom]:
    died_at = outcome.died_at
    if died_at is None:
        return
    explosions = [found for g in log.gradients for found in _explosion_ahead_of(died_at, g)]
    if explosions:
        yield max(explosions, key=lambda symptom: symptom.value)
        return
    losses = [(step, value) for step, value in log.loss.finite() if step < died_at]
    last = losses[-1][0] if losses else None
    if losses and losses[-1][1] > EXPLOSION * abs(median(value for _, value in losses[:-1] or losses)):
        growth = f"from {losses[0][1]:.3g} (step {losses[0][0]}) to {losses[-1][1]:.3g} (step {last})"
        evidence = f"the loss grew {growth} and was nonfinite from step {died_at} on"
        yield _symptom("divergence", "fatal", last or 0, evidence, losses[-1][1])
        return
    sick = [name for g in log.gradients for name, s in g.layers.items() if _is_sick(s.at(died_at))]
    weights = [name for g in log.gradients for name, s in g.weights.items() if _is_sick(s.at(died_at))]
    loss = log.loss.at(died_at)
    everywhere = "all" if len(sick) == sum(len(g.layers) for g in log.gradients) else f"{len(sick)}"
    where: tuple[str, ...] = ()
    if loss is None or not math.isfinite(loss):
        kind, what = "nonfinite_loss", "the loss was nonfinite"
    elif weights and not sick:
        kind, what, where = "nonfinite_weights", f"weights of {weights[0]} were nonfinite", tuple(weights[:5])
    else:
        kind, what = "nonfinite_gradient", f"the loss was finite, {everywhere} gradients were not"
        # from the output back: the first that is sick is next to the fault
        where = () if everywhere == "all" else tuple(reversed(sick[-5:]))
    before = "from the first logged step on"
    if last is not None:
        gap = died_at - last
        before = f"from step {died_at} on; step {last} showed nothing unusual"
        before += f" (the {gap - 1} steps between were not logged)" if gap > 1 else ""
    yield _symptom(kind, "fatal", died_at, f"{what} {before}", math.nan, where)


def _explosion_ahead_of(died_at: int, gradients: GradientLog) -> Iterator[LastingSymptom]:
    before = [(step, value) for step, value in gradients.total.finite() if step < died_at]
    if not before:
        return
    norms = [value for _, value in before]
    peak_step, peak = max(before[-20:], key=lambda point: point[1])
    usual = min(median(norms), _ends(norms)[0])
    if peak <= EXPLOSION * usual and not (peak > HUGE and len(before) <= 3):
        return
    since, _ = next(p for p in before if p[1] > EXPLOSION * usual or p == (peak_step, peak))
    where, share = _largest_at(peak_step, gradients)
    start = f"grew from {norms[0]:.3g} (step {before[0][0]}) to" if len(before) > 1 else "was"
    evidence = (
        f"the total norm {start} {peak:.3g} (step {peak_step}){share}; nonfinite from step {died_at} on"
    )
    yield _symptom("exploding_gradient", "fatal", since, evidence, peak, where)


def _explosion(log: RunLog, gradients: GradientLog, outcome: Outcome) -> Iterator[LastingSymptom]:
    """Norms far above those before them, in a run that went on."""
    points = gradients.total.finite()
    if outcome.died_at is not None or not points:
        return
    norms = [value for _, value in points]
    start, end = _ends(norms)
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
    where, share = _largest_at(step, gradients)
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
    if end > EXPLOSION * start or not (outcome.has_learned or is_handled):
        severity = "serious"
    since = min(step for _, step, _ in peaks)
    yield _symptom("exploding_gradient", severity, since, evidence, value, where)


def _largest_at(step: int, gradients: GradientLog) -> tuple[tuple[str, ...], str]:
    """Layers by their norm at a step, and the share of the first in words."""
    norms = {name: series.at(step) for name, series in gradients.layers.items()}
    known = {name: norm for name, norm in norms.items() if norm is not None and math.isfinite(norm)}
    where = tuple(sorted(known, key=lambda name: -known[name])[:5])
    total = gradients.total.at(step)
    if not where or not total:
        return where, ""
    share = (known[where[0]] / total) ** 2
    how_much = "nearly all" if share > 0.9 else "most" if share > 0.5 else "the largest part"
    return where, f", {how_much} of it in {where[0]}"


def _lasting(gradients: GradientLog, outcome: Outcome) -> Iterator[LastingSymptom]:
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
        yield _symptom(now.kind, severity, since, evidence, now.value, now.where)


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


def _collapse(gradients: GradientLog, outcome: Outcome) -> Iterator[LastingSymptom]:
    detector = CollapseDetector()
    # with hindsight, a network that has never lived is dead as well
    detector.update(is_dead=False)
    has_died = False
    since: int | None = None
    for step in _thinned(gradients.total.steps):
        names, grads = _layers_at(step, gradients)
        matrices = [g for g, is_matrix in zip(grads, _are_matrices(names), strict=True) if is_matrix]
        is_dead = bool(matrices) and not any(matrices) and any(grads)
        since = (step if since is None else since) if is_dead else None
        has_died = detector.update(is_dead)
    if has_died and since is not None and not outcome.has_learned:
        evidence = f"no weight matrix has had a gradient since step {since}, while biases still do"
        yield _symptom("gradient_collapse", "serious", since, evidence, 0.0)


def _constant_clipping(gradients: GradientLog, outcome: Outcome) -> Iterator[LastingSymptom]:
    fractions = gradients.clip_fraction.last_half()
    coefficients = gradients.clip_coefficient.last_half()
    if len(fractions) < LEAST_POINTS:
        return
    share = sum(fractions) / len(fractions)
    usual = median(coefficients) if coefficients else 0.0
    if share < ALWAYS or usual > HARD:
        return
    evidence = f"{share:.0%} of the steps in the second half were clipped, to {usual:.2g} times their norm"
    severity: Severity = "minor" if outcome.has_learned else "serious"
    since = gradients.clip_fraction.steps[len(gradients.clip_fraction) // 2]
    yield _symptom("constant_clipping", severity, since, evidence, share)


def _divergence(log: RunLog, outcome: Outcome) -> Iterator[LastingSymptom]:
    """A loss that ends far above where it began."""
    first, final = outcome.first_loss, outcome.final_loss
    if not 0 < first * LEAST_RISE < final:
        return
    detector, ratio, since = DivergenceDetector(), 0.0, 0
    totals = [g.total for g in log.gradients]
    for step, loss in log.loss.finite():
        norms = [norm for total in totals if (norm := total.at(step)) is not None and math.isfinite(norm)]
        was, ratio = ratio, detector.update(loss, max(norms, default=1.0))
        since = since if was and ratio else step
    if ratio <= (WORSE_AMONG_RIVALS if len(log.gradients) > 1 else 0.0):
        return
    evidence = f"the loss began at {first:.3g} and ended at {final:.3g}"
    yield _symptom("divergence", "serious", since, evidence, final)


def _stuck_loss(log: RunLog, outcome: Outcome) -> Iterator[LastingSymptom]:
    first, final = outcome.first_loss, outcome.final_loss
    is_long = len(log.loss) >= STUCK_POINTS and log.loss.steps[-1] - log.loss.steps[0] >= STUCK_STEPS
    if is_long and len(log.gradients) < 2 and first and abs(first - final) <= STUCK * abs(first):
        evidence = f"the loss began at {first:.4g} and ended at {final:.4g}, {outcome.steps} steps later"
        yield _symptom("stuck_loss", "serious", log.loss.steps[0], evidence, final)


def _nonfinite_now_and_then(log: RunLog, outcome: Outcome) -> Iterator[LastingSymptom]:
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
        yield _symptom(kind, severity, series.steps[sick[0]], evidence, math.nan)
        return


def _spikes(log: RunLog, outcome: Outcome) -> Iterator[LastingSymptom]:
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
        if all(seen) and is_new and loss > SPIKE_FLOOR * abs(outcome.first_loss):
            spikes.append((step, loss))
    if spikes:
        step, value = max(spikes, key=lambda spike: spike[1])
        severity: Severity = "serious" if len(spikes) >= SPIKES and not outcome.has_learned else "minor"
        times = "once" if len(spikes) == 1 else f"{len(spikes)} times"
        evidence = f"{times}, the highest at step {step} with a loss of {value:.3g}"
        yield _symptom("loss_spike", severity, spikes[0][0], evidence, value)


def _falling_learning_rate(log: RunLog, outcome: Outcome) -> Iterator[LastingSymptom]:
    points = log.backoff_scale.finite()
    scales = [scale for _, scale in points]
    if not scales or scales[-1] > min(BACKED_OFF, *scales):
        return
    since = next(step for step, scale in points if scale < 1)
    times = sum(later < earlier for earlier, later in zip(scales, scales[1:], strict=False))
    evidence = f"lowered {times} times since step {since}, to {scales[-1]:.2g} of what was asked for"
    severity: Severity = "minor" if outcome.has_learned else "serious"
    yield _symptom("falling_learning_rate", severity, since, evidence, scales[-1])


def _incidents(log: RunLog, outcome: Outcome, known: set[str]) -> Iterator[LastingSymptom]:
    """What was written down while the run was on, and is not yet told."""
    by_kind: dict[str, list[RecordedIncident]] = defaultdict(list)
    for incident in log.incidents:
        by_kind[incident.kind].append(incident)
    wrong = [kind for kind in by_kind if kind not in _ANSWERS and kind not in known]
    last = next((i.kind for i in reversed(log.incidents) if i.kind in wrong), None)
    went_back = {step for i in by_kind["rollback"] for step in (i.step - 1, i.step)}
    for kind in wrong:
        if outcome.died_at is not None and kind.startswith("nonfinite"):
            continue  # what follows from the death that is told
        members = by_kind[kind]
        answered = [i for i in members if i.action not in ("none", "stopped") or i.step in went_back]
        severity: Severity = "minor"
        if outcome.was_stopped and kind == last:
            severity = "fatal"
        elif answered:
            severity = "handled"
        elif kind in _INITIAL and not outcome.has_learned:
            severity = "serious"
        yield _incident_symptom(kind, severity, members)


def _incident_symptom(kind: str, severity: Severity, members: Sequence[RecordedIncident]) -> LastingSymptom:
    causes = Counter(i.cause for i in members if i.cause)
    cause, times = causes.most_common(1)[0] if causes else ("", 0)
    example = next(i for i in reversed(members) if i.cause == cause)
    steps = [i.step for i in members]
    first, last = min(steps), max(steps)
    often = "once" if len(members) == 1 else f"{len(members)} times"
    evidence = f"{often}, at step {first}" if first == last else f"{often}, from step {first} to {last}"
    answers = Counter(i.action for i in members if i.action != "none")
    evidence += "".join(f"; {n} {action}" for action, n in answers.items())
    if cause:
        evidence += f"; cause: {cause}" if times == len(members) else f"; cause of {times}: {cause}"
        evidence += f": {example.detail.rstrip('.')}" if example.detail else ""
    value = math.nan if example.value is None else example.value
    told = advice_for_cause(cause, example.where)
    todo = (told,) if told else remedies(kind, example.where)
    return LastingSymptom(kind, example.where, value, severity, first, evidence, todo)


def _symptom(
    kind: str, severity: Severity, since: int, evidence: str, value: float, where: tuple[str, ...] = ()
) -> LastingSymptom:
    return LastingSymptom(kind, where, value, severity, since, evidence, remedies(kind, where))


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
    """At most `LOOKS` of them, with the last."""
    every = math.ceil(len(steps) / LOOKS) or 1
    return steps[(len(steps) - 1) % every :: every]


def _is_sick(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)
