"""`lightning-gradguard replay`: runs the batch of a saved incident again, and compares the origins."""

from __future__ import annotations

import linecache
import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lightning_gradguard.cli.checkpoints import load_weights, read_checkpoint
from lightning_gradguard.cli.messages import (
    Failures,
    UsageError,
    failure_message,
    instantiate,
    one_line,
    recording_failures,
    usage_errors_reported,
)
from lightning_gradguard.cli.parsing.parse_errors import parse_error_message
from lightning_gradguard.cli.parsing.preparse import config_files, named_class, read_config
from lightning_gradguard.core.forensics import Origin, OutOfRange, out_of_range_elements
from lightning_gradguard.core.incidents import OF_WEIGHTS, label, title
from lightning_gradguard.report.readers.incident_files import read_incidents
from lightning_gradguard.report.render.text import text_table
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.incidents.dossier import Dossier, DossierError, model_options, read_dossier
from lightning_gradguard.runtime.incidents.replay import SeenBatch, replay
from lightning_gradguard.runtime.lightning_packages import lightning_package_of, without_output
from lightning_gradguard.runtime.logging.silence import messages_silenced
from lightning_gradguard.runtime.treatment.module import KEY, change_as_saved

_HELP = """\
usage: lightning-gradguard replay DOSSIER --model my.Module [-c FILE] [--checkpoint FILE]

Runs the batch of an incident again, on the CPU, and compares the result with the recorded one.

options:
  DOSSIER             the folder incidents/<step> of a run, or dossier.pt within
  --model my.Module   the LightningModule of the run; the current folder is searched, too
  --model.NAME VALUE  an argument of it
  -c, --config FILE   the config.yaml that `fit` saved, with the module and its arguments
  --checkpoint FILE   other weights than those of the dossier

example:
  lightning-gradguard replay lightning_logs/version_0/incidents/42 --model my.Module

Exit code 0: reproduced; 1: not reproduced; 2: wrong input."""
_PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


def main(arguments: Sequence[str]) -> None:
    """Runs the batch of a dossier again, on the CPU; exits with code 1 if the incident is not reproduced."""
    if {"-h", "--help"} & set(arguments):
        print(_HELP)
        return
    with usage_errors_reported("replay"):
        dossier, module, weights, notes = _prepared(arguments)
        trainer = _trainer(dossier, module, weights)
    rng = {**dossier.rng, "cuda": []}  # this machine may have other GPUs, and none is used
    batch = SeenBatch(dossier.batch, dossier.batch_idx, rng, dossier.step)
    found = replay(trainer, module, batch, _out_of_range(dossier, module))
    print(comparison(dossier, found, notes))
    if not is_reproduced(dossier.origin, found):
        raise SystemExit(1)


def is_reproduced(recorded: Origin, found: Origin) -> bool:
    """Checks that a replay has found the same cause, module and operation, or that the step raised the same.

    Example:
        >>> is_reproduced(Origin("loss", operation="aten::log"), Origin("loss", operation="aten::log"))
        True
        >>> is_reproduced(Origin("loss", operation="aten::log"), Origin("transient"))
        False
    """
    both = (recorded, found)
    if found.cause == "unknown":  # all that is known of an exception is its message, but for addresses
        messages = [re.sub("0x[0-9a-f]+", "", o.detail.partition(f", at {o.location}")[0]) for o in both]
        return messages[0] == messages[1] and messages[0].startswith("The step raised")
    if all(o.cause in OF_WEIGHTS for o in both):  # of what has written them, a dossier has nothing
        return True
    same = [(o.cause, o.module, o.operation) for o in both]
    return same[0] == same[1]


