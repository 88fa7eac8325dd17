"""The user's LightningModule, built from what was typed; and what to say if it cannot be."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import os
import pkgutil
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lightning_gradguard.runtime.trees import tree_of


class RefusalError(Exception):
    """What was typed is wrong; the message says what, and what to do, in a line."""


def named_class(arguments: Sequence[str]) -> Any:
    """The class that `--model`, or else the last `--config`, names; `None` if it is not to be had.

    A parser has to know beforehand whether the class is one of `pytorch_lightning` or of `lightning`; what
    is wrong with it, that parser tells better.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", "-c", action="append", default=[])
    first.add_argument("--model", default="")
    options = first.parse_known_args(arguments)[0]
    paths = [options.model, *map(_class_path_in, reversed(options.config))]
    module, _, name = next(filter(None, paths), "").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # the user's own code
        return None


def build_module(
    parser: ArgumentParser, arguments: Sequence[str], recorded: str
) -> tuple[Namespace, pl.LightningModule]:
    """Read the arguments and build the module that they name.

    Args:
        parser: Has `--config` and, as a subclass of LightningModule, `--model`.
        arguments: What was typed.
        recorded: The class that is expected, as `my.Module`; for hints only, for it is not imported unless
            the user names it.

    Returns:
        All options, and the module.

    Raises:
        RefusalError: If an argument is wrong, or the user's own code fails.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(arguments)[0].config
    try:
        with warnings.catch_warnings():
            # what builds classes has got another name in newer versions of jsonargparse
            warnings.simplefilter("ignore", DeprecationWarning)
            if config is not None:
                parser.set_defaults(model=_model_in(config))
            options = parser.parse_args(list(arguments))
            return options, parser.instantiate_classes(options).model
    except ArgumentError as error:
        raise RefusalError(_explained(str(error), recorded)) from None
    except RefusalError:
        raise
    except Exception as error:  # the user's own code
        raise RefusalError(f"the module could not be built: {one_line(_inner(str(error)))}") from None


def one_line(text: str) -> str:
    """A message of many lines in one, and not too long.

    Example:
        >>> one_line("wrong:   - a value")
        'wrong: - a value'
    """
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."


def _class_path_in(config: str) -> str:
    try:
        model = _read_model(config)
    except RefusalError:
        return ""
    return str(model.get("class_path", "") if isinstance(model, dict) else model or "")


def _read_model(config: str) -> Any:
    """The part of a file for LightningCLI that names the module and its arguments."""
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RefusalError(f"--config {config} cannot be read: {one_line(str(error))}") from None
    content = content if isinstance(content, dict) else {}
    return content.get("model", (content.get("fit") or {}).get("model"))


def _model_in(config: str) -> Any:
    """That part, with a class in it."""
    model = _read_model(config)
    if not isinstance(model, dict) or "class_path" not in model:
        raise RefusalError(f"--config {config} has no `model` with a `class_path`, as `fit` reads it.")
    return model


def _inner(error: str) -> str:
    """What jsonargparse has against the class, without what it has against there being none."""
    found = re.search(r"Errors:(.*)Given value type", error, re.S)
    told = found[1].replace("- Expected a <class 'NoneType'>", "") if found else error
    return told.strip().removeprefix("- ")


def _explained(error: str, recorded: str) -> str:
    """What jsonargparse tells in many lines, in one, with the nearest valid name."""
    hint = f" The run's module was {recorded}." if recorded else ""
    if re.search(r"""required: model|["']model["'] is required""", error):
        return f"name the module with --model.{hint}"
    unknown = re.search(r"[Uu]nrecognized arguments: (--[\w.-]+)", error)
    if unknown is not None:
        flags = ("--model", "--config", "--checkpoint")
        return f"there is no {unknown[1]}.{_nearest(unknown[1], flags) or ' There are: ' + ', '.join(flags)}"
    given = re.search(r"given class_path '([^']+)'", error) or re.search(r"Given value: ([\w.]+)\s*$", error)
    if given is None:
        return one_line(error)
    path = given[1]
    if (problem := _problem_with(path)) is not None:
        return f"--model {path}: {problem}{hint}"
    option = re.search(r"(?:Option|Key) '(\w+)' is not (?:accepted|expected)", error)
    if option is not None:
        module, _, name = path.rpartition(".")
        valid = tuple(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
        near = _nearest(option[1], valid, "--model.") or f" There are: {', '.join(valid) or 'none'}."
        return f"--model.{option[1]}: {path} takes no such argument.{near}"
    inner = _inner(error).partition(f"given class_path '{path}':")[2]
    return f"--model {path}: {one_line(inner or error)}"


def _problem_with(path: str) -> str | None:
    """Why a path leads to no LightningModule, and which name is near."""
    *packages, name = path.split(".")
    if not packages:
        return "name the class together with its module, as my.Module."
    searched: list[str] = [os.getcwd()]
    package: Any = None
    for depth in range(1, len(packages) + 1):
        full = ".".join(packages[:depth])
        before = "".join(f"{part}." for part in packages[: depth - 1])
        try:
            package = importlib.import_module(full)
        except Exception as error:  # the user's own code runs here
            if isinstance(error, ModuleNotFoundError) and error.name == full:
                known = [module.name for module in pkgutil.iter_modules(searched)]
                return f"there is no module {full}.{_nearest(packages[depth - 1], known, before)}"
            return f"importing {full} failed with {type(error).__name__}: {one_line(str(error))}."
        searched = list(getattr(package, "__path__", []))
    found = getattr(package, name, None)
    if _is_lightning_module(found):
        return None
    what = "does not exist" if found is None else "is no LightningModule"
    known = [n for n, value in vars(package).items() if _is_lightning_module(value)]
    return f"{path} {what}.{_nearest(name, known, '.'.join(packages) + '.')}"


def _is_lightning_module(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, tree_of(value).LightningModule)


def _nearest(name: str, known: Iterable[str], before: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {before}{near[0]}?" if near else ""
