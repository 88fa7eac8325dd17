"""LightningCLI on a module and data of the user's, with an option for each callback of the suite."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from jsonargparse import ArgumentError
from pytorch_lightning.utilities.model_helpers import is_overridden

import lightning_gradguard
from lightning_gradguard.callbacks.defaults import DEFAULTS
from lightning_gradguard.cli.explaining import Failures, build, explained, explained_failure, recorded
from lightning_gradguard.cli.refusals import RefusalError, one_line, place_of
from lightning_gradguard.cli.user_module import config_files, named_class
from lightning_gradguard.cli.weights import read_checkpoint
from lightning_gradguard.runtime.trees import tree_of

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
else:
    LightningArgumentParser = LightningCLI = object  # those of the user's package join in when it is known

#: What Lightning itself knows where to look for.
_KNOWN_CHECKPOINTS = ("last", "best", "hpc")


@contextmanager
def typed(arguments: Sequence[str]) -> Iterator[None]:
    """Makes it look as if these had been typed after `fit`.

    There LightningCLI looks, and a strategy that starts processes of its own.

    Args:
        arguments: What a command was given.
    """
    before = sys.argv
    sys.argv = [before[0], "fit", *arguments]
    try:
        yield
    finally:
        sys.argv = before


def command_line(arguments: Sequence[str], also: Sequence[str] = (), **fixed: Any) -> SuiteCLI:
    """Read what was typed, and build the module, the data and the Trainer; nothing is trained yet.

    Args:
        arguments: `--model`, `--data`, `--trainer.*`, `--config`, and `--<callback>.*` of the suite; also to
            be `typed`.
        also: Options that the command has taken out of them; for hints.
        **fixed: Arguments of the Trainer that are not the user's to choose. With `callbacks` among them,
            neither the callbacks of the user nor the suite are in place, and no configuration is saved.

    Returns:
        With `trainer`, and in `fit_arguments` what its `fit` has to be given.

    Raises:
        RefusalError: If something that was typed is wrong.
    """
    tree = tree_of(named_class(arguments))  # loaded ahead of the callbacks, which inherit from what is there
    # short names in YAML, such as `PercentileClipping`, are found among what is loaded
    for name in lightning_gradguard.__all__:
        getattr(lightning_gradguard, name)
    lightning = import_module(f"{tree.__name__}.cli")
    failures: Failures = []
    parser = type("Parser", (_RecordingParser, lightning.LightningArgumentParser), {"failures": failures})
    facts = {"arguments": tuple(arguments), "also": tuple(also), "fixed": fixed, "failures": failures}
    strict = {"exit_on_error": False, "allow_abbrev": False}
    with warnings.catch_warnings():
        # newer versions of jsonargparse have other names for what Lightning calls
        warnings.simplefilter("ignore", DeprecationWarning)
        made: SuiteCLI = type("Command", (SuiteCLI, lightning.LightningCLI), facts)(
            tree.LightningModule,
            save_config_callback=None if "callbacks" in fixed else lightning.SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            trainer_class=tree.Trainer,
            parser_class=parser,
            parser_kwargs={**strict, "prog": "lightning-gradguard", "fit": dict(strict)},
            subclass_mode_model=True,
        )
    return made


class SuiteCLI(LightningCLI):
    """LightningCLI that has the suite's options, refuses in one line, and leaves fitting to its caller."""

    arguments: tuple[str, ...]
    also: tuple[str, ...]
    fixed: dict[str, Any]
    failures: Failures
    checkpoint: str | None
    fit_arguments: dict[str, Any]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """There is but one."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """An option for each callback: `null`, or arguments of it, or another class."""
        for name, kind in DEFAULTS.items():
            default = {"class_path": f"lightning_gradguard.{kind.__name__}"}
            what = f"{kind.__name__}; null leaves it out"
            parser.add_argument(f"--{name}", type=Optional[kind], default=default, help=what)  # noqa: UP045
        self.options = parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse in one line."""
        try:
            super().parse_arguments(parser, args)
            self._parse_checkpoint()
        except ArgumentError as error:
            options = [*self.options.get_defaults().keys(), *self.also]
            said = explained(str(error), self.arguments, config_files(self.arguments), options)
            raise RefusalError(said) from None

    def before_instantiate_classes(self) -> None:
        """Remember the exceptions of all classes, not only of those that Lightning builds its own way."""
        self.parser.add_instantiator(build, object)
        self.config["fit"]["ckpt_path"] = self.checkpoint

    def instantiate_classes(self) -> None:
        """Refuse in one line if an object cannot be built."""
        try:
            super().instantiate_classes()
        except RefusalError:
            raise
        except Exception as error:  # the user's own code
            raise RefusalError(explained_failure(self.failures, error)) from None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Put the suite in place, but for what the user has given or left out."""
        callbacks = self.fixed.get("callbacks") or self._callbacks()
        try:
            return super().instantiate_trainer(**{**kwargs, **self.fixed, "callbacks": callbacks})
        except Exception as error:  # Lightning says what is wrong with its arguments
            said = f"the Trainer could not be built: {one_line(str(error))}{place_of(error)}"
            raise RefusalError(said) from None

    def fit(self, **arguments: Any) -> None:
        """Called by Lightning in place of the Trainer's own; what is done with it is for the caller."""
        if self.datamodule is None and not is_overridden("train_dataloader", self.model):
            name = type(self.model).__name__
            raise RefusalError(
                f"name the data with --data my.Data: {name} has no train_dataloader of its own."
            )
        self.fit_arguments = arguments

    def _parse_checkpoint(self) -> None:
        """Take the module's arguments from a checkpoint that has them from a command line like this.

        Newer versions of Lightning do so too, and stop at checkpoints from elsewhere; so they see none.
        """
        config = self.config["fit"]
        self.checkpoint, config["ckpt_path"] = config["ckpt_path"], None
        path = str(self.checkpoint or "")
        if not path or path in _KNOWN_CHECKPOINTS or "://" in path:
            return
        if not Path(path).exists():
            raise RefusalError(f"--ckpt_path {path} cannot be opened: there is no such file.")
        if Path(path).is_file():
            content = read_checkpoint(
                path, "--ckpt_path", weights_only=config.get("weights_only") is not False
            )
            arguments = dict(content.get("hyper_parameters", {}))
            if arguments.pop("_class_path", None) == config["model"]["class_path"]:
                arguments.pop("_instantiator", None)
                model = {"class_path": config["model"]["class_path"], "init_args": arguments}
                self.config = self.parser.parse_object({"fit": {"model": model}}, self.config)

    def _callbacks(self) -> list[Any]:
        given = self.config_init["fit"]["trainer"]["callbacks"] or []
        callbacks = list(given) if isinstance(given, (list, tuple)) else [given]
        defaults = self.options.get_defaults()
        for name, kind in DEFAULTS.items():
            config = self.config["fit"]
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks += [self.config_init["fit"][name]] if config[name] is not None else []
                continue
            if config[name] not in (None, defaults[name]):
                raise RefusalError(
                    f"--{name} and trainer.callbacks both give a {kind.__name__}; leave one of them out."
                )
            config[name] = None  # as it is saved, so that it says what ran
        return callbacks


class _RecordingParser(LightningArgumentParser):
    failures: Failures

    def add_instantiator(self, instantiator: Any, *args: Any, **kwargs: Any) -> None:
        super().add_instantiator(recorded(instantiator, self.failures), *args, **kwargs)