def comparison(dossier: Dossier, found: Origin, notes: Sequence[str] = ()) -> str:
    """Describes an origin, with the remedy if it is the recorded one, else beside that."""
    recorded = dossier.origin
    reproduced = is_reproduced(recorded, found)
    found = recorded if reproduced and recorded.cause in OF_WEIGHTS else found
    same_place = recorded.detail.replace(recorded.location or found.location, found.location)
    if same_place.startswith(f"{found.detail.rstrip('.')} ("):
        found = replace(found, detail=same_place)  # the run has added samples, and the rank
    is_finite = found.cause == "transient" and not reproduced
    if is_finite:
        found = replace(found, detail=_what_is_finite(recorded))
    columns = {"found": found} if reproduced else {"recorded": recorded, "found now": found}
    origins = columns.values()
    table = (
        ("", *columns) if len(columns) > 1 else ("",),
        ("cause", *("none" if is_finite and o is found else label(o.cause) for o in origins)),
        ("module", *(origin.module for origin in origins)),
        ("operation", *(origin.operation for origin in origins)),
        ("line", *(origin.location for origin in origins)),
        ("at fault", *(", ".join(origin.where[:3]) for origin in origins)),
    )
    rows = [row for row in table if any(row[1:])]
    lines = [f"  {line}" for line in text_table(rows, sys.maxsize)]
    batch = (
        f"the batch of step {dossier.step} (epoch {dossier.epoch}, batch {dossier.batch_idx}, rank "
        f"{dossier.rank}, {dossier.precision})"
    )
    head = f"Reproduced: {batch} fails as it did in the run."
    if not reproduced:
        fails = "does not fail" if is_finite else "does not fail as it did in the run"
        head = f"Not reproduced: with this module, {batch} {fails}."
    details = {name: origin.detail for name, origin in columns.items() if origin.detail}
    return "\n".join(
        [
            head,
            *lines,
            *(f"{name}: {detail}" for name, detail in details.items()),
            *(f"note: {note}" for note in notes),
            *([f"what to do: {remedy}"] if reproduced and (remedy := found.remedy()) else []),
        ]
    )


def _what_is_finite(recorded: Origin) -> str:
    """Returns that a batch is finite by now, and whether the line that failed in the run is still there."""
    file = recorded.location.rpartition(":")[0]
    is_there = recorded.code in map(str.strip, linecache.getlines(file)) or not linecache.getlines(file)
    why = "" if is_there else f": `{recorded.code}` of the run is no longer in {file}"
    return f"All numbers of the batch are finite with this module, on the CPU{why}."


def _prepared(arguments: Sequence[str]) -> tuple[Dossier, pl.LightningModule, Mapping[str, Any], list[str]]:
    """Returns the dossier, the module, the weights for it, and notes for the user."""
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(
            "the dossier comes first: lightning-gradguard replay runs/incidents/42 --model my.Module"
        )
    try:
        dossier = read_dossier(arguments[0])
    except DossierError as error:
        raise UsageError(f"{error}{_dossiers_near(Path(arguments[0]))}") from None
    if dossier.batch is None:
        raise UsageError(f"there is no batch to run again; {_omitted(dossier, 'the batch')}.")
    if dossier.precision not in _PRECISIONS:
        raise UsageError(
            f"precision {dossier.precision!r} does not run on the CPU; these do: {', '.join(_PRECISIONS)}."
        )
    parser = argument_parser(lightning_package_of(named_class(arguments)).LightningModule)
    options, module = _build_module(parser, arguments, dossier.configuration)
    notes = [f"omitted from the dossier: {part}" for part in dossier.left_out]
    weights: Mapping[str, Any] | None = dossier.weights
    if options.checkpoint is not None:
        checkpoint = read_checkpoint(options.checkpoint, "--checkpoint")
        weights = checkpoint["state_dict"]
        dossier = replace(dossier, changes=checkpoint.get(KEY, []))
        notes.append(f"the weights are those of {options.checkpoint}, not those of step {dossier.step}")
    if weights is None:
        raise UsageError(
            f"there are no weights to run it with; {_omitted(dossier, 'the weights')}. Give --checkpoint "
            f"with one from about step {dossier.step}."
        )
    if dossier.rng["cuda"]:
        notes.append("random numbers that were drawn on a GPU differ on the CPU")
    if any(" of " in name for name in dossier.largest):
        notes.append("values out of range were in the state of an optimizer, which a dossier does not hold")
    return dossier, module, weights, notes


def _dossiers_near(path: Path) -> str:
    """Lists the dossiers near a path that leads to none, each as `replay` takes it."""
    if path.is_file() or (path / "dossier.pt").is_file():
        return ""
    folder = next(place for place in (path, *path.parents) if place.is_dir())
    places = ("*", "incidents/*", "*/incidents/*", "*/*/incidents/*")
    found = [str(file.parent) for place in places for file in sorted(folder.glob(f"{place}/dossier.pt"))]
    why = _why_none(path)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return why + (f" Name one of a step: {', '.join(found[:3])}{more}." if found else "")


def _why_none(path: Path) -> str:
    """Returns, from the run's incidents, why a step has no dossier; empty for a path to no step of a run."""
    file = path.parent.parent / "incidents.jsonl"
    if path.parent.name != "incidents" or not path.name.isdigit() or not file.is_file():
        return ""
    incidents = [i for i in read_incidents(file, []) if i.step == int(path.name)]
    if not incidents:
        return f" No incident was published at step {path.name}."
    reasons = [i.detail for i in incidents if i.detail] or ["only a nonfinite step that is skipped has one."]
    return f" Step {path.name} ({title(incidents[0].kind)}) has none: {reasons[0]}"


