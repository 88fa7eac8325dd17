"""`lightning-gradguard check`: checks that a network can train as it is initialized, without training it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import ArgumentParser

from lightning_gradguard.callbacks.initialization_check import InitializationCheck
from lightning_gradguard.cli.checkpoints import load_weights, read_checkpoint
from lightning_gradguard.cli.fit import parser_beside_fit
from lightning_gradguard.cli.messages import (
    UsageError,
    described,
    is_raised_by_suite,
    usage_errors_reported,
)
from lightning_gradguard.cli.parsing.lightning_cli import command_line, fit_argv, fit_parser, trainer_alone
from lightning_gradguard.cli.parsing.preparse import named_class
from lightning_gradguard.core.detectors.diagnosis import LossBaselines, TargetDependence
from lightning_gradguard.core.initialization import SEVERITIES, Finding, table, with_unit
from lightning_gradguard.runtime.diagnosis.sampled_step import SampledStep
from lightning_gradguard.runtime.initialization.losses import findings_of_losses
from lightning_gradguard.runtime.lightning_api import Callback
from lightning_gradguard.runtime.logging.silence import messages_silenced
from lightning_gradguard.runtime.treatment.module import change_as_saved
from lightning_gradguard.strict_json import to_json

SCHEMA_VERSION = 1

_DESCRIPTION = """\
Checks with the first training batches that a network can train as it is initialized, and that its learning
rate, at the peak of the schedule, is stable: that is tried in a few steps after which everything is restored.
Nothing is written. It has the options of `fit`, and uses one device; callbacks and loggers are omitted.

"""
_EPILOG = """\
examples:
  lightning-gradguard check --model my.Module --data my.Data --model.depth 40
  lightning-gradguard check -c lightning_logs/version_0/config.yaml --json > check.json

Exit code 0: no criterion FAILs; 1: a criterion FAILs; 2: wrong input."""
_JSON_HELP = "print findings and values as JSON, or write them to FILE"


def main(arguments: Sequence[str]) -> None:
    """Checks with the first training batch, without a step; exits with code 1 if a criterion fails."""
    options, rest = _own_parser().parse_known_args(arguments)
    stdout = sys.stdout
    with usage_errors_reported("check"), fit_argv(rest), messages_silenced(logging.ERROR):
        # standard output holds nothing but the result; what the user's code prints goes to standard error
        with contextlib.redirect_stdout(sys.stderr):
            result = _check(rest)
        if options.json not in (None, "-"):
            _write(options.json, as_json(result))
    print(as_json(result) if options.json == "-" else as_text(result), file=stdout)
    if result.verdict == "fail":
        raise SystemExit(1)


def argument_parser() -> ArgumentParser:
    """Returns the parser of `fit` with the options of this command; for the completion of a shell."""
    parser = fit_parser()
    parser.add_argument("--json", metavar="FILE", help=_JSON_HELP)
    return parser


def _own_parser() -> argparse.ArgumentParser:
    """Returns the parser of the options that `fit` does not have."""
    usage = "--model my.Module [--data my.Data] [-c FILE] [options]"
    parser = parser_beside_fit(
        "check", usage, _DESCRIPTION, _EPILOG, checkpoint="check the weights in it, as they are"
    )
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help=_JSON_HELP)
    return parser


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """Findings, the most severe first, and all measurements by `<criterion>/<module>`.

    `checkpoint` is the file of the weights; empty for a fresh network. `notes` are why others were not made.
    """

    model: str
    checkpoint: str
    findings: Sequence[Finding]
    values: Mapping[str, float]
    notes: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        """The most severe finding: `"fail"`, `"warn"` or `"pass"`."""
        severities = {finding.severity for finding in self.findings}
        return "fail" if "fail" in severities else "warn" if "warn" in severities else "pass"


def as_text(result: CheckResult) -> str:
    """Describes a result: the measurements of the whole network, and a table of the findings.

    Example:
        >>> print(as_text(CheckResult("my.Net", "", [], {"loss": 2.31, "gradient_gain": -0.4})))
        my.Net: nothing found; loss 2.31, gradient_gain -0.4 decades
    """
    whole = {name: value for name, value in result.values.items() if "/" not in name}
    measured = ", ".join(f"{name} {with_unit(name, value)}" for name, value in whole.items())
    origin = f" with the weights of {result.checkpoint}" if result.checkpoint else ""
    verdicts = {"pass": "it can train", "warn": "it may not train", "fail": "it will not train"}
    text = f"{result.model}{origin}: {verdicts[result.verdict] if result.findings else 'nothing found'}; "
    text += measured or "only weights, and the first gradients, were checked"
    return "\n".join([text, *([table(result.findings)] if result.findings else []), *result.notes])


def as_json(result: CheckResult) -> str:
    """Returns a result as strict JSON, with nonfinite numbers as strings."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "model": result.model,
        "checkpoint": result.checkpoint or None,
        "verdict": result.verdict,
        "findings": [dataclasses.asdict(finding) for finding in result.findings],
        "values": result.values,
        "notes": result.notes,
    }
    return to_json(content, indent=2)


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written: {error.strerror}.") from None


