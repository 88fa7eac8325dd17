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
from lightning_gradguard.cli.messages import (
    Failures,
    UsageError,
    failure_message,
    instantiate,
    one_line,
    recording_failures,
    source_line,
)
from lightning_gradguard.cli.parsing.parse_errors import no_arguments, parse_error_message
from lightning_gradguard.cli.parsing.preparse import config_files, named_class
from lightning_gradguard.runtime.lightning_api import Callback
from lightning_gradguard.runtime.lightning_packages import lightning_package_of, without_output

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
else:
    LightningCLI = object  # that of the user's package becomes a base class when it is known

#: Values of `--ckpt_path` that Lightning resolves itself.
_KEYWORDS = ("last", "best", "hpc")
_MODULE_FLAG = re.compile(r"--model\.(?:init_args\.)?(\w+)")


def trainer_alone(folder: str, model_class: Any) -> dict[str, Any]:
    """Returns arguments of a Trainer that leaves nothing behind, on one device, without limits of its own."""
    return {
        "default_root_dir": folder,
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "fast_dev_run": False,
        "barebones": False,
        "profiler": None,
        "max_time": None,
        **without_output(lightning_package_of(model_class)),
    }


@contextmanager
def fit_argv(arguments: Sequence[str]) -> Iterator[None]:
    """Replaces `sys.argv`, which LightningCLI reads, and a strategy that launches processes."""
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
    """Parses the arguments, and instantiates the module, the data and the Trainer; trains nothing yet.

    The arguments of `Trainer.fit` are in `fit_arguments` of the result.

    Args:
        arguments: Those of the command; they have to be in `sys.argv`, too, see `fit_argv`.
        also: Options that the command has parsed itself; for suggestions.
        instead_of_zero: Arguments of the Trainer that replace a 0 of the user's.
        **fixed: Arguments of the Trainer that the user cannot choose; the user's own are not instantiated.
            With `callbacks` among them, the callbacks of the user and of the suite are omitted, and no
            configuration is saved.
    """
    return _suite_cli(
        named_class(arguments),
        arguments=tuple(arguments),
        also=tuple(also),
        instead_of_zero=instead_of_zero,
        fixed=fixed,
    )


def fit_parser() -> LightningArgumentParser:
    """Returns the parser of `fit`; for the completion of a shell."""

    def stop(cli: SuiteCLI, *_: Any) -> None:
        raise _ParserReady(cli.options)

    try:
        _suite_cli(None, parse_arguments=stop)
    except _ParserReady as ready:
        parser: LightningArgumentParser = ready.args[0]
    return parser


def _suite_cli(model_class: Any, **attributes: Any) -> SuiteCLI:
    # imported ahead of the callbacks, whose base class depends on the package that is imported first
    package = lightning_package_of(model_class)
    # jsonargparse finds short names in YAML, such as `PercentileClipping`, among what is imported
    for name in lightning_gradguard.__all__:
        getattr(lightning_gradguard, name)
    lightning = import_module(f"{package.__name__}.cli")
    strict = {"exit_on_error": False, "allow_abbrev": False}
    saves_config = "callbacks" not in attributes.get("fixed", ())
    with warnings.catch_warnings():
        # newer versions of jsonargparse have other names for what Lightning calls
        warnings.simplefilter("ignore", DeprecationWarning)
        kind = type("Command", (SuiteCLI, lightning.LightningCLI), {"failures": [], **attributes})
        cli: SuiteCLI = kind(
            package.LightningModule,
            save_config_callback=lightning.SaveConfigCallback if saves_config else None,
            save_config_kwargs={"overwrite": True},
            trainer_class=package.Trainer,
            parser_kwargs={**strict, "prog": "lightning-gradguard", "fit": dict(strict)},
            subclass_mode_model=True,
        )
    return cli


class _ParserReady(Exception):
    """Ends LightningCLI, which parses as soon as it has a parser."""