def _build_module(
    parser: ArgumentParser, arguments: Sequence[str], recorded: Mapping[str, str]
) -> tuple[Namespace, pl.LightningModule]:
    """Returns all options, and the module that they name; what a dossier has `recorded` is for hints."""
    failures: Failures = []
    files = config_files(arguments)
    try:
        with warnings.catch_warnings():
            # newer versions of jsonargparse have another name for `instantiate_classes`
            warnings.simplefilter("ignore", DeprecationWarning)
            parser.add_instantiator(recording_failures(instantiate, failures), object)
            if files:
                parser.set_defaults(model=_model_config(files[-1]))
            options = parser.parse_args(list(arguments))
            return options, parser.instantiate_classes(options).model
    except ArgumentError as error:
        message = parse_error_message(str(error), arguments, files, list(parser.get_defaults().keys()))
        hint = _hint(message, recorded)
        raise UsageError(message + hint) from None
    except UsageError:
        raise
    except Exception as error:  # the user's own code
        message = failure_message(failures, error)
        raise UsageError(message + _hint(message, recorded)) from None


def _hint(message: str, recorded: Mapping[str, str]) -> str:
    """Returns the options of the run, as far as it is known, where some are missing or wrong."""
    is_missing = " needs " in message
    if is_missing and not any(name.startswith("hparams.") for name in recorded):
        return " Give them as the run did, or as --config with the file that `fit` saved."
    if "module" in recorded and ("--model" in message or is_missing):
        return f" The run had: {model_options(recorded)}"
    return ""


def _model_config(config: str) -> Any:
    """Returns the part of a file for `fit` that names the module and its arguments."""
    model = read_config(config).get("model")
    if not isinstance(model, dict) or "class_path" not in model:
        raise UsageError(f"--config {config} has no `model` with a `class_path`, as `fit` reads it.")
    return model


def _omitted(dossier: Dossier, part: str) -> str:
    return next((text for text in dossier.left_out if text.startswith(part)), f"{part} was omitted")


def argument_parser(base: type = pl.LightningModule) -> ArgumentParser:
    """Returns the parser of this command; `base` is the `LightningModule` of either package."""
    parser = ArgumentParser(prog="lightning-gradguard replay", exit_on_error=False)
    parser.add_argument("dossier", type=os.PathLike)
    parser.add_argument("-c", "--config", type=os.PathLike)
    parser.add_argument("--checkpoint", type=os.PathLike)
    parser.add_subclass_arguments(base, "model", fail_untyped=False, required=True)
    return parser


def _trainer(dossier: Dossier, module: pl.LightningModule, weights: Mapping[str, Any]) -> pl.Trainer:
    """Returns a Trainer at the step of the run, with the module attached."""
    package = lightning_package_of(type(module))
    arguments: dict[str, Any] = {"precision": dossier.precision}
    if dossier.precision == "16-mixed":
        # Lightning creates no GradScaler for the CPU by itself
        scaler = torch.amp.GradScaler("cpu", init_scale=dossier.loss_scale)
        precision = import_module(f"{package.__name__}.plugins.precision")
        arguments = {"plugins": [precision.MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    with messages_silenced(logging.ERROR):  # about an idle GPU, and the like
        trainer: pl.Trainer = package.Trainer(
            accelerator="cpu", devices=1, **without_output(package), **arguments
        )
    lightning_api.attach_for_replay(trainer, module, dossier.epoch)
    try:
        module.configure_model()
        change_as_saved(module, {KEY: dossier.changes})
        trainer.precision_plugin.convert_module(module)
        if not module.automatic_optimization:
            trainer.strategy.setup_optimizers(trainer)  # the step asks for them
    except Exception as error:  # the user's own code
        raise UsageError(
            f"the module could not be set up: {type(error).__name__}: {one_line(str(error))}"
        ) from None
    try:
        load_weights(module, weights)
    except UsageError as error:
        raise UsageError(f"{error}{_hint(str(error), dossier.configuration)}") from None
    for name, submodule in module.named_modules():
        submodule.training = name not in dossier.evaluating
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in dossier.frozen)
    return trainer


def _out_of_range(dossier: Dossier, module: pl.LightningModule) -> dict[str, OutOfRange]:
    """Counts the elements of each weight that are out of range for the largest values of the healthy run."""
    named = dict(module.named_parameters())
    then = {n: torch.tensor(largest) for n, largest in dossier.largest.items() if n in named}
    return out_of_range_elements((n, named[n], largest) for n, largest in then.items())
