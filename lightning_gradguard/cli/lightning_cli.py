"""LightningCLI on a module and data of the user's, with an option for each callback of the suite."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Optional

import pytorch_lightning as pl
from jsonargparse import ArgumentError, Namespace
from pytorch_lightning.utilities.model_helpers import is_overridden

import lightning_gradguard
from lightning_gradguard.callbacks.defaults import DEFAULTS
from lightning_gradguard.cli.checkpoints import read_checkpoint
from lightning_gradguard.cli.errors import UsageError, one_line, place_of
from lightning_gradguard.cli.parse_errors import (
    Failures,
    build,
    explained,
    explained_failure,
    no_arguments,
    recorded,
)
from lightning_gradguard.cli.preparse import config_files, named_class
from lightning_gradguard.runtime.lightning_api import Callback
from lightning_gradguard.runtime.lightning_packages import lightning_package_of

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
else:
    LightningCLI = object  # that of the user's package joins in when it is known

#: What Lightning itself knows where to look for.
_KNOWN_CHECKPOINTS = ("last", "best", "hpc")
#: A flag for an argument of the module.
_OF_THE_MODULE = re.compile(r"--model\.(?:init_args\.)?(\w+)")


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


def command_line(
    arguments: Sequence[str],
    also: Sequence[str] = (),
    instead_of_zero: Mapping[str, Any] = MappingProxyType({}),
    **fixed: Any,
) -> SuiteCLI:
    """Read what was typed, and build the module, the data and the Trainer; nothing is trained yet.

    Args:
        arguments: `--model`, `--data`, `--trainer.*`, `--config`, and `--<callback>.*` of the suite; also to
            be `typed`.
        also: Options that the command has taken out of them; for hints.
        instead_of_zero: Arguments that the Trainer is given where the user's is 0.
        **fixed: Arguments of the Trainer that are not the user's to choose; what the user has given for them
            is not built. With `callbacks` among them, neither the callbacks of the user nor the suite are in
            place, and no configuration is saved.

    Returns:
        With `trainer`, and in `fit_arguments` what its `fit` has to be given.

    Raises:
        RefusalError: If something that was typed is wrong.
    """
    tree = lightning_package_of(
        named_class(arguments)
    )  # loaded ahead of the callbacks, which inherit from what is there
    # short names in YAML, such as `PercentileClipping`, are found among what is loaded
    for name in lightning_gradguard.__all__:
        getattr(lightning_gradguard, name)
    lightning = import_module(f"{tree.__name__}.cli")
    failures: Failures = []
    facts = {
        "arguments": tuple(arguments),
        "also": tuple(also),
        "instead_of_zero": instead_of_zero,
        "fixed": fixed,
        "failures": failures,
    }
    strict = {"exit_on_error": False, "allow_abbrev": False}
    with warnings.catch_warnings():
        # newer versions of jsonargparse have other names for what Lightning calls
        warnings.simplefilter("ignore", DeprecationWarning)
        made: SuiteCLI = type("Command", (SuiteCLI, lightning.LightningCLI), facts)(
            tree.LightningModule,
            save_config_callback=None if "callbacks" in fixed else lightning.SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            trainer_class=tree.Trainer,
            parser_kwargs={**strict, "prog": "lightning-gradguard", "fit": dict(strict)},
            subclass_mode_model=True,
        )
    return made


class SuiteCLI(LightningCLI):
    """LightningCLI that has the suite's options, refuses in one line, and leaves fitting to its caller."""

    arguments: tuple[str, ...]
    also: tuple[str, ...]
    instead_of_zero: Mapping[str, Any]
    fixed: dict[str, Any]
    failures: Failures
    checkpoint: str | None
    fit_arguments: dict[str, Any]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """There is but one."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Remember why an object could not be built."""
        parser = super().init_parser(**kwargs)
        add = parser.add_instantiator

        def add_recorded(instantiator: Any, *args: Any, **kwargs: Any) -> None:
            add(recorded(instantiator, self.failures), *args, **kwargs)

        parser.add_instantiator = add_recorded
        return parser

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
            if not isinstance(self.config["fit"]["trainer"], Namespace):
                raise UsageError(no_arguments("trainer", self.arguments, config_files(self.arguments)))
            self._parse_checkpoint()
        except (ArgumentError, UnicodeDecodeError) as error:
            options = [*self.options.get_defaults().keys(), *self.also]
            said = explained(str(error), self.arguments, config_files(self.arguments), options)
            raise UsageError(said) from None

    def before_instantiate_classes(self) -> None:
        """Build what will be used, and remember the exceptions of all classes."""
        self.parser.add_instantiator(build, object)
        config = self.config["fit"]
        config["ckpt_path"] = self.checkpoint
        for name in self.fixed:
            config["trainer"][name] = None
        for name, value in self.instead_of_zero.items():
            if config["trainer"][name] == 0:
                config["trainer"][name] = value
        for name in DEFAULTS if "callbacks" in self.fixed else ():
            config[name] = None

    def instantiate_classes(self) -> None:
        """Refuse in one line if an object cannot be built."""
        try:
            super().instantiate_classes()
        except UsageError:
            raise
        except Exception as error:  # the user's own code
            raise UsageError(explained_failure(self.failures, error)) from None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Put the suite in place, but for what the user has given or left out."""
        callbacks = self.fixed.get("callbacks") or self._callbacks()
        try:
            return super().instantiate_trainer(**{**kwargs, **self.fixed, "callbacks": callbacks})
        except Exception as error:  # Lightning says what is wrong with its arguments
            said = f"the Trainer could not be built: {one_line(str(error))}{place_of(error)}"
            raise UsageError(said) from None

    def fit(self, **arguments: Any) -> None:
        """Called by Lightning in place of the Trainer's own; what is done with it is for the caller."""
        if self.datamodule is None and not is_overridden("train_dataloader", self.model):
            name = type(self.model).__name__
            raise UsageError(f"name the data with --data my.Data: {name} has no train_dataloader of its own.")
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
            raise UsageError(f"--ckpt_path {path} cannot be opened: there is no such file.")
        if Path(path).is_dir():
            return
        content = self._read_checkpoint(path)
        arguments = dict(content.get("hyper_parameters") or {})
        if arguments.pop("_class_path", None) == config["model"]["class_path"]:
            arguments.pop("_instantiator", None)
            flags = (_OF_THE_MODULE.match(argument) for argument in self.arguments)
            for name in {flag[1] for flag in flags if flag} & arguments.keys():
                del arguments[name]  # what is typed wins
            model = {"class_path": config["model"]["class_path"], "init_args": arguments}
            self.config = self.parser.parse_object({"fit": {"model": model}}, self.config)

    def _read_checkpoint(self, path: str) -> dict[str, Any]:
        config = self.config["fit"]
        is_fit, has_option = "callbacks" not in self.fixed, "weights_only" in config
        # where Lightning has no such option, it reads anything
        weights_only = config["weights_only"] is not False if has_option else not is_fit
        trust = "--weights_only false" if has_option else None
        content = read_checkpoint(path, "--ckpt_path", weights_only=weights_only, trust=trust)
        if is_fit and "pytorch-lightning_version" not in content:
            raise UsageError(
                f"--ckpt_path {path} holds weights alone; a run is resumed from a checkpoint that Lightning "
                "has saved."
            )
        return content

    def _callbacks(self) -> list[Any]:
        config, defaults = self.config["fit"], self.options.get_defaults()
        given = self.config_init["fit"]["trainer"]["callbacks"] or []
        callbacks = list(given) if isinstance(given, (list, tuple)) else [given]
        for name, kind in DEFAULTS.items():
            if any(isinstance(callback, kind) for callback in callbacks):
                _give_way(name, "trainer.callbacks", config, defaults)
        suite = {name: self.config_init["fit"][name] for name in DEFAULTS if config[name] is not None}
        return [*callbacks, *suite.values(), _Replaced(suite, config, defaults)]


class _Replaced(Callback):
    """Sees which callbacks of the suite Lightning has replaced by those of the module.

    Args:
        suite: By their options.
        config: What will be saved.
        defaults: See `_give_way`.
    """

    def __init__(self, suite: dict[str, Any], config: Namespace, defaults: Namespace) -> None:
        super().__init__()
        self._suite = suite
        self._config = config
        self._defaults = defaults

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        place = f"{type(pl_module).__name__}.configure_callbacks"
        for name, callback in self._suite.items():
            if callback not in trainer.callbacks:  # type: ignore[attr-defined]
                _give_way(name, place, self._config, self._defaults)


def _give_way(name: str, place: str, config: Namespace, defaults: Namespace) -> None:
    """Leave out an option of the suite, also of what is saved, where the user gives such a callback.

    Args:
        name: Of the option.
        place: Where it is given.
        config: Is changed.
        defaults: What the option is if nobody types it.

    Raises:
        RefusalError: If it was typed as well.
    """
    if config[name] not in (None, defaults[name]):
        kind = DEFAULTS[name].__name__
        raise UsageError(f"--{name} and {place} both give a {kind}; leave one of them out.")
    config[name] = None