def _check(arguments: Sequence[str]) -> CheckResult:
    """Runs the first training batch in a Trainer without anything else."""
    check, end = InitializationCheck(rate_trial=True), _EndBeforeStep()
    with tempfile.TemporaryDirectory() as folder:
        command = command_line(
            arguments,
            also=["json"],
            instead_of_zero={"max_epochs": None, "max_steps": -1, "limit_train_batches": None},
            callbacks=[check, end],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            **trainer_alone(folder, named_class(arguments)),
        )
        model, data = command.fit_arguments["model"], command.fit_arguments.get("datamodule")
        # Lightning would replace this check by one of the module's own
        model.configure_callbacks = list
        path = command.fit_arguments.get("ckpt_path")
        if path is not None:
            trusted = command.fit_arguments.get("weights_only") is False
            end.checkpoint = read_checkpoint(path, "--ckpt_path", weights_only=not trusted)
        try:
            command.trainer.fit(model, datamodule=data)
        except _CheckDone:
            pass
        except UsageError:
            raise
        except Exception as error:  # the user's own code
            raise _batch_error(error) from None
        else:
            raise UsageError("there is no training batch to check it with.")
    if check.problem is not None:
        raise _batch_error(check.problem)
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    findings = sorted(
        [*end.findings, *(finding.as_advice() for finding in check.findings)],
        key=lambda finding: SEVERITIES.index(finding.severity),
    )
    return CheckResult(name, str(path or ""), findings, check.values, check.notes)


def _batch_error(error: Exception) -> UsageError:
    if is_raised_by_suite(error):
        return UsageError(f"the first batch could not be checked: {error}")
    return UsageError(f"the first batch could not be run: {described(error)}")


class _CheckDone(Exception):
    """Ends the fit, as all measurements are there."""


class _EndBeforeStep(Callback):
    """Loads the weights, and ends the fit ahead of the first optimizer step, in which it reads the losses."""

    checkpoint: dict[str, Any] | None = None
    findings: Sequence[Finding] = ()
    _sampled: SampledStep | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.checkpoint is not None:
            change_as_saved(pl_module, self.checkpoint)
            pl_module.on_load_checkpoint(self.checkpoint)
            load_weights(pl_module, self.checkpoint["state_dict"])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._sampled = SampledStep(trainer, pl_module, batch, LossBaselines(), TargetDependence(), None)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._end(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._end(pl_module)

    def _end(self, pl_module: pl.LightningModule) -> None:
        """Ends the fit, with what the losses of the step show."""
        if self._sampled is not None:
            self._sampled.end_batch()
            sample = self._sampled.read(self._sampled.values().tolist())
            self.findings = findings_of_losses(sample, pl_module)
        raise _CheckDone
