"""The callback that checks before the first step that the network can train, and repairs it on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import Any, Literal

import pytorch_lightning as pl
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gradguard.core import arguments, tags
from lightning_gradguard.core.incidents import CURE, Cause, IncidentKind, SymptomCause, first_names
from lightning_gradguard.core.initialization import Finding, InitializationError, fails, one_line, table
from lightning_gradguard.core.initialization.rate_trial import TRIAL_STEPS
from lightning_gradguard.core.parameter_names import plain_name, warn_unknown
from lightning_gradguard.core.remedies import advice_for_cause
from lightning_gradguard.runtime.incidents.journal import incident_now, open_journal, publish, remember_cures
from lightning_gradguard.runtime.incidents.present import present_in
from lightning_gradguard.runtime.initialization.first_batch import (
    FirstBatch,
    check_first_step,
    check_weights_alone,
    reason_against_extra_pass,
)
from lightning_gradguard.runtime.initialization.learning_rates import reason_against_trial, try_rates
from lightning_gradguard.runtime.lightning_api import Callback, batches_that_stepped, reject_unsupported
from lightning_gradguard.runtime.logging import console, metrics
from lightning_gradguard.runtime.logging.hyperparameters import Configured, non_defaults
from lightning_gradguard.runtime.steps.dispatch import pass_over, separate

#: Rms of the inputs above which they, not the weights, saturate units or leave them dead.
LARGE_INPUT = 10.0
#: Rms of the inputs from which on no initialization makes up for it, and from which on no unit of measurement
#: does: the batch is corrupt, and the next one may not be.
HUGE_INPUT, CORRUPT_INPUT = 1e4, 1e15
#: Incidents by criterion; other criteria are of a poor initialization.
_KINDS: dict[str, IncidentKind] = {
    "loss": "nonfinite_loss",
    "nonfinite_input": "nonfinite_loss",
    "nonfinite_gradients": "nonfinite_gradient",
    "dead_units": "dead_units",
    "saturated_units": "saturated_units",
    "learning_rate_too_high": "exploding_gradient",
    "learning_rate_too_low": "weight_stagnation",
}
#: Kinds that have one cause where they are found together, the one that explains the others first.
_OF_ONE_CAUSE: tuple[IncidentKind, ...] = ("dead_units", "poor_initialization", "saturated_units")
_NOT_TRIED = "Learning rates were not tried, because of {}."
_NO_LARGEST = "There is no largest stable learning rate: {}."
#: The trial is right within a factor of 3: docs/stable_rate.md.
_RISES = (
    f"The learning rate, {{:.3g}}, is not stable within {TRIAL_STEPS} steps: the loss rises, or its gradient "
    "no longer reaches the first layer. Those up to {:.3g} are; little above, it may train all the same. "
    "Lower it if the loss rises in training, or does not fall."
)
#: Criteria that a trial of rates has measured, whose warnings are incidents.
_RATES = ("learning_rate_too_high", "learning_rate_too_low")
#: Causes of these incidents.
_CAUSES: dict[IncidentKind, SymptomCause | Cause] = {
    "exploding_gradient": "update_too_large",
    "weight_stagnation": "learning_rate_too_low",
}


def _with_cure(findings: Sequence[Finding], values: Mapping[str, float], reason: str) -> str:
    """Returns what rates do once the criteria that fail are cured."""
    text = "With the cure of what fails in place, "
    if findings:
        return f"{text}train with {findings[0].cure}"
    if "largest_stable_rate" not in values:
        return text + _NO_LARGEST[0].lower() + _NO_LARGEST[1:].format(reason)
    rate, largest = values["learning_rate"], values["largest_stable_rate"]
    return f"{text}learning rates are stable up to about {largest:.2g}; that of the run is {rate:.3g}."


class InitializationCheck(Callback, Configured):
    """Checks before the first step that the network can train, and names the layer at fault and the cure.

    On one device and under DistributedDataParallel with automatic optimization, the first training batch
    runs through the network in an extra pass, forward and backward, that leaves no trace: no gradient, no
    buffer, no random number, no metric, no log. Elsewhere, for a `training_step(dataloader_iter)`, which
    takes its batches itself, and for one that was replaced on the object, by what may count its calls, the
    weights are checked, and the gradients of the first step. A resumed run is not checked, nor is a network
    whose first batch is nonfinite.

    The criteria are nonfinite, zero and copied weights, a nonfinite loss or gradient, dead and saturated
    units, a loss above that of guessing, and the gradient's gain from the last hidden layer back to the
    first, which predicts best that a network will train. A criterion that fails is an incident, and those of
    one cause are one. A warning is advice and is only printed, as healthy networks have some; so is a
    gradient that vanishes through time, unless the run is to be stopped.

    | tag | value |
    |---|---|
    | `init/gradient_gain` | log10 of the gain back to the first block |
    | `init/layer_gain/<module>` | log10 of the gain back to a layer, for the first with a finding |
    | `init/dead_units/<module>` · `init/saturated_units/<module>` | shares, likewise |
    | `init/gain_through_time/<module>` | log10, first step over last, of a recurrent module, likewise |
    | `init/learning_rate` · `init/largest_stable_rate` | peak of the schedule; largest rate of a trial |

    Args:
        on_failure: `"warn"` prints one table; `"raise"` stops the run if a criterion fails; `"repair"`
            initializes layers (He, orthogonal or Xavier, by the activation after them), scales them layer by
            layer and measures again. If the findings are no better then, the weights are restored.
        repair_modules: Names of modules that are repaired whatever weights they hold; others only while they
            hold the default initialization of their class.
        seed: Seed of the repair; the global random number generators are not used.
        rate_trial: Estimate the largest stable learning rate before step 1: 36 steps at each of about 6 rates
            on further batches of the data, after which everything is restored. A finding names a rate whose
            peak is too high, or far too low. It needs one device, automatic optimization and one optimizer.

    Raises:
        ValueError: If an argument is out of range.
        InitializationError: From `fit`, under `on_failure="raise"`.

    Example:
        >>> from lightning_gradguard import InitializationCheck
        >>> check = InitializationCheck(on_failure="repair")

    References:
        Schoenholz, Gilmer, Ganguli, Sohl-Dickstein, Deep Information Propagation, 2017,
        arXiv:1611.01232. Mishkin, Matas, All you need is a good init, 2015, arXiv:1511.06422.
    """

    def __init__(
        self,
        on_failure: Literal["warn", "raise", "repair"] = "warn",
        repair_modules: Sequence[str] | None = None,
        seed: int = 0,
        rate_trial: bool = False,
    ) -> None:
        super().__init__()
        self.settings = non_defaults(InitializationCheck, locals())
        arguments.one_of("on_failure", on_failure, "warn", "raise", "repair")
        self.on_failure = on_failure
        self.repair_modules = arguments.names("repair_modules", repair_modules)
        self.seed = arguments.whole_number("seed", seed, at_least=0)
        self.rate_trial = arguments.flag("rate_trial", rate_trial)
        self.findings: list[Finding] = []
        self.values: dict[str, float] = {}
        self.notes: list[str] = []
        self.problem: Exception | None = None
        self._is_due = False
        self._checks_first_step = False
        self._input_rms = 0.0
        self._entry: tuple[str, ...] = ()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Opens the journal of incidents."""
        if stage == "fit":
            reject_unsupported(trainer, self)
            open_journal(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Schedules the check of a fresh run."""
        self._is_due = trainer.global_step == 0
        self._checks_first_step = False
        separate(self)
        layers = {plain_name(name).rpartition(".")[0] for name, _ in pl_module.named_parameters()}
        warn_unknown("repair_modules", [n for n in self.repair_modules if n not in layers], layers)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Checks the network on the first batch, or its weights alone where no extra pass is possible."""
        if not self._is_due:
            if not self._checks_first_step:
                pass_over(trainer, self, InitializationCheck)
            return
        self._is_due = False
        reason = reason_against_extra_pass(trainer, pl_module)
        if reason:
            self._checks_first_step = True
            text = f"Initialization: checked by weights and first gradients, with no extra pass: {reason}."
            self._note(trainer, text)
            if self.on_failure == "repair":
                console.print_message(
                    trainer,
                    f"No repair, as {reason}; run InitializationCheck(on_failure='repair') "
                    "first, on one device and with a step that gets its batch.",
                )
            self._report(trainer, pl_module, check_weights_alone(trainer, pl_module))
            if self.rate_trial and (reason := reason_against_trial(trainer, pl_module)):
                self._note(trainer, _NOT_TRIED.format(reason))
            return
        first_batch = FirstBatch(trainer, pl_module, batch, batch_idx)
        findings, self.values = first_batch.check()
        if fails(findings) and self.on_failure == "repair":
            findings = self._repair(trainer, pl_module, first_batch, findings)
        self.problem = first_batch.problem
        if self.rate_trial and not self.problem:
            if reason := reason_against_trial(trainer, pl_module):
                self._note(trainer, _NOT_TRIED.format(reason))
            elif fails(findings):
                with first_batch.cured() as passes:
                    tried = try_rates(trainer, pl_module, batch, batch_idx) if passes else None
                self._note(trainer, _with_cure(*tried) if tried else _NOT_TRIED.format("criteria that fail"))
            else:
                of_rates, values, reason = try_rates(trainer, pl_module, batch, batch_idx)
                findings, self.values = [*findings, *of_rates], {**self.values, **values}
                if reason:
                    self._note(trainer, _NO_LARGEST.format(reason))
                rate, largest = (values.get(name, nan) for name in ("learning_rate", "largest_stable_rate"))
                if largest < rate and not of_rates:
                    self._note(trainer, _RISES.format(rate, largest))
        self._input_rms = first_batch.input_rms(LARGE_INPUT)
        self._entry = first_batch.entry
        if self._input_rms > HUGE_INPUT:
            findings = first_batch.with_huge_inputs(findings, self._input_rms)
        # of single layers, only the first that is found: a network has as many numbers as layers
        first = {f.criterion: f"{f.criterion}/{f.module}" for f in reversed(findings)}
        values = {name: v for name, v in self.values.items() if "/" not in name or name in first.values()}
        scalars = {tags.tag(tags.INITIALIZATION, name): value for name, value in values.items()}
        metrics.log_scalars(trainer, scalars, batches_that_stepped(trainer))
        self._report(trainer, pl_module, findings)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Checks the gradients of the first step where no extra pass was possible."""
        if self._checks_first_step:
            self._checks_first_step = False
            finding = check_first_step(trainer, pl_module)
            if finding is not None:
                self._report(trainer, pl_module, [finding])

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the check: a step taken by hand after the fit is none of its business."""
        self._end()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._is_due = self._checks_first_step = False
        separate(self)

    def _note(self, trainer: pl.Trainer, text: str) -> None:
        """Prints and keeps why something was not measured."""
        self.notes.append(text)
        console.print_message(trainer, text)

    def _repair(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        first_batch: FirstBatch,
        before: list[Finding],
    ) -> list[Finding]:
        """Repairs layers, and returns the findings afterwards."""
        done = first_batch.repair(self.repair_modules, self.seed, before)
        if not done.lines:
            why = "no repair that was tried betters the findings, and the weights are as before"
            if done.left_alone:
                names = list(done.left_alone)
                why = (
                    f"the weights of {first_names(3, names)} are not the default of their class, and were "
                    f"left alone; InitializationCheck(on_failure='repair', repair_modules={names}) "
                    "initializes them"
                )
            console.print_message(trainer, f"Nothing was repaired: {why}.")
            return before
        findings, self.values = first_batch.check()
        gain = next((f.value for f in before if f.criterion == "gradient_gain"), None)
        count = "1 layer" if len(done.lines) == 1 else f"{len(done.lines)} layers"
        lines = [f"Repaired {count}:", *(f"  {line}" for line in done.summary)]
        after = self.values.get("gradient_gain")
        if gain is not None and after is not None:
            lines.append(f"  gradient gain: {gain:.2f} decades before, {after:.2f} now")
        console.print_message(trainer, "\n".join(lines))
        serious = [finding for finding in before if finding.severity != "info"]
        incident = incident_now(
            trainer,
            "poor_initialization",
            batch_idx=0,
            where=done.changed,
            value=serious[0].value,
            action="repaired",
            detail=f"{serious[0].describe()}, before the repair",
            advice=f"The check has initialized {'; '.join(done.summary)}. To train without it, do so in "
            "__init__.",
        )
        publish(trainer, pl_module, incident)
        return findings

    def _incidents(
        self, findings: Sequence[Finding]
    ) -> dict[IncidentKind, tuple[list[Finding], list[Finding]]]:
        """Returns findings by the kind of their incident, and those that follow from them."""
        found: dict[IncidentKind, list[Finding]] = {
            kind: [] for kind in ("poor_initialization", *_KINDS.values())
        }
        for finding in findings:
            found[_KINDS.get(finding.criterion, "poor_initialization")].append(finding)
        of_inputs = self._input_rms > LARGE_INPUT and bool(found["saturated_units"])
        kinds = _OF_ONE_CAUSE[::-1] if of_inputs and not found["dead_units"] else _OF_ONE_CAUSE
        if any(finding.criterion == "zero_weights" for finding in found["poor_initialization"]):
            kinds = ("poor_initialization", "dead_units", "saturated_units")
        root, *others = [kind for kind in kinds if found[kind]] or kinds
        following = [finding for kind in others for finding in found.pop(kind)]
        return {kind: (members, following if kind == root else []) for kind, members in found.items()}

    def _report(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, findings: Sequence[Finding]
    ) -> None:
        """Publishes the findings, and stops the run if that is requested."""
        failed = fails(findings) and self.on_failure == "raise"
        present = present_in(trainer)
        if "treatment" in present and not failed:  # a cure would change what its trials have trained
            findings = [
                replace(f, cure="", is_tried=False, severity="info" if f.severity == "info" else "warn")
                for f in findings
            ]
        self.findings = [*self.findings, *findings]
        shown = [*findings] if failed else [finding.as_advice() for finding in findings]
        serious = [f for f in shown if f.severity == "fail" or f.criterion in _RATES]
        for kind, (members, following) in self._incidents(serious).items():
            # the first step reports what is nonfinite, with its dossier
            if members and (failed or not (kind.startswith("nonfinite") and "rollback" in present)):
                where = tuple(dict.fromkeys(f.module for f in members if f.module))
                first = members[0].criterion
                of_first = [f for f in members if f.cure and f.criterion == first]
                cures = one_line([*dict.fromkeys(f.cure for f in of_first)])
                is_tried = any(f.is_tried for f in of_first)
                cure: dict[str, Any] = {"advice": f"{CURE}{cures}" if is_tried else cures} if cures else {}
                cure["cause"] = _CAUSES.get(kind, "")
                if origin := next((f for f in members if f.cause), None):
                    cure = {"cause": origin.cause, "advice": origin.cure, "location": origin.location}
                detail = members[0].describe()
                if kind in ("dead_units", "saturated_units") and self._input_rms > LARGE_INPUT:
                    own = advice_for_cause("input_scale", self._entry, model=pl_module)
                    cure = {"cause": "input_scale", "advice": own}
                    if self._input_rms > CORRUPT_INPUT:
                        cure = {"cause": "bad_input", "advice": advice_for_cause("bad_input", ["the batch"])}
                    detail += f"; inputs have an rms of {self._input_rms:.3g} (usual: about 1)"
                if following:
                    detail += f"; with it {following[0].describe()}"
                incident = incident_now(
                    trainer,
                    kind,
                    batch_idx=0,
                    where=where,
                    value=members[0].value,
                    action="stopped" if failed else "none",
                    detail=detail,
                    **cure,
                )
                in_table = bool(cures) and cures in incident.advice
                publish(trainer, pl_module, incident, prints_advice=not in_table)
        if failed:
            raise InitializationError("The network, as it is initialized, will not train:\n" + table(serious))
        healthy = [f for f in shown if f.severity == "info" and not f.is_tried]
        if rows := [f for f in shown if f not in healthy]:
            console.print_message(trainer, "Initialization\n" + table(rows))
            remember_cures(trainer, [f.cure for f in rows if f.cure])
        if healthy:
            seen = first_names(3, [f.describe() for f in healthy])
            console.print_message(trainer, f"Initialization: {seen}; healthy networks have that too.")