class SuiteCLI(LightningCLI):
    """LightningCLI with the options of the suite and errors in one line, which leaves `fit` to its caller."""

    arguments: tuple[str, ...]
    also: tuple[str, ...]
    instead_of_zero: Mapping[str, Any]
    fixed: dict[str, Any]
    failures: Failures
    checkpoint: str | None
    fit_arguments: dict[str, Any]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Omits those other than `fit`."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Records why a class could not be instantiated."""
        parser = super().init_parser(**kwargs)
        add = parser.add_instantiator

        def add_recorded(instantiator: Any, *args: Any, **kwargs: Any) -> None:
            add(recording_failures(instantiator, self.failures), *args, **kwargs)

        parser.add_instantiator = add_recorded
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds an option for each callback: `null`, or its arguments, or another class."""
        for name, kind in DEFAULTS.items():
            default = {"class_path": f"lightning_gradguard.{kind.__name__}"}
            text = f"{kind.__name__}; null omits it"
            parser.add_argument(f"--{name}", type=Optional[kind], default=default, help=text)  # noqa: UP045
        self.options = parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reports an error in one line."""
        try:
            super().parse_arguments(parser, args)
            if not isinstance(self.config["fit"]["trainer"], Namespace):
                raise UsageError(no_arguments("trainer", self.arguments, config_files(self.arguments)))
            self._parse_checkpoint()
        except (ArgumentError, UnicodeDecodeError) as error:
            options = [*self.options.get_defaults().keys(), *self.also]
            files = config_files(self.arguments)
            raise UsageError(parse_error_message(str(error), self.arguments, files, options)) from None

    def before_instantiate_classes(self) -> None:
        """Omits what will not be used, and records the exceptions of all classes."""
        self.parser.add_instantiator(instantiate, object)
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
        """Reports in one line that a class cannot be instantiated."""
        try:
            super().instantiate_classes()
        except UsageError:
            raise
        except Exception as error:  # the user's own code
            raise UsageError(failure_message(self.failures, error)) from None

    def new_module(self) -> Any:
        """Instantiates the module anew, with the optimizer that the command line gives it."""
        self.instantiate_classes()
        return self.model

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Adds the callbacks of the suite, except those that the user has given or omitted."""
        callbacks = self.fixed.get("callbacks") or self._callbacks()
        try:
            return super().instantiate_trainer(**{**kwargs, **self.fixed, "callbacks": callbacks})
        except Exception as error:  # Lightning's messages name the argument
            text = f"{one_line(str(error))}{source_line(error)}"
            raise UsageError(f"the Trainer could not be built: {text}") from None

    def fit(self, **arguments: Any) -> None:
        """Keeps the arguments that Lightning would call `Trainer.fit` with."""
        if self.datamodule is None and not is_overridden("train_dataloader", self.model):
            name = type(self.model).__name__
            raise UsageError(f"name the data with --data my.Data: {name} has no train_dataloader of its own.")
        self.fit_arguments = arguments

    def _parse_checkpoint(self) -> None:
        """Takes the module's arguments from a checkpoint that a command line like this has saved.

        Newer versions of Lightning do so too, and fail with other checkpoints; so the path is hidden.
        """
        config = self.config["fit"]
        self.checkpoint, config["ckpt_path"] = config["ckpt_path"], None
        path = str(self.checkpoint or "")
        if not path or path in _KEYWORDS or "://" in path:
            return
        if not Path(path).exists():
            raise UsageError(f"--ckpt_path {path} cannot be opened: there is no such file.")
        if Path(path).is_dir():
            return
        content = self._read_checkpoint(path)
        arguments = dict(content.get("hyper_parameters") or {})
        if arguments.pop("_class_path", None) == config["model"]["class_path"]:
            arguments.pop("_instantiator", None)
            flags = (_MODULE_FLAG.match(argument) for argument in self.arguments)
            for name in {flag[1] for flag in flags if flag} & arguments.keys():
                del arguments[name]  # a flag overrides the checkpoint
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
                _omit_option(name, "trainer.callbacks", config, defaults)
        suite = {name: self.config_init["fit"][name] for name in DEFAULTS if config[name] is not None}
        return [*callbacks, *suite.values(), _OmitReplaced(suite, config, defaults)]


class _OmitReplaced(Callback):
    """Omits the options of callbacks that Lightning has replaced by those of the module."""

    def __init__(self, suite: dict[str, Any], config: Namespace, defaults: Namespace) -> None:
        super().__init__()
        self._suite = suite
        self._config = config
        self._defaults = defaults

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        place = f"{type(pl_module).__name__}.configure_callbacks"
        for name, callback in self._suite.items():
            if callback not in trainer.callbacks:  # type: ignore[attr-defined]
                _omit_option(name, place, self._config, self._defaults)


def _omit_option(name: str, place: str, config: Namespace, defaults: Namespace) -> None:
    """Omits an option, also from the saved configuration, as the callback is given at another place."""
    if config[name] not in (None, defaults[name]):
        kind = DEFAULTS[name].__name__
        raise UsageError(f"--{name} and {place} both give a {kind}; omit one of them.")
    config[name] = None
