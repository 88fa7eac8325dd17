"""Reads single options from flags and files, without a parser; imports no callback of the suite."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_gradguard.cli.messages import UsageError, one_line
from lightning_gradguard.core.arguments import nearest


def named_class(arguments: Sequence[str]) -> Any:
    """Returns the class that `--model`, or else the last `--config`, names; `None` if it cannot be imported.

    The parser depends on it: the class is one of `pytorch_lightning` or of `lightning`. That parser also
    reports errors, in more detail.
    """
    module, _, name = named_path(arguments).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # the user's own code
        return None


def named_path(arguments: Sequence[str]) -> str:
    """Returns the path of the class that `--model`, or else the last `--config`, names; empty for none."""
    options = _preparse(arguments)
    paths = [options.model or "", *map(_class_path_in, reversed(config_files(arguments)))]
    return next(filter(None, paths), "")


def config_files(arguments: Sequence[str]) -> list[str]:
    """Returns the configuration files among the arguments, in their order."""
    return [path for path in _preparse(arguments).config if path]


def read_config(path: str) -> dict[str, Any]:
    """Reads a YAML file for `fit`."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing = Path(path)
        stems = [other.stem for other in missing.parent.glob(f"*{missing.suffix}")]
        near = nearest(missing.stem, stems).replace("?", f"{missing.suffix}?")
        if (missing.parent / "trials.jsonl").exists():
            near = " `treat` writes one only where it has found a treatment."
        raise UsageError(f"--config {path} cannot be read: there is no such file.{near}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"--config {path}{line} is no YAML: {error.problem}.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read: {one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} holds no options; it needs lines such as `trainer:`.")
    return content


def find_option(arguments: Sequence[str], contents: Mapping[str, Any], key: str) -> tuple[str, Any]:
    """Finds an option among flags and in files.

    Returns its name, with the file that it is in, and its value: an empty string if it is not found.
    """
    for i in reversed(range(len(arguments))):
        flag, sign, value = arguments[i].partition("=")
        if flag.replace(".init_args", "").rstrip("+") == f"--{key}":
            return f"--{key}", value if sign else "".join(arguments[i + 1 : i + 2])
    for path, content in reversed([*contents.items()]):
        for value in values_at(content, key.split(".")):
            return f"{path}: {key}", value
    return f"--{key}", ""


def values_at(content: Any, names: Sequence[str]) -> Iterator[Any]:
    """Yields the values of an option in a file; its name has no part for lists and `init_args` in between.

    Example:
        >>> content = {"trainer": {"callbacks": [{"init_args": {"patience": 3}}]}}
        >>> list(values_at(content, ["trainer", "callbacks", "patience"]))
        [3]
    """
    if not names:
        yield content
    elif isinstance(content, list):
        for entry in content:
            yield from values_at(entry, names)
    elif isinstance(content, dict):
        if names[0] in content:
            yield from values_at(content[names[0]], names[1:])
        yield from values_at(content.get("init_args"), names)


def _preparse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", action="append", default=[], nargs="?")
    parser.add_argument("--model", nargs="?")
    return parser.parse_known_args(arguments)[0]


def _class_path_in(config: str) -> str:
    try:
        model = read_config(config).get("model")
    except UsageError:
        return ""
    return str(model.get("class_path", "") if isinstance(model, dict) else model or "")
