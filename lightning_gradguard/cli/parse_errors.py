"""From what jsonargparse has against an argument, in many lines, to what a person needs, in one."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch

import lightning_gradguard
from lightning_gradguard.callbacks.defaults import DEFAULTS
from lightning_gradguard.cli.errors import nearest, one_line, place_of
from lightning_gradguard.cli.preparse import read_config

Built = TypeVar("Built")
#: Objects that could not be made: the class, and what was raised.
Failures = list[tuple[type, Exception]]

#: Options that take a class of a kind.
_KINDS = {"model": "LightningModule", "data": "LightningDataModule"}
_TREES = ("pytorch_lightning", "lightning.pytorch")

_REQUIRED = re.compile(r"""required: (?:fit\.)?model\b|["'](?:fit\.)?model["'] is required""")
_MISSING = re.compile(r"""arguments are required: (.+)|[Kk]ey ["']([\w.]+)["'] is required""")
_NO_OPTION = re.compile(r"[Uu]nrecognized arguments: (\S+)|does not accept (?:option|nested key) '([\w.]+)'")
_NO_ARGUMENT = re.compile(
    r"(?:Option|Key) '(\w+)' is not (?:accepted|expected)|[Uu]nrecognized arguments: --([\w.]+)"
)
# the second is how jsonargparse 4.39 says so, and others say of what is no class at all
_ABSTRACT = re.compile(r"instantiatable class, but (?:\S+\.)?(\w+) is abstract|Not a valid subclass of (\w+)")
_NESTED = re.compile(r"NestedArg\(key='([\w.]+)'")
_NO_CLASS = re.compile(r"Not a valid subclass of (\w+)")
_OTHER_CLASS = re.compile(r"does not correspond to a subclass of (\w+)")
# the second is how jsonargparse 4.39 refuses a Literal
_NO_VALUE = re.compile(
    r"Expected an? (?!<class 'NoneType'>|(?:config )?path|dot)(.+?)(?:\. Got value: .*)?$"
    r"|Cannot take a Union of no types()"
)
_CLASS = re.compile(r"given class_path '([^']+)'|dot import path string: (\S+)")
_KEY = re.compile(r'Parser key "([\w.]+)"')


def recorded(build: Callable[..., Built], failures: Failures) -> Callable[..., Built]:
    """What builds an object of a class, and remembers the exception if it fails.

    jsonargparse tries several types for an option, and keeps of an exception its text alone.

    Args:
        build: Called with the class and its arguments.
        failures: Is added to.
    """

    @functools.wraps(build)
    def building(kind: type, *args: Any, **kwargs: Any) -> Built:
        try:
            return build(kind, *args, **kwargs)
        except Exception as error:  # the user's own code
            failures.append((kind, error))
            raise

    return building


def build(kind: Callable[..., Built], *args: Any, **kwargs: Any) -> Built:
    """An object of a class."""
    return kind(*args, **kwargs)


def explained_failure(failures: Failures, error: Exception) -> str:
    """What to say when what was typed is well-formed, and an object could not be made of it.

    Args:
        failures: See `recorded`.
        error: What came out in the end.
    """
    kind, cause = failures[-1] if failures else (type(None), error)
    text = one_line(str(cause))
    if kind.__module__.startswith("lightning_gradguard.") and isinstance(cause, ValueError):
        return f"{kind.__name__}: {text}"
    subject = f"{kind.__module__}.{kind.__qualname__} could not be built: " if failures else ""
    return f"{subject}{type(cause).__name__}: {text}{place_of(cause)}"


def explained(error: str, arguments: Sequence[str], files: Sequence[str], options: Collection[str]) -> str:
    """What jsonargparse has against what was typed, in one line, with the nearest valid name.

    Args:
        error: Its message.
        arguments: What was typed.
        files: Configuration files among that.
        options: Names that the command has, as `trainer.max_steps`.

    Raises:
        RefusalError: If one of the files cannot be read.
    """
    contents = {path: read_config(path) for path in files}
    source = functools.partial(_source, arguments, contents)
    lines = [line for line in error.splitlines() if line.strip()]
    for pattern, about in (
        (_MISSING, _about_missing),
        (_ABSTRACT, _about_abstract),
        (_CLASS, _about_class),
        (_NO_ARGUMENT, _about_argument),
        (_OTHER_CLASS, _about_other_class),
        (_NO_VALUE, _about_value),
        (_NO_CLASS, _about_no_class),
    ):
        for i, line in enumerate(lines):
            found, above = pattern.search(line), _above(lines, i)
            keys = _KEY.findall(above)
            if found is None or not keys:
                continue
            owner = ([match[0] for match in _CLASS.findall(above)] or [""])[-1]
            key = ".".join(keys).removeprefix("fit.")
            if (said := about(_Complaint(found, key, owner, error, source))) is not None:
                return said
    if _REQUIRED.search(error):
        return "name the module with --model my.Module, or in a file that --config names."
    if (unknown := _NO_OPTION.search(error)) is not None:
        return _about_option(unknown[1] or "", unknown[2] or "", contents, options)
    for key, kind in _KINDS.items():  # what importing it raises can be any text
        for name, path in (source(key), source(f"{key}.class_path")):
            is_path = path and not path.startswith(("{", "["))  # of what a file says, any kind is shown
            if is_path and key in error and (problem := problem_with(path, kind)) is not None:
                return f"{name} {path}: {problem}"
    return one_line(error)


def no_arguments(key: str, arguments: Sequence[str], files: Sequence[str]) -> str:
    """What to say of an option that stands for many, and was given one value.

    Args:
        key: Its name.
        arguments: What was typed.
        files: Configuration files among that.
    """
    name, value = _source(arguments, {path: read_config(path) for path in files}, key)
    return f"{name} {value}: this takes arguments, such as `max_epochs: 10`."


def problem_with(path: str, kind: str = "") -> str | None:
    """Why a path leads to no class, and which name is near.

    Args:
        path: As `my.Module`.
        kind: `LightningModule` or `LightningDataModule`, if it has to be one.

    Returns:
        `None` if there is nothing wrong with it.
    """
    *packages, name = path.split(".")
    if not packages:
        loaded = (lightning_gradguard, pl.callbacks, pl.loggers, torch.optim, torch.optim.lr_scheduler)
        near = nearest(name, [] if kind else [n for package in loaded for n in package.__all__])
        return f"there is no such class.{near or ' Name it together with its module, as my.Module.'}"
    searched: list[str] = [os.getcwd()]
    package: Any = None
    for depth in range(1, len(packages) + 1):
        full = ".".join(packages[:depth])
        before = "".join(f"{part}." for part in packages[: depth - 1])
        try:
            package = importlib.import_module(full)
        except Exception as error:  # the user's own code runs here
            if isinstance(error, ModuleNotFoundError) and error.name == full:
                known_modules = [module.name for module in pkgutil.iter_modules(searched)]
                return f"there is no module {full}.{nearest(packages[depth - 1], known_modules, before)}"
            failed = f"importing {full} failed with {type(error).__name__}: {one_line(str(error))}"
            return f"{failed}{place_of(error)}."
        searched = list(getattr(package, "__path__", []))
    found = getattr(package, name, None)
    if _is_a(found, kind):
        return None
    what = "does not exist" if found is None else f"is no {kind or 'class'}"
    # a package with lazy names tells them by `dir` alone
    names = [n for n in dir(package) if not n.startswith("_")]
    known = [n for n in names if _is_a(getattr(package, n, None), kind)]
    return f"{path} {what}.{nearest(name, known, '.'.join(packages) + '.')}"


def _is_a(value: Any, kind: str) -> bool:
    trees = [sys.modules[name] for name in _TREES if name in sys.modules]
    return isinstance(value, type) and (
        not kind or any(issubclass(value, getattr(tree, kind)) for tree in trees)
    )


def _above(lines: Sequence[str], i: int) -> str:
    """A line, after those that it is indented under."""
    found = [lines[i]]
    for line in reversed(lines[:i]):
        if _indent(line) < _indent(found[0]):
            found.insert(0, line)
    return "\n".join(found)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _source(arguments: Sequence[str], contents: dict[str, Any], key: str) -> tuple[str, str]:
    """How a person has named an option, and the value that it was given."""
    for i in reversed(range(len(arguments))):
        flag, sign, value = arguments[i].partition("=")
        if flag.replace(".init_args", "").rstrip("+") == f"--{key}":
            return f"--{key}", value if sign else "".join(arguments[i + 1 : i + 2])
    for path, content in reversed(contents.items()):
        for value in _values_at(content, key.split(".")):
            return f"{path}: {key}", value if isinstance(value, str) else json.dumps(value, default=str)
    return f"--{key}", ""


def _values_at(content: Any, names: Sequence[str]) -> Iterator[Any]:
    """What a file says of an option; the lists and `init_args` in between have no name in it."""
    if not names:
        yield content
    elif isinstance(content, list):
        for entry in content:
            yield from _values_at(entry, names)
    elif isinstance(content, dict):
        if names[0] in content:
            yield from _values_at(content[names[0]], names[1:])
        yield from _values_at(content.get("init_args"), names)


@dataclass(frozen=True)
class _Complaint:
    """What jsonargparse says: the words that matter, the option, the class that takes it, the whole."""

    found: re.Match[str]
    key: str
    owner: str
    error: str
    source: Callable[[str], tuple[str, str]]


def _about_option(flag: str, key: str, contents: Mapping[str, Any], options: Collection[str]) -> str:
    """An option that the command does not have, given as a flag or as a key in a file."""
    if flag and not flag.startswith("-"):
        return f"{flag} belongs to no option."
    flag = flag.partition("=")[0].rstrip("+")
    known = {option.replace(".init_args", "").replace(".class_path", "") for option in options}
    known |= {option.partition(".")[0] for option in known}
    if flag:
        return f"there is no {flag}.{nearest(flag, [f'--{option}' for option in known])}"
    # a file may go wrong far above the last name
    names = key.split(".")
    depth = next((d for d in range(1, len(names)) if not _has(known, names[:d])), len(names))
    wrong = names[:depth]
    file = next((file for file, content in contents.items() if list(_values_at(content, wrong))), "--config")
    near = nearest(".".join(wrong), {".".join(option.split(".")[:depth]) for option in known})
    return f"{file}: there is no {'.'.join(wrong)}.{near}"


def _has(known: Collection[str], names: Sequence[str]) -> bool:
    return any(option.split(".")[: len(names)] == list(names) for option in known)


def _about_missing(complaint: _Complaint) -> str:
    """A class that has to be given more."""
    names = (complaint.found[1] or complaint.found[2]).split(", ")
    return f"{complaint.owner} needs {', '.join(f'--{complaint.key}.{name}' for name in names)}."


def _about_abstract(complaint: _Complaint) -> str | None:
    """An argument of a class that is not named yet."""
    base, error, key = complaint.found[1] or complaint.found[2], complaint.error, complaint.key
    paths = re.findall(rf"<class '([\w.]+\.{base})'>", error)
    typed = _NESTED.search(error)
    if not paths or not inspect.isabstract(_class_at(paths[0])) or not (typed or complaint.found[1]):
        return None
    fitting = (
        heir.__name__
        for heir in _concrete(_class_at(paths[0]))
        if any(f"'{argument}'" in error for argument in inspect.signature(heir).parameters)
    )
    example = next(fitting, "my.Class")
    if typed:
        return f"--{key}.{typed[1]}: name the class first, as --{key} {example}."
    return f"{complaint.source(key)[0]}: name the class, as `class_path: {example}`."


def _concrete(kind: Any) -> Iterator[type]:
    """Those that inherit from a class, as far as they are loaded, and can be built."""
    for heir in kind.__subclasses__():
        if not inspect.isabstract(heir):
            yield heir
        yield from _concrete(heir)


def _about_no_class(complaint: _Complaint) -> str:
    """Something in a file where a class is to be named."""
    name, value = complaint.source(complaint.key)
    if complaint.key in DEFAULTS:
        return _takes(name, value, DEFAULTS[complaint.key])
    return f"{name} {value}: this takes the path of a class, as my.Module."


def _takes(name: str, value: str, kind: type) -> str:
    return f"{name} {value}: this takes null, to leave it out, or a subclass of {kind.__name__}."


def _about_class(complaint: _Complaint) -> str | None:
    """A class that cannot be had."""
    name, value = complaint.source(complaint.key)
    if complaint.key in DEFAULTS and complaint.found[2]:
        return _takes(name, value, DEFAULTS[complaint.key])
    path = complaint.found[1] or complaint.found[2]
    problem = problem_with(path, _KINDS.get(complaint.key, ""))
    return problem and f"{name} {path}: {problem}"


def _about_argument(complaint: _Complaint) -> str:
    """An argument that a class does not take."""
    *within, argument = (complaint.found[1] or complaint.found[2]).split(".")
    owner, key = complaint.owner, ".".join([complaint.key, *within])
    if argument == "class_path":
        name, _ = complaint.source(complaint.key)
        return f"{name}: beside `class_path`, arguments belong under `init_args`."
    name, _ = complaint.source(f"{key}.{argument}")
    kind = _class_at(owner)
    for part in within:
        kind = typing.get_type_hints(kind.__init__)[part]
        owner = f"{kind.__module__}.{kind.__qualname__}"
    valid = tuple(inspect.signature(kind).parameters)
    near = nearest(argument, valid, name.removesuffix(argument).rpartition(": ")[2])
    known = near or f" There are: {', '.join(valid) or 'none'}."
    return f"{name}: {owner} takes no such argument.{known}"


def _about_other_class(complaint: _Complaint) -> str:
    """A class of another kind than the option takes."""
    name, path = complaint.source(complaint.key)
    if (problem := problem_with(path, _KINDS.get(complaint.key, ""))) is not None:
        return f"{name} {path}: {problem}"
    if complaint.key in _KINDS:
        return (
            f"{name} {path}: this is a class of another package than the module; import both from "
            "pytorch_lightning, or both from lightning."
        )
    return f"{name} {path}: it must be a subclass of {complaint.found[1]}."


def _about_value(complaint: _Complaint) -> str:
    """A value of another type."""
    name, value = complaint.source(complaint.key)
    matches = map(_NO_VALUE.search, complaint.error.splitlines())
    wanted = [match[1] for match in matches if match and match[1]]
    if not wanted:
        hints = typing.get_type_hints(_class_at(complaint.owner).__init__)
        wanted = [str(hints[complaint.key.rpartition(".")[2]])]
    literals = [literal for text in wanted for literal in re.findall(r"Literal\[(.*)\]", text)]
    choices = dict.fromkeys(choice for literal in literals for choice in literal.split(", "))
    types = [re.sub(r"<class '([\w.]+)'>", r"\1", text) for text in wanted if "Literal[" not in text]
    expected = [*dict.fromkeys(types), *([f"one of {', '.join(choices)}"] if choices else [])]
    near = nearest(value, [choice.strip("'") for choice in choices])
    return f"{name} {value}: expected {' or '.join(expected)}.{near}"


def _class_at(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
