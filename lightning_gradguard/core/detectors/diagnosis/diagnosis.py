"""The diagnosis of a run: symptoms that several samples confirm, and one root for each cause."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lightning_gradguard.core.detectors.best_constant import LEARNS
from lightning_gradguard.core.detectors.diagnosis import clipped, contracts, depth, rules
from lightning_gradguard.core.detectors.diagnosis.progress import Progress
from lightning_gradguard.core.detectors.diagnosis.sample import Sample
from lightning_gradguard.core.detectors.diagnosis.stagnation import random_layers, stagnation
from lightning_gradguard.core.detectors.diagnosis.symptom import Symptom, Tier, modules_of
from lightning_gradguard.core.detectors.diagnosis.terms import outweighing_terms
from lightning_gradguard.core.incidents import IncidentKind

#: Steps before which a loss is not stuck but may start slowly, of a run without an end, the share of the
#: planned ones, and the fewest.
PATIENCE, PATIENT_SHARE, MIN_PATIENCE = 150, 0.2, 100
#: The share of a short run in which a deep narrow network may only start slowly, and its steps at most.
SLOW_SHARE, SLOW_STEPS = 0.6, 300
#: Share of the planned steps in which a schedule that leaves no rate has the length of another run.
EARLY_SHARE = 0.6
#: Share of a learning rate, from one sample to the next, below which it falls for good.
NO_RATE = 1e-2
#: Causes of a gradient that vanishes which no update brings about.
_OF_ANY_STEP = ("through_time", "padding", "detached", "small_weights", "saturating_loss")
#: Symptoms on the same sample: the first is the root.
_ORDER = ("contract", "coverage", "units", "update", "depth", "stuck", "stagnation")
_RULES = (
    contracts.broken_contracts,
    contracts.wrong_dimensions,
    contracts.constant_inputs,
    contracts.labels_of_one_class,
    contracts.unrelated_targets,
    contracts.untrained_parameters,
    contracts.reset_weights,
    contracts.kept_gradients,
    rules.dead_or_saturated_units,
    clipped.clipped_elsewhere,
    clipped.vanishing_weights,
    rules.unbounded_loss,
    rules.large_updates,
    rules.overshooting_steps,
    rules.far_answers,
    depth.through_layers,
    depth.saturated_losses,
    depth.cut_recurrences,
    depth.through_time,
)


class Diagnosis:
    """Finds symptoms and causes in the samples of one run, each cause once.

    Attributes:
        roots: The symptoms so far, with what followed from each.
        patience: Steps before which a loss that is high may only start slowly.
        over_constant: The loss of the last sample over that of the best constant answer; NaN before these
            steps, where it is unknown, and of several optimizers.
    """

    def __init__(self) -> None:
        self.patience = PATIENCE
        self.over_constant = math.nan
        self.roots: list[Symptom] = []
        self._progress = Progress()
        self._shown: dict[tuple[str, str], tuple[int, int]] = {}
        self._rates: dict[int, tuple[float, ...]] = {}
        self._is_related = self._may_be_constant = False
        self._frozen: tuple[str, ...] = ()
        self._planned = 0
        self._steepest: tuple[str, ...] = ()

    def plan(self, steps: int, frozen: Sequence[str] = ()) -> None:
        """Takes the number of steps of the run, 0 if unknown, by which a slow start is measured.

        `frozen` are layers with random weights that are not trained.
        """
        self._frozen = tuple(frozen)
        self._progress.ends_early = EARLY_SHARE * steps
        self._planned = steps
        slow = int(PATIENT_SHARE * steps), min(SLOW_STEPS, int(SLOW_SHARE * steps))
        self.patience = max(MIN_PATIENCE, *slow) if steps else PATIENCE

    def wants_permutation(self, step: int) -> bool:
        """True if it is in doubt that the loss depends on the targets."""
        if self._may_be_constant and step >= contracts.MEANT_STEPS:
            return True
        is_known = self._is_related or any(root.tier == "stuck" for root in self.roots)
        patience = rules.WORSE_STEPS if self._progress.gets_worse else self.patience
        return step >= patience and not is_known and not self._progress.over_constant < LEARNS

    def wants_dependence(self, step: int) -> bool:
        """True if it is in doubt that the targets depend on the inputs."""
        return step >= contracts.DATA_STEPS and self._progress.may_be_unrelated

    @property
    def has_rate(self) -> bool:
        """True once a schedule has left a learning rate."""
        return self._progress.has_rate

    @property
    def wants_largest(self) -> bool:
        """True if the largest element of the gradients may show that others clip them."""
        return self._progress.may_be_clipped_by_value

    def update(self, sample: Sample) -> list[Symptom]:
        """Adds a sample; returns the roots that it confirms, usually none."""
        self._progress.update(sample)
        self._steepest = modules_of([name for one in sample.updates[:1] for name in one.steepest])
        is_known = sample.step >= self.patience and sample.is_whole and len(sample.updates) == 1
        self.over_constant = self._progress.over_constant_now if is_known else math.nan
        causes = {cause for cause, *_ in sample.mistakes} - {root.cause for root in self.roots}
        self._may_be_constant = "single_value" in causes and not self._is_related
        self._is_related = self._is_related or rules.is_related(sample.permuted, self._progress.over_constant)
        confirmed = []
        shown: dict[tuple[str, str], tuple[int, int]] = {}
        for symptom in self._found(sample):
            key: tuple[str, str] = (symptom.kind, symptom.tier)
            if key in shown:
                continue
            times, since = self._shown.get(key, (0, sample.step))
            if symptom.cause == "learning_rate_schedule" and not self.has_rate:
                since = 0  # the rate was so before it is examined
            shown[key] = times + 1, since
            if times + 1 >= symptom.needs:
                confirmed.append(self._by_update(symptom.shown_since(since)))
        if any(tier == "units" for _, tier in shown):
            # units that are dead or saturated so early explain the step, once another sample shows them
            confirmed = [symptom for symptom in confirmed if symptom.tier != "update" or symptom.needs > 1]
        lasting = {("exploding_gradient", "update"), ("constant_clipping", "update")}
        self._shown = {**{key: seen for key, seen in self._shown.items() if key in lasting}, **shown}
        return [root for symptom in self._sorted(confirmed) if (root := self._add(symptom, sample.step))]

    def add_once(self, symptom: Symptom) -> list[Symptom]:
        """Adds a symptom that needs no other sample; returns it unless its kind is known.

        What is nonfinite after an explosion follows from it.
        """
        for i, root in enumerate(self.roots):
            if symptom.kind in (root.kind, *(kind for kind, _ in root.followed_by)):
                return []
            if root.kind == "exploding_gradient":
                following = (*root.followed_by, (symptom.kind, symptom.since))
                self.roots[i] = replace(root, followed_by=following)
                return []
        self.roots.append(symptom)
        return [symptom]

    def add_divergence(self, where: tuple[str, ...], evidence: str, step: int) -> list[Symptom]:
        """Adds that training has diverged because an update was too large; returns it if it is new."""
        places = modules_of(where) or self._steepest
        symptom = Symptom(
            "exploding_gradient", "update_too_large", places, math.nan, evidence, "update", since=step
        )
        return [root for root in [self._add(symptom, step)] if root]

    def add_published(self, kind: IncidentKind, where: tuple[str, ...], step: int) -> None:
        """Takes a symptom that another callback has published for a root."""
        tier: Tier = "units" if kind.endswith("_units") else "depth"
        self._add(Symptom(kind, "unknown", where, 0.0, "", tier, since=step), step)

    def state_dict(self) -> dict[str, Any]:
        """Returns samples and roots."""
        return {
            "roots": [asdict(root) for root in self.roots],
            "progress": self._progress.state_dict(),
            "shown": [[*key, *value] for key, value in self._shown.items()],
            "rates": {index: list(rates) for index, rates in self._rates.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *, with_roots: bool = True) -> None:
        """Continues with saved samples, and with the saved roots unless these are to be kept."""
        if with_roots:
            self.roots = [Symptom.restored(root) for root in state_dict["roots"]]
        self._progress.load_state_dict(state_dict["progress"])
        self._shown = {(kind, tier): (times, since) for kind, tier, times, since in state_dict["shown"]}
        self._rates = {index: tuple(rates) for index, rates in state_dict["rates"].items()}

    def _found(self, sample: Sample) -> Iterator[Symptom]:
        rising = self._rises(sample)
        for rule in _RULES:
            yield from rule(sample, self._progress)
        yield from contracts.constant_loss(sample, self._progress)
        yield from stagnation(sample, self._progress, self._planned, rate_changes=rising)
        yield from rules.far_targets(sample, self._progress, self.patience)
        yield from random_layers(sample, self._progress, self.patience, self._frozen)
        if not self._is_related:
            yield from outweighing_terms(sample, self._progress, self.patience)
            yield from rules.same_answers(sample, self._progress, self.patience)
            yield from rules.stuck_loss(sample, self._progress, self.patience)

    def _by_update(self, symptom: Symptom) -> Symptom:
        """Returns a symptom, or the explosion from which it follows.

        Where gradients vanish later than in the first two steps, and updates were too large before, it is not
        the initialization that is at fault.
        """
        largest = self._progress.largest_update
        is_late = symptom.since > 1 and symptom.cause not in _OF_ANY_STEP
        vanishes = symptom.tier == "depth" and symptom.kind != "exploding_gradient"
        if not (vanishes and is_late) or largest <= rules.LARGE_UPDATE:
            return symptom
        evidence = (
            f"updates were up to {largest:.2g} of the norm of the weights (usual: below 0.1), and then "
        )
        return replace(
            symptom,
            kind="exploding_gradient",
            cause="update_too_large",
            value=largest,
            evidence=evidence + symptom.evidence,
            tier="update",
            followed_by=((symptom.kind, symptom.since),),
        )

    def _rises(self, sample: Sample) -> bool:
        """True if a learning rate rises, or falls and is not yet nearly zero: then updates may be small."""
        before, self._rates = self._rates, {i: tuple(u.rates) for i, u in enumerate(sample.updates)}
        known = [(before[i], rates) for i, rates in self._rates.items() if i in before]
        return not known or any(
            len(old) == len(new) and any(b > a or a > b > NO_RATE * a for a, b in zip(old, new, strict=True))
            for old, new in known
        )

    @staticmethod
    def _sorted(symptoms: list[Symptom]) -> list[Symptom]:
        def since(symptom: Symptom) -> tuple[int, float, int]:
            is_cause = symptom.tier not in ("stuck", "stagnation")
            # units that were alive before the first update are dead or saturated by it
            late = symptom.tier == "units" and symptom.since > 0
            return (
                not is_cause,
                _ORDER.index("update") + 0.5 if late else _ORDER.index(symptom.tier),
                symptom.since,
            )

        return sorted(symptoms, key=since)

    def _add(self, symptom: Symptom, step: int) -> Symptom | None:
        """Returns a symptom that is a root; lists another one under its root."""
        for i, root in enumerate(self.roots):
            if root.explains(symptom):
                known = {root.kind, *(kind for kind, _ in root.followed_by)}
                if symptom.kind not in known:
                    following = (*root.followed_by, (symptom.kind, step))
                    self.roots[i] = replace(root, followed_by=following)
                return None
        self.roots.append(symptom)
        return symptom
