"""Which module of the user's was named, by a flag or in a file; loads no callback of the suite."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_gradguard.cli.errors import UsageError, nearest, one_line


def named_class(arguments: Sequence[str]) -> Any:
    """The class that `--model`, or else the last `--config`, names; `None` if it is not to be had.

    A parser has to know beforehand whether the class is one of `pytorch_lightning` or of `lightning`; what
    is wrong with it, that parser tells better.
    """
    options = _first_look(arguments)
    paths = [options.model or "", *map(_class_path_in, reversed(config_files(arguments)))]
    module, _, name = next(filter(None, paths), "").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # the user's own code
        return None


def config_files(arguments: Sequence[str]) -> list[str]:
    """The configuration files that were typed, in their order."""
    return [path for path in _first_look(arguments).config if path]


def read_config(path: str) -> dict[str, Any]:
    """What a YAML file for `fit` says.

    Args:
        path: As it was typed.

    Raises:
        RefusalError: If it cannot be read.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing = Path(path)
        stems = [other.stem for other in missing.parent.glob(f"*{missing.suffix}")]
        near = nearest(missing.stem, stems).replace("?", f"{missing.suffix}?")
        raise UsageError(f"--config {path} cannot be read: there is no such file.{near}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"--config {path}{line} is no YAML: {error.problem}.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read: {one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} holds no options; it needs lines such as `trainer:`.")
    return content


def model_in(config: str) -> Any:
    """The part of a file for `fit` that names the module and its arguments.

    Raises:
        RefusalError: If the file cannot be read.
    """
    return read_config(config).get("model")


def _first_look(arguments: Sequence[str]) -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", "-c", action="append", default=[], nargs="?")
    first.add_argument("--model", nargs="?")
    return first.parse_known_args(arguments)[0]


def _class_path_in(config: str) -> str:
    try:
        model = model_in(config)
    except UsageError:
        return ""
    return str(model.get("class_path", "") if isinstance(model, dict) else model or "")
