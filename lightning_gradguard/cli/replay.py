"""`lightning-gradguard replay`: a saved incident happens again, or does not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lightning_gradguard.cli.checkpoints import load_weights, read_checkpoint
from lightning_gradguard.cli.errors import UsageError, one_line, told
from lightning_gradguard.cli.help_pages import replay_page
from lightning_gradguard.cli.parse_errors import Failures, build, explained, explained_failure, recorded
from lightning_gradguard.cli.preparse import config_files, model_in, named_class
from lightning_gradguard.cli.silence_lightning import quiet
from lightning_gradguard.core.forensics import Origin, out_of_range_elements
from lightning_gradguard.core.incidents import label
from lightning_gradguard.core.remedies import advice_for_cause
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.incidents.dossier import Dossier, DossierError, read_dossier
from lightning_gradguard.runtime.incidents.replay import SeenBatch, replay
from lightning_gradguard.runtime.lightning_packages import lightning_package_of

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
        print(replay_page())
        return
    with told("replay"):
        dossier, module, weights, notes = _prepared(arguments)
        trainer = _trainer(dossier, module, weights)
    rng = {**dossier.rng, "cuda": []}  # this machine may have other GPUs, and none is used
    served = SeenBatch(dossier.batch, dossier.batch_idx, rng)
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
            ("cause", label(recorded.cause), label(found.cause)),
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
        raise UsageError(
            "the dossier comes first: lightning-gradguard replay runs/incidents/42 --model my.Module"
        )
    try:
        dossier = read_dossier(arguments[0])
    except DossierError as error:
        raise UsageError(f"{error}{_dossiers_near(Path(arguments[0]))}") from None
    if dossier.batch is None:
        raise UsageError(f"there is no batch to run again; {_left_out(dossier, 'the batch')}.")
    if dossier.precision not in _PRECISIONS:
        raise UsageError(
            f"precision {dossier.precision!r} does not run on the CPU; these do: {', '.join(_PRECISIONS)}."
        )
    parser = _parser(lightning_package_of(named_class(arguments)).LightningModule)
    options, module = _build_module(parser, arguments, dossier.configuration.get("module", ""))
    notes = [f"left out of the dossier: {part}" for part in dossier.left_out]
    weights: Mapping[str, Any] | None = dossier.weights
    if options.checkpoint is not None:
        weights = read_checkpoint(options.checkpoint, "--checkpoint")["state_dict"]
        notes.append(f"the weights are those of {options.checkpoint}, not those of step {dossier.step}")
    if weights is None:
        raise UsageError(
            f"there are no weights to run it with; {_left_out(dossier, 'the weights')}. Give --checkpoint "
            f"with one from about step {dossier.step}."
        )
    if dossier.rng["cuda"]:
        notes.append("random numbers that were drawn on a GPU are others on the CPU")
    if any(" of " in name for name in dossier.largest):
        notes.append("absurd values were in the state of an optimizer, which a dossier does not hold")
    return dossier, module, weights, notes


def _dossiers_near(path: Path) -> str:
    """Which dossiers there are, where one was named that does not exist."""
    if path.is_file() or (path / "dossier.pt").is_file():
        return ""
    folder = next(place for place in (path, *path.parents) if place.is_dir())
    places = ("*", "incidents/*", "*/incidents/*", "*/*/incidents/*")
    found = [str(file.parent) for place in places for file in sorted(folder.glob(f"{place}/dossier.pt"))]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f" There {'is' if len(found) == 1 else 'are'} {', '.join(found[:3])}{more}." if found else ""


def _build_module(
    parser: ArgumentParser, arguments: Sequence[str], recorded_class: str
) -> tuple[Namespace, pl.LightningModule]:
    """All options, and the module that they name; `recorded_class` is for hints, and not imported."""
    failures: Failures = []
    files = config_files(arguments)
    try:
        with warnings.catch_warnings():
            # what builds classes has got another name in newer versions of jsonargparse
            warnings.simplefilter("ignore", DeprecationWarning)
            parser.add_instantiator(recorded(build, failures), object)
            if files:
                parser.set_defaults(model=_model_in(files[-1]))
            options = parser.parse_args(list(arguments))
            return options, parser.instantiate_classes(options).model
    except ArgumentError as error:
        said = explained(str(error), arguments, files, list(parser.get_defaults().keys()))
        hint = f" The run's module was {recorded_class}." if recorded_class and "--model" in said else ""
        raise UsageError(said + hint) from None
    except UsageError:
        raise
    except Exception as error:  # the user's own code
        raise UsageError(explained_failure(failures, error)) from None


def _model_in(config: str) -> Any:
    """That part, with a class in it."""
    model = model_in(config)
    if not isinstance(model, dict) or "class_path" not in model:
        raise UsageError(f"--config {config} has no `model` with a `class_path`, as `fit` reads it.")
    return model


def _left_out(dossier: Dossier, part: str) -> str:
    return next((text for text in dossier.left_out if text.startswith(part)), f"{part} was left out")


def _parser(base: type) -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-gradguard replay",
        exit_on_error=False,
    )
    parser.add_argument("dossier")
    parser.add_argument("-c", "--config")
    parser.add_argument("--checkpoint")
    parser.add_subclass_arguments(base, "model", fail_untyped=False, required=True)
    return parser


def _trainer(dossier: Dossier, module: pl.LightningModule, weights: Mapping[str, Any]) -> pl.Trainer:
    """A Trainer that stands where the run's did, with the module in its hands."""
    tree = lightning_package_of(type(module))
    arguments: dict[str, Any] = {"precision": dossier.precision}
    if dossier.precision == "16-mixed":
        # Lightning has no float16 with a loss scale for the CPU, unless it is handed over like this
        scaler = torch.amp.GradScaler("cpu", init_scale=dossier.loss_scale)
        precision = import_module(f"{tree.__name__}.plugins.precision")
        arguments = {"plugins": [precision.MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    logger = import_module(f"{tree.__name__}.loggers.logger")
    with quiet():  # about an idle GPU, and the like
        trainer: pl.Trainer = tree.Trainer(
            accelerator="cpu",
            devices=1,
            logger=logger.DummyLogger(),  # takes whatever the user's step hands it
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **arguments,
        )
    lightning_api.attach_for_replay(trainer, module, step=dossier.step, epoch=dossier.epoch)
    try:
        module.configure_model()
        trainer.precision_plugin.convert_module(module)
        if not module.automatic_optimization:
            trainer.strategy.setup_optimizers(trainer)  # the step asks for them
    except Exception as error:  # the user's own code
        raise UsageError(
            f"the module could not be set up: {type(error).__name__}: {one_line(str(error))}"
        ) from None
    load_weights(module, weights)
    for name, submodule in module.named_modules():
        submodule.training = name not in dossier.evaluating
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in dossier.frozen)
    return trainer


def _grown(dossier: Dossier, module: pl.LightningModule) -> dict[str, int]:
    """Weights that are absurd beside what they were when the run was well, counted anew."""
    named = dict(module.named_parameters())
    then = {n: torch.tensor(largest) for n, largest in dossier.largest.items() if n in named}
    return out_of_range_elements((n, named[n], largest) for n, largest in then.items())
