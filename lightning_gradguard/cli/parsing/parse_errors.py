"""Reduces an error of jsonargparse to one line: the option, its value, and the nearest valid name."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lightning_gradguard.callbacks.defaults import DEFAULTS
from lightning_gradguard.cli.messages import described, one_line, taken_name
from lightning_gradguard.cli.parsing.preparse import find_option, read_config, values_at
from lightning_gradguard.core.arguments import nearest

# jsonargparse nests what is wrong by indentation; the wording differs between the supported versions
_KEY = re.compile(r'Parser key "([\w.]+)"')
_CLASS = re.compile(r"given class_path '([^']+)'|dot import path string: (\S+)")
_BASE = re.compile(r"Subtypes: .*?(?:<class '|\w\[)((?:\w+\.)+\w+)[\]']")
_OWNER = re.compile(rf"given class_path '([^']+)'|{_BASE.pattern}")
_TAKEN = re.compile(r"Unable to add parameter '(\w+)'")
_NESTED = re.compile(r"NestedArg\(key='(\w+)")
_MISSING = re.compile(r"""arguments are required: (.+)|[Kk]ey "([\w.]+)" is required""")
_UNKNOWN = re.compile(r"nrecognized arguments: (\S+)|(?:[Oo]ption|[Kk]ey) '([\w.]+)'")
_EXPECTED = re.compile(r"Expected an? (?!.*(?:NoneType|path))(.+?)(?:\. Got value.*)?$", re.MULTILINE)


def parse_error_message(
    error: str, arguments: Sequence[str], files: Sequence[str], options: Collection[str]
) -> str:
    """Describes an error of jsonargparse in one line; `options` are those of the command."""
    if taken := _TAKEN.search(error):
        return taken_name(taken[1])
    contents = {path: read_config(path) for path in files}
    key, owner, block = _innermost(error)
    missing, unknown = _MISSING.search(block), _UNKNOWN.search(block)
    if not key:
        if missing and (missing[1] or missing[2]).endswith("model"):
            return "add --model my.Module: neither the command nor a file of --config names a module."
        if not unknown:
            return one_line(error)
        return _unknown_option(unknown[1] or "", unknown[2] or "", arguments, contents, options)
    path = next((match[1] or match[2] for match in _CLASS.finditer(block)), "")
    bases = _BASE.findall(block)
    kind = path or next(iter(bases), owner)
    if missing:
        names = (missing[1] or missing[2]).split(", ")
        return f"{kind} needs {', '.join(f'--{key}.{name}' for name in names)}."
    if unknown:
        argument = (unknown[1] or unknown[2]).lstrip("-").partition("=")[0]
        return _unknown_argument(key, argument, kind, arguments, contents)
    name, value = find_option(arguments, contents, key)
    if bases or path:
        base = pkgutil.resolve_name(bases[0]) if bases else object
        if problem := _class_problem(key, value, path, base, _NESTED.findall(block)):
            return f"{name}{problem}"
    return f"{name} {_shown(value)}".rstrip() + f": expected {_expected(key, owner, block, value)}"


def no_arguments(key: str, arguments: Sequence[str], files: Sequence[str]) -> str:
    """Describes the error of one value for an option that stands for many."""
    name, value = find_option(arguments, {path: read_config(path) for path in files}, key)
    return f"{name} {_shown(value)}: this takes arguments, such as `max_epochs: 10`."


def _innermost(error: str) -> tuple[str, str, str]:
    """Returns the innermost option, the class that has it, and the lines about it."""
    lines = [line for line in error.splitlines() if line.strip()]
    marked = [i for i, line in enumerate(lines) if _KEY.search(line)]
    if not marked:
        return "", "", error
    indents = [len(line) - len(line.lstrip()) for line in lines]
    first = max(marked, key=indents.__getitem__)
    end = next((i for i in range(first + 1, len(lines)) if indents[i] <= indents[first]), len(lines))
    above, indent = "", indents[first] + 1
    for i in range(first, -1, -1):
        if indents[i] < indent:
            above, indent = f"{lines[i]}\n{above}", indents[i]
    owners = [match[1] or match[2] for match in _OWNER.finditer("\n".join(lines[:first]))]
    key = ".".join(_KEY.findall(above)).removeprefix("fit.")
    return key, next(reversed(owners), ""), "\n".join(lines[first:end])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _unknown_option(
    flag: str, key: str, arguments: Sequence[str], contents: Mapping[str, Any], options: Collection[str]
) -> str:
    """Describes an option that the command does not have, given as a flag or as a key in a file."""
    if flag and not flag.startswith("-"):
        return f"{flag} belongs to no option."
    known = {re.sub(r"\.(init_args|class_path)", "", option) for option in options}
    parts = [option.split(".") for option in known]
    names = (key or flag.lstrip("-").partition("=")[0].rstrip("+")).split(".")
    prefixes = (names[:depth] for depth in range(1, len(names)))
    wrong = next((p for p in prefixes if not any(part[: len(p)] == p for part in parts)), names)
    before = flag[: len(flag) - len(flag.lstrip("-"))]
    siblings = {".".join(part[: len(wrong)]) for part in parts}
    of_classes = _arguments_of_classes(arguments, contents) if flag else ()
    near = next((f" Did you mean {before}{n}?" for n in of_classes if n.partition(".")[2] == names[0]), "")
    near = near or nearest(".".join(wrong), siblings, before)
    near = near or flag and nearest(".".join(names), known, before)
    file = next((f"{file}: " for file, content in contents.items() if [*values_at(content, wrong)]), "")
    return f"{'' if flag else file or '--config: '}there is no {before}{'.'.join(wrong)}.{near}"


def _arguments_of_classes(arguments: Sequence[str], contents: Mapping[str, Any]) -> Iterator[str]:
    """Yields the options of the module and of the data, as far as their classes exist."""
    for key in ("model", "data"):
        for path in _class_paths(find_option(arguments, contents, key)[1]):
            if _import_problem(path, object) is None:
                names = inspect.signature(pkgutil.resolve_name(path)).parameters
                yield from (f"{key}.{name}" for name in names)


def _unknown_argument(
    key: str, argument: str, path: str, arguments: Sequence[str], contents: Mapping[str, Any]
) -> str:
    """Describes an argument that a class does not have."""
    if argument == "class_path":
        name, _ = find_option(arguments, contents, key)
        return f"{name}: beside `class_path`, arguments belong under `init_args`."
    name, _ = find_option(arguments, contents, f"{key}.{argument}")
    kind = pkgutil.resolve_name(path)
    *outer, argument = argument.split(".")
    for part in outer:
        kind = typing.get_type_hints(kind.__init__)[part]
        path = f"{kind.__module__}.{kind.__qualname__}"
    valid = tuple(inspect.signature(kind).parameters)
    if argument in valid:  # as one that begins with an underscore
        return taken_name(argument)
    near = nearest(argument, valid, name.removesuffix(argument).rpartition(": ")[2])
    known = near or f" There are: {', '.join(valid) or 'none'}."
    return f"{name}: {path} takes no such argument.{known}"


def _expected(key: str, owner: str, block: str, value: Any) -> str:
    """Returns the types and the choices of an option, and the choice that is nearest to a value."""
    expected = _EXPECTED.findall(block)
    parameters = inspect.signature(pkgutil.resolve_name(owner)).parameters if owner else {}
    if "no types" in block and (parameter := parameters.get(key.rpartition(".")[2])):
        expected.append(str(parameter.annotation))  # jsonargparse 4.39 does not name the choices
    literals = [literal for text in expected for literal in re.findall(r"Literal\[(.*?)\]", text)]
    choices = dict.fromkeys(choice for literal in literals for choice in literal.split(", "))
    types = [re.sub(r"<class '([\w.]+)'>", r"\1", text) for text in expected if "Literal[" not in text]
    alternatives = [*dict.fromkeys(types), *([f"one of {', '.join(choices)}"] if choices else [])]
    near = nearest(_shown(value), [choice.strip("'") for choice in choices])
    return f"{' or '.join(alternatives) or one_line(block)}.{near}"


def _class_problem(key: str, value: Any, path: str, base: Any, nested: Sequence[str]) -> str | None:
    """Describes why a value names no class of a kind; `nested` are arguments of a class not yet named."""
    if inspect.isabstract(base):
        if nested:
            return f".{nested[0]}: name the class first, as --{key} {_example_subclass(base, nested)}."
        if isinstance(value, dict) and "class_path" not in value:
            return f": name the class, as `class_path: {_example_subclass(base, value)}`."
    paths = [path] if path else [p for p in _class_paths(value) if all(map(str.isidentifier, p.split(".")))]
    if key in DEFAULTS and not "".join(paths).count("."):
        return f" {_shown(value)}: this takes null, to omit it, or a subclass of {DEFAULTS[key].__name__}."
    if not paths:
        return f" {_shown(value)}: this takes the path of a class, as my.Module."
    problems = ((path, _import_problem(path, base)) for path in paths)
    return next((f" {path}: {problem}" for path, problem in problems if problem), None)


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for entry in value:
            yield from _class_paths(entry)
    elif path := value.get("class_path") if isinstance(value, dict) else value:
        yield str(path)


def _import_problem(path: str, base: type) -> str | None:
    """Describes why a path leads to no subclass of `base`, with the nearest name; `None` if it does."""
    package, _, name = path.rpartition(".")
    if ":" in path:
        return f"a dot is before the name of a class. Did you mean {path.replace(':', '.')}?"
    if not package:
        near = "" if base is object else nearest(name, [heir.__name__ for heir in _concrete(base)])
        return f"there is no such class.{near or ' Name it together with its module, as my.Module.'}"
    try:
        module = importlib.import_module(package)
    except Exception as error:  # the user's own code runs here
        absent = str(error.name) if isinstance(error, ModuleNotFoundError) else ""
        if absent and f"{package}.".startswith(f"{absent}."):
            parent, _, last = absent.rpartition(".")
            folders = getattr(sys.modules[parent], "__path__", []) if parent else [os.getcwd()]
            known = [info.name for info in pkgutil.iter_modules(folders)]
            return f"there is no module {absent}.{nearest(last, known, f'{parent}.' if parent else '')}"
        return f"importing {package} failed with {described(error)}."
    found = getattr(module, name, None)
    if _is_subclass(found, base):
        return None
    if base.__name__ in [kind.__name__ for kind in getattr(found, "__mro__", ())]:
        return (
            f"this {base.__name__} is of another package than the module; import both from "
            "pytorch_lightning, or both from lightning."
        )
    problem = "does not exist" if found is None else f"is no {'class' if base is object else base.__name__}"
    # a package with lazy names lists them by `dir` alone
    heirs = [n for n in dir(module) if n[0] != "_" and _is_subclass(getattr(module, n, None), base)]
    return f"{path} {problem}.{nearest(name, heirs, f'{package}.')}"


def _is_subclass(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base)


def _example_subclass(base: Any, arguments: Collection[str]) -> str:
    """Returns the name of a subclass that takes all of some arguments; `my.Class` if there is none."""
    signatures = {heir.__name__: inspect.signature(heir).parameters for heir in _concrete(base)}
    fitting = [name for name, parameters in signatures.items() if {*arguments} <= {*parameters}]
    return min(fitting, key=lambda name: len(signatures[name]), default="my.Class")


def _concrete(base: Any) -> Iterator[type]:
    """Yields the subclasses that are imported and can be instantiated."""
    for heir in base.__subclasses__():
        if not inspect.isabstract(heir):
            yield heir
        yield from _concrete(heir)
