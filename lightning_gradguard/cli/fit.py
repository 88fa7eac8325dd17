"""`lightning-gradguard fit`: LightningCLI on a module and data of the user's, with the suite in place."""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import docstring_parser

import lightning_gradguard
from lightning_gradguard.callbacks.defaults import DEFAULTS
from lightning_gradguard.cli.messages import (
    UsageError,
    is_raised_by_suite,
    one_line,
    source_line,
    usage_errors_reported,
)
from lightning_gradguard.cli.parsing.lightning_cli import command_line, fit_argv, fit_parser

_HELP = """\
usage: lightning-gradguard fit --model my.Module [--data my.Data] [-c FILE] [options]

Trains your own module with all six callbacks in place, and saves the configuration beside the logs of
the run. It is LightningCLI, with all its options.

options:
{options}
  --seed_everything N           seed of weights, data and everything else
  --print_config                print the configuration and train nothing
  --help.all                    all options of Lightning's Trainer, optimizers and schedules
  --trainer.callbacks.help NAME all about a callback; --model.help my.Module about a module

`--nan_rollback.patience 5` gives a callback an argument, `--nan_rollback null` omits it,
`--nan_rollback my.Rollback` takes your own subclass. All arguments, with their defaults:

{callbacks}
examples:
  lightning-gradguard fit --model my.Module --data my.Data --trainer.max_epochs 10
  lightning-gradguard fit -c config.yaml --nan_rollback.patience 5 --learning_rate_backoff null
  lightning-gradguard fit -c config.yaml --adaptive_gradient_clipping.policy UnitwiseClipping

In YAML: `nan_rollback: {{patience: 5}}`, `learning_rate_backoff: null`. Callbacks under
`trainer: callbacks:` replace those of the same class.
Exit code 0: trained; 1: training diverged for good; 2: wrong input."""

#: Options that `fit` and `check` have in common.
MODULE_OPTIONS = """\
  --model my.Module             your own LightningModule; the current folder is searched, too
  --model.NAME VALUE            an argument of it
  --data my.Data                a LightningDataModule; not needed if the module has a train_dataloader
  --data.NAME VALUE             an argument of it
  -c, --config FILE             a YAML file with these options, such as the config.yaml that `fit` saves;
                                flags after it, and later files, override it
  --ckpt_path FILE              {checkpoint}
  --trainer.NAME VALUE          an argument of Lightning's Trainer"""


#: Of shell completion, as of all verbs.
argument_parser = fit_parser


def parser_beside_fit(
    verb: str, usage: str, description: str, epilog: str, *, checkpoint: str
) -> argparse.ArgumentParser:
    """Returns a parser for the options of a command that `fit` does not have."""
    return argparse.ArgumentParser(
        prog=f"lightning-gradguard {verb}",
        usage=f"lightning-gradguard {verb} {usage}",
        description=description + MODULE_OPTIONS.format(checkpoint=checkpoint),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def main(arguments: Sequence[str]) -> None:
    """Trains a module; exits with code 1 if training diverged, or the initialization forbids to start it."""
    if {"-h", "--help"} & set(arguments):
        options = MODULE_OPTIONS.format(checkpoint="resume from it")
        callbacks = "\n".join(_callback_help(name, kind) for name, kind in DEFAULTS.items())
        print(_HELP.format(options=options, callbacks=callbacks))
        return
    arguments = ["--help" if argument == "--help.all" else argument for argument in arguments]
    with usage_errors_reported("fit"), fit_argv(arguments):
        command = command_line(arguments)
        try:
            command.trainer.fit(**command.fit_arguments)
        except (lightning_gradguard.TrainingDivergedError, lightning_gradguard.InitializationError) as error:
            print(f"lightning-gradguard fit: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        except Exception as error:
            # each package of Lightning has this class; with the user's code in it, the traceback is shown
            is_input = type(error).__name__ == "MisconfigurationException" or is_raised_by_suite(error)
            if is_input and not source_line(error):
                raise UsageError(one_line(str(error))) from None
            raise


def _callback_help(name: str, kind: type) -> str:
    """Describes a callback, and each of its arguments in a line, with the default."""
    docstring = docstring_parser.parse(inspect.getdoc(kind) or "")
    descriptions = {argument.arg_name: argument.description or "" for argument in docstring.params}
    lines = textwrap.wrap(f"--{name}: {docstring.short_description}", 100)
    for argument in inspect.signature(kind).parameters.values():
        option = f"  .{argument.name} {_yaml(argument.default)}"
        description = descriptions[argument.name].replace("`", "")
        lines.append(f"{option:<31} {textwrap.shorten(description, 74, placeholder=' ...')}")
    return "\n".join([*lines, ""])


def _yaml(default: Any) -> str:
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
