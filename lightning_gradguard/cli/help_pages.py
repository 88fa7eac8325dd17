"""What `--help` prints after `fit`, `check` and `replay`: options, a line each, and where the rest is."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import docstring_parser

from lightning_gradguard.callbacks.defaults import DEFAULTS

_MODULE = """\
  --model my.Module             a LightningModule of yours; the current folder is searched too
  --model.NAME VALUE            an argument of it
  --data my.Data                a LightningDataModule; not needed if the module has a train_dataloader
  --data.NAME VALUE             an argument of it
  -c, --config FILE             a YAML file with all this, such as the config.yaml that `fit` saves; several
                                may be given, and flags after them win
  --ckpt_path FILE              {checkpoint}
  --trainer.NAME VALUE          an argument of Lightning's Trainer
"""


def fit_page() -> str:
    """What `fit --help` prints."""
    return "\n".join(
        [
            "lightning-gradguard fit --model my.Module [--data my.Data] [-c FILE] [options]\n",
            "Trains a module of yours with all five callbacks in place, and saves the configuration beside",
            "the run's logs. It is LightningCLI: everything that it takes is taken here.\n",
            _MODULE.format(checkpoint="resume from it")
            + "  --seed_everything N           seed of weights, data and everything else\n"
            "  --print_config                print the configuration and train nothing\n"
            "  --help.all                    all options of Lightning's Trainer, optimizers and schedules\n"
            "  --trainer.callbacks.help NAME all about a callback; --model.help my.Module about a module\n",
            "`--nan_rollback.patience 5` gives a callback an argument, `--nan_rollback null` leaves it out,",
            "`--nan_rollback my.Rollback` takes a subclass of yours. All arguments, with their defaults:\n",
            *(_about(name, kind) for name, kind in DEFAULTS.items()),
            "Examples:",
            "  lightning-gradguard fit --model my.Module --data my.Data --trainer.max_epochs 10",
            "  lightning-gradguard fit -c config.yaml --nan_rollback.patience 5 --learning_rate_backoff null",
            "  lightning-gradguard fit -c config.yaml --adaptive_gradient_clipping.policy UnitwiseClipping\n",
            "In YAML: `nan_rollback: {patience: 5}`, `learning_rate_backoff: null`. Callbacks under",
            "`trainer: callbacks:` take the place of those of the same class.",
            "Exit code 0: trained; 1: training diverged for good; 2: wrong input.",
        ]
    )


def check_page() -> str:
    """What `check --help` prints."""
    return "\n".join(
        [
            "lightning-gradguard check --model my.Module [--data my.Data] [-c FILE] [options]\n",
            "Tells whether a network can train as it is initialized, by the first training batch. No step of",
            "an optimizer is taken, nothing is written. It takes what `fit` takes, and uses one device;",
            "callbacks and loggers are left out.\n",
            _MODULE.format(checkpoint="check the weights in it, as they are")
            + "  --json [FILE]                 findings and values as JSON, to standard output or a file\n",
            "Examples:",
            "  lightning-gradguard check --model my.Module --data my.Data --model.depth 40",
            "  lightning-gradguard check -c lightning_logs/version_0/config.yaml --json > check.json\n",
            "Exit code 0: nothing that keeps it from training; 1: a criterion FAILs; 2: wrong input.",
        ]
    )


def replay_page() -> str:
    """What `replay --help` prints."""
    return "\n".join(
        [
            "lightning-gradguard replay DOSSIER --model my.Module [-c FILE] [--checkpoint FILE]\n",
            "Runs the batch of an incident again, on the CPU, and compares what is found with what was",
            "recorded.\n",
            "  DOSSIER             the folder incidents/<step> of a run, or dossier.pt within",
            "  --model my.Module   the LightningModule of the run; the current folder is searched too",
            "  --model.NAME VALUE  an argument of it",
            "  -c, --config FILE   the config.yaml that `fit` saved; the module and its arguments are read",
            "  --checkpoint FILE   other weights than those of the dossier\n",
            "Example:",
            "  lightning-gradguard replay lightning_logs/version_0/incidents/42 --model my.Module\n",
            "Exit code 0: it happened again; 1: it did not; 2: wrong input.",
        ]
    )


def _about(name: str, kind: type) -> str:
    """A callback, and a line for each of its arguments: the default, and what it is."""
    described = docstring_parser.parse(inspect.getdoc(kind) or "")
    told = {argument.arg_name: argument.description or "" for argument in described.params}
    lines = textwrap.wrap(f"--{name}: {described.short_description}", 100)
    for argument in inspect.signature(kind).parameters.values():
        option = f"  .{argument.name} {_shown(argument.default)}"
        what = textwrap.shorten(told[argument.name].replace("`", ""), 74, placeholder=" ...")
        lines.append(f"{option:<32}{what}")
    return "\n".join([*lines, ""])


def _shown(default: Any) -> str:
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
