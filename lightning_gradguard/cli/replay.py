"""`lightning-gradguard replay`: a saved incident happens again, or does not."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser

from lightning_gradguard.cli.user_module import RefusalError, build_module, named_class, one_line
from lightning_gradguard.core.diagnosis import advice_for_cause
from lightning_gradguard.core.forensics import Origin, grown_elements
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.dossiers import Dossier, DossierError, read_dossier
from lightning_gradguard.runtime.replaying import ServedBatch, replay
from lightning_gradguard.runtime.trees import tree_of

_PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


def main(arguments: Sequence[str]) -> None:
    """Run the batch of a dossier again, on the CPU, and compare what is found with what was recorded.

    Args:
        arguments: The dossier first, then `--model` and its arguments, `--config`, `--checkpoint`.

    Raises:
        SystemExit: With code 1 if the incident did not happen again; with code 2 and one short message if
            the dossier or an argument is wrong.
    """
    if {"-h", "--help"} & set(arguments):
        _parser(pl.LightningModule).print_help()
        return
    try:
        dossier, module, weights, notes = _prepared(arguments)
        trainer = _trainer(dossier, module, weights)
    except (RefusalError, DossierError) as error:
        print(f"lightning-gradguard replay: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    rng = {**dossier.rng, "cuda": []}  # this machine may have other GPUs, and none is used
    served = ServedBatch(dossier.batch, dossier.batch_idx, rng)
    found = replay(trainer, module, served, _grown(dossier, module))
    print(comparison(dossier, found, notes))
    if not is_reproduced(dossier.origin, found):
        raise SystemExit(1)


def is_reproduced(recorded: Origin, found: Origin) -> bool:
    """Whether a replay came to the same cause, module and operation.

    Example:
        >>> is_reproduced(Origin("loss", operation="aten::log"), Origin("loss", operation="aten::log"))
        True
        >>> is_reproduced(Origin("loss", operation="aten::log"), Origin("transient"))
        False
    """
    same = [(o.cause, o.module, o.operation) for o in (recorded, found)]
    return same[0] == same[1] and found.cause != "unknown"


def comparison(dossier: Dossier, found: Origin, notes: Sequence[str] = ()) -> str:
    """What was recorded beside what was found, and what to do.

    Args:
        dossier: What was recorded.
        found: What the replay came to.
        notes: What the replay could not do as the run did.
    """
    recorded = dossier.origin
    reproduced = is_reproduced(recorded, found)
    rows = [("", "recorded", "found again")] + [
        (name, one, other)
        for name, one, other in (
            ("cause", recorded.cause, found.cause),
            ("module", recorded.module, found.module),
            ("operation", recorded.operation, found.operation),
            ("at fault", ", ".join(recorded.where[:3]), ", ".join(found.where[:3])),
        )
        if one or other
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    details = [f"found: {found.detail}"]
    if found.detail != recorded.detail:
        details = [f"recorded: {recorded.detail}", *details]
    if found.cause == "transient" != recorded.cause:
        details.append("With the module and the weights as they are now, nothing goes wrong.")
    return "\n".join(
        [
            f"Step {dossier.step}, epoch {dossier.epoch}, batch {dossier.batch_idx}, rank {dossier.rank}, "
            f"{dossier.precision}:",
            *lines,
            *details,
            *(f"note: {note}" for note in notes),
            "reproduced" if reproduced else "not reproduced",
            *([advice_for_cause(found.cause, found.where)] if reproduced else []),
        ]
    )


def _prepared(arguments: Sequence[str]) -> tuple[Dossier, pl.LightningModule, Mapping[str, Any], list[str]]:
    """What is run: dossier, module, the weights it shall have; and what people should know."""
    if not arguments or arguments[0].startswith("-"):
        raise RefusalError(
            "the dossier comes first: lightning-gradguard replay runs/incidents/42 --model my.Module"
        )
    dossier = read_dossier(arguments[0])
    if dossier.batch is None:
        raise RefusalError(f"there is no batch to run again; {_left_out(dossier, 'the batch')}.")
    if dossier.precision not in _PRECISIONS:
        raise RefusalError(
            f"precision {dossier.precision!r} does not run on the CPU; these do: {', '.join(_PRECISIONS)}."
        )
    parser = _parser(tree_of(named_class(arguments)).LightningModule)
    options, module = build_module(parser, arguments, recorded=dossier.configuration.get("module", ""))
    notes = [f"left out of the dossier: {part}" for part in dossier.left_out]
    weights: Mapping[str, Any] | None = dossier.weights
    if options.checkpoint is not None:
        weights = _weights_in(options.checkpoint)
        notes.append(f"the weights are those of {options.checkpoint}, not those of step {dossier.step}")
    if weights is None:
        raise RefusalError(
            f"there are no weights to run it with; {_left_out(dossier, 'the weights')}. Give --checkpoint "
            f"with one from about step {dossier.step}."
        )
    if dossier.rng["cuda"]:
        notes.append("random numbers that were drawn on a GPU are others on the CPU")
    if any(" of " in name for name in dossier.largest):
        notes.append("absurd values were in the state of an optimizer, which a dossier does not hold")
    return dossier, module, weights, notes


def _left_out(dossier: Dossier, part: str) -> str:
    return next((text for text in dossier.left_out if text.startswith(part)), f"{part} was left out")


def _parser(base: type) -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-gradguard replay",
        description="Run the batch of a dossier again, on the CPU, and compare what is found.",
        exit_on_error=False,
    )
    parser.add_argument("dossier", help="folder incidents/<step> of a run, or dossier.pt within")
    parser.add_argument("--config", help="YAML file for `fit`; the `model` in it is read")
    parser.add_argument("--checkpoint", help="file with weights, instead of the dossier's")
    parser.add_subclass_arguments(base, "model", fail_untyped=False, required=True)
    return parser


def _weights_in(checkpoint: str) -> Mapping[str, Any]:
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights: Mapping[str, Any] = content.get("state_dict", content)
    except OSError as error:
        raise RefusalError(f"--checkpoint {checkpoint} cannot be opened: {error.strerror}.") from None
    except Exception:  # torch raises many kinds
        raise RefusalError(
            f"--checkpoint {checkpoint} is damaged, or holds more than plain data; save a state_dict alone."
        ) from None
    return weights


def _trainer(dossier: Dossier, module: pl.LightningModule, weights: Mapping[str, Any]) -> pl.Trainer:
    """A Trainer that stands where the run's did, with the module in its hands."""
    tree = tree_of(type(module))
    arguments: dict[str, Any] = {"precision": dossier.precision}
    if dossier.precision == "16-mixed":
        # Lightning has no float16 with a loss scale for the CPU, unless it is handed over like this
        scaler = torch.amp.GradScaler("cpu", init_scale=dossier.loss_scale)
        precision = import_module(f"{tree.__name__}.plugins.precision")
        arguments = {"plugins": [precision.MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    logger = import_module(f"{tree.__name__}.loggers.logger")
    with warnings.catch_warnings(), _quiet("pytorch_lightning"), _quiet("lightning.pytorch"):
        warnings.simplefilter("ignore")  # of an idle GPU, and the like
        trainer: pl.Trainer = tree.Trainer(
            accelerator="cpu",
            devices=1,
            logger=logger.DummyLogger(),  # takes whatever the user's step hands it
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **arguments,
        )
    lightning_api.stand_in(trainer, module, step=dossier.step, epoch=dossier.epoch)
    try:
        module.configure_model()
        trainer.precision_plugin.convert_module(module)
        if not module.automatic_optimization:
            trainer.strategy.setup_optimizers(trainer)  # the step asks for them
    except Exception as error:  # the user's own code
        raise RefusalError(
            f"the module could not be set up: {type(error).__name__}: {one_line(str(error))}"
        ) from None
    _load(module, weights)
    for name, submodule in module.named_modules():
        submodule.training = name not in dossier.evaluating
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in dossier.frozen)
    return trainer


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load(module: pl.LightningModule, weights: Mapping[str, Any]) -> None:
    own = module.state_dict()
    try:
        keys = module.load_state_dict(weights, strict=False)
        # extra state is of any kind, and not kept
        missing = [name for name in keys.missing_keys if not name.endswith("_extra_state")]
        problems = [f"{name} is missing in them" for name in missing]
        problems += [f"the module has no {name}" for name in keys.unexpected_keys]
    except RuntimeError as error:
        shapes = ((n, w.shape, own[n].shape) for n, w in weights.items() if n in own)
        problems = [f"{n} is {tuple(w)}, the module's {tuple(o)}" for n, w, o in shapes if w != o]
        problems = problems or [one_line(str(error))]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise RefusalError(
            f"the weights do not fit {type(module).__name__}: {problems[0]}{more}. Give the arguments that "
            "the run's module was built with, as --model.NAME VALUE or --config."
        )


def _grown(dossier: Dossier, module: pl.LightningModule) -> dict[str, int]:
    """Weights that are absurd beside what they were when the run was well, counted anew."""
    named = dict(module.named_parameters())
    then = {n: torch.tensor(largest) for n, largest in dossier.largest.items() if n in named}
    return grown_elements((n, named[n], largest) for n, largest in then.items())
