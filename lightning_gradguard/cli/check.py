"""`lightning-gradguard check`: whether a network, as it is initialized, can train; without training."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from lightning_gradguard.callbacks.initialization_check import InitializationCheck
from lightning_gradguard.cli.checkpoints import load_weights, read_checkpoint
from lightning_gradguard.cli.errors import UsageError, is_own, one_line, place_of, told
from lightning_gradguard.cli.help_pages import check_page
from lightning_gradguard.cli.lightning_cli import command_line, typed
from lightning_gradguard.cli.preparse import named_class
from lightning_gradguard.cli.silence_lightning import quiet
from lightning_gradguard.core.initialization import Finding, table
from lightning_gradguard.runtime.lightning_api import Callback
from lightning_gradguard.runtime.lightning_packages import lightning_package_of

SCHEMA_VERSION = 1


def main(arguments: Sequence[str]) -> None:
    """Check on the first training batch, and take no step.

    Args:
        arguments: Those of `fit`, and `--json`.

    Raises:
        SystemExit: With code 1 if a criterion fails; with code 2 and one short message, if an argument is
            wrong or the batch cannot be run.
    """
    if {"-h", "--help"} & set(arguments):
        print(check_page())
        return
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--json", nargs="?", const="-")
    options, rest = own.parse_known_args(arguments)
    printed = sys.stdout
    # what the user's code prints is not in the way of what a program reads
    with told("check"), typed(rest), quiet(), contextlib.redirect_stdout(sys.stderr):
        facts = _checked(rest)
        if options.json not in (None, "-"):
            _write(options.json, as_json(facts))
    print(as_json(facts) if options.json == "-" else in_words(facts), file=printed)
    if facts.verdict == "fail":
        raise SystemExit(1)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a check came to.

    Args:
        model: The class of the module.
        checkpoint: Where the weights came from; empty for a fresh network.
        findings: The worst first.
        values: Everything that was measured, by `<criterion>/<module>`.
    """

    model: str
    checkpoint: str
    findings: Sequence[Finding]
    values: Mapping[str, float]

    @property
    def verdict(self) -> str:
        """`"fail"`, `"warn"` or `"pass"`."""
        found = {finding.severity for finding in self.findings}
        return "fail" if "fail" in found else "warn" if "warn" in found else "pass"


def in_words(facts: Facts) -> str:
    """A table of the findings, or that there are none, and what was measured of the whole network.

    Example:
        >>> print(in_words(Facts("my.Net", "", [], {"loss": 2.31, "gradient_gain": -0.4})))
        my.Net: nothing found; loss 2.31, gradient_gain -0.4
    """
    whole = {name: value for name, value in facts.values.items() if "/" not in name}
    measured = ", ".join(f"{name} {value:.3g}" for name, value in whole.items())
    origin = f" with the weights of {facts.checkpoint}" if facts.checkpoint else ""
    what = {"pass": "it can train", "warn": "it may not train", "fail": "it will not train"}[facts.verdict]
    lines = [f"{facts.model}{origin}: {what if facts.findings else 'nothing found'}"]
    lines[0] += f"; {measured}" if measured else "; only weights, and the first gradients, were looked at"
    return "\n".join([*lines, *([table(facts.findings)] if facts.findings else [])])


def as_json(facts: Facts) -> str:
    """The same for programs; numbers that are nonfinite are texts, as JSON has none."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "model": facts.model,
        "checkpoint": facts.checkpoint or None,
        "verdict": facts.verdict,
        "findings": [
            {**dataclasses.asdict(finding), "value": _strict(finding.value)} for finding in facts.findings
        ],
        "values": {name: _strict(value) for name, value in facts.values.items()},
    }
    return json.dumps(content, indent=2, allow_nan=False)


def _strict(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written: {error.strerror}.") from None


def _checked(arguments: Sequence[str]) -> Facts:
    """The first training batch, through a Trainer that has nothing else to do."""
    logger = import_module(f"{lightning_package_of(named_class(arguments)).__name__}.loggers.logger")
    check, end = InitializationCheck(), _End()
    with tempfile.TemporaryDirectory() as folder:
        command = command_line(
            arguments,
            also=["json"],
            instead_of_zero={"max_epochs": None, "max_steps": -1, "limit_train_batches": None},
            callbacks=[check, end],
            default_root_dir=folder,
            logger=logger.DummyLogger(),  # takes whatever the user's step hands it
            devices=1,
            num_nodes=1,
            strategy="auto",
            fast_dev_run=False,
            barebones=False,
            profiler=None,
            max_time=None,
            enable_checkpointing=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model, data = command.fit_arguments["model"], command.fit_arguments.get("datamodule")
        # Lightning would put a check of the module's own in the place of this one
        model.configure_callbacks = list
        path = command.fit_arguments.get("ckpt_path")
        if path is not None:
            trusted = command.fit_arguments.get("weights_only") is False
            end.checkpoint = read_checkpoint(path, "--ckpt_path", weights_only=not trusted)
        try:
            command.trainer.fit(model, datamodule=data)
        except _EndError:
            pass
        except UsageError:
            raise
        except Exception as error:  # the user's own code
            raise _refusal(error) from None
        else:
            raise UsageError("there is no training batch to check it with.")
    if check.problem is not None:
        raise _refusal(check.problem)
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    return Facts(name, str(path or ""), check.findings, check.values)


def _refusal(error: Exception) -> UsageError:
    if is_own(error):
        return UsageError(f"the first batch could not be checked: {error}")
    text = f"{type(error).__name__}: {one_line(str(error))}{place_of(error)}"
    return UsageError(f"the first batch could not be run: {text}")


class _EndError(Exception):
    """Everything was seen."""


class _End(Callback):
    """Comes after the check: gives the network its weights, and lets no optimizer step happen."""

    checkpoint: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.checkpoint is not None:
            pl_module.on_load_checkpoint(self.checkpoint)
            load_weights(pl_module, self.checkpoint["state_dict"])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.automatic_optimization:
            raise _EndError

    def on_before_optimizer_step(self, *_: Any) -> None:
        raise _EndError  # of manual optimization, whose first gradients were looked at

    def on_train_batch_end(self, *_: Any) -> None:
        raise _EndError
