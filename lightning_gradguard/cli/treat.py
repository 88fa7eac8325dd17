"""`lightning-gradguard treat`: finds by experiment what makes your own module train."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_gradguard.cli.fit import parser_beside_fit
from lightning_gradguard.cli.messages import UsageError, usage_errors_reported
from lightning_gradguard.cli.parsing.lightning_cli import (
    SuiteCLI,
    command_line,
    fit_argv,
    fit_parser,
    trainer_alone,
)
from lightning_gradguard.cli.parsing.preparse import config_files, named_class, read_config
from lightning_gradguard.runtime.lightning_api import Callback
from lightning_gradguard.runtime.logging.silence import messages_silenced
from lightning_gradguard.treatment.budget import seconds
from lightning_gradguard.treatment.page import text_of
from lightning_gradguard.treatment.result import TreatmentResult
from lightning_gradguard.treatment.treat import treat
from lightning_gradguard.treatment.trials.program import TreatmentError

_DESCRIPTION = """\
Finds by experiment, within a budget of time, the changes with which your own module trains: a probe, trials
of what its diagnosis suggests, and three fresh seeds as the proof. It has the options of `fit`, and uses one
device; callbacks and loggers of yours are omitted in trials. Files of yours are never written.

"""
_EPILOG = """\
examples:
  lightning-gradguard treat --model my.Module --data my.Data --budget 10m --out treatment/
  lightning-gradguard treat -c config.yaml --trainer.max_epochs 20 --processes 2
  lightning-gradguard fit -c treatment/treatment.yaml --model my.Module --data my.Data

Exit code 0: healthy, cured or better; 1: no treatment found; 2: wrong input, or a budget that is too small
for any trial."""


def main(arguments: Sequence[str]) -> None:
    """Treats a module; exits with code 1 if no treatment is found, with 2 if the budget allows no trial."""
    options, rest = _own_parser().parse_known_args(arguments)
    stdout = sys.stdout
    # standard output holds nothing but the result; progress goes to standard error
    redirected = contextlib.redirect_stdout(sys.stderr)
    with usage_errors_reported("treat"), fit_argv(rest), messages_silenced(logging.ERROR), redirected:
        result = _treat(options, rest)
    print(text_of(result), file=stdout)
    code = {"no_treatment_found": 1, "budget_too_small": 2}.get(result.verdict, 0)
    if code:
        raise SystemExit(code)


def argument_parser() -> ArgumentParser:
    """Returns the parser of `fit` with the options of this command; for the completion of a shell."""
    parser = fit_parser()
    _add_options(parser)
    return parser


def _own_parser() -> argparse.ArgumentParser:
    """Returns the parser of the options that `fit` does not have."""
    usage = "--model my.Module [--data my.Data] [--budget 10m] [options]"
    parser = parser_beside_fit(
        "treat", usage, _DESCRIPTION, _EPILOG, checkpoint="not used: trials begin anew"
    )
    _add_options(parser)
    return parser


def _add_options(parser: Any) -> None:
    parser.add_argument("--budget", default="10m", help="time that it may take, such as 10m or 90s")
    parser.add_argument("--out", default="treatment", metavar="FOLDER", help="folder of what it leaves")
    parser.add_argument("--processes", type=int, default=None, metavar="N", help="trials at once")


def _treat(options: argparse.Namespace, arguments: Sequence[str]) -> TreatmentResult:
    try:
        seconds(options.budget)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    if options.processes is not None and options.processes < 1:
        raise UsageError(f"--processes {options.processes} must be at least 1.")
    with tempfile.TemporaryDirectory() as folder:
        command = command_line(
            arguments,
            also=["budget", "out", "processes"],
            callbacks=[Callback()],
            **trainer_alone(folder, named_class(arguments)),
        )
        try:
            return treat(
                command.new_module,
                command.fit_arguments.get("datamodule"),
                budget=options.budget,
                out=options.out,
                trainer=_trainer_arguments(command),
                seed=_seed(command),
                processes=options.processes,
                callbacks=_user_callbacks(arguments),
                command=shlex.join(["lightning-gradguard", "fit", *arguments, "-c", "CONFIGURATION"]),
            )
        except TreatmentError as error:
            raise UsageError(str(error)) from None
        except OSError as error:
            raise UsageError(f"--out {options.out} cannot be written: {error.strerror}.") from None


def _trainer_arguments(command: SuiteCLI) -> dict[str, Any]:
    trainer = command.config["fit"]["trainer"]
    return {n: v for n, v in vars(trainer).items() if v is not None and not isinstance(v, (Namespace, list))}


def _seed(command: SuiteCLI) -> int:
    seed = command.config["fit"].get("seed_everything")
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else 0


def _user_callbacks(arguments: Sequence[str]) -> list[Any]:
    """Returns the callbacks of the last configuration file that has some: the treatment's come after them."""
    found: list[Any] = []
    for path in config_files(arguments):
        trainer = read_config(path).get("trainer")
        if isinstance(trainer, dict) and isinstance(trainer.get("callbacks"), list):
            found = trainer["callbacks"]
    return found
