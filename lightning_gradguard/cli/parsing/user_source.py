"""Imports the module of a user's class once, and not at all if that would start a run."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from lightning_gradguard.cli.messages import UsageError, described, relative
from lightning_gradguard.cli.parsing.preparse import config_files, find_option, named_path, read_config

#: Calls that train, or run a network, when a script is imported.
_RUNS = ("fit", "validate", "test", "predict", "LightningCLI", "train", "main")


def reject_script(class_path: str) -> None:
    """Raises a `UsageError` if importing the module of a class would start what the script does."""
    found = _source(class_path.rpartition(".")[0])
    if found is None:
        return
    path, tree = found
    call = next(_calls_on_import(tree, _starting(tree)), None)
    if call is not None:
        name = class_path.rpartition(".")[2]
        raise UsageError(
            f"{path} was not imported, as that calls {_name(call)}() in line "
            f'{call.lineno}: put that under `if __name__ == "__main__":`, or {name} into a file of its own.'
        )


def import_once(arguments: Sequence[str]) -> list[str]:
    """Imports the module of the class that `--model` or a file names.

    A module that fails would be run again by each further try to import it, so that nothing else tries.

    Returns:
        The arguments, with a name of the module that is an identifier: that of `01_train.py` is none.

    Raises:
        UsageError: If it would start a run, or raises an exception of its own.
    """
    class_path = named_path(arguments)
    module, _, name = class_path.rpartition(".")
    if not module:
        return [*arguments]
    if class_path.endswith(".py"):
        named = f"{Path(module).name}.MyModule"
        raise UsageError(f"--model {class_path} is a file: name the class in it, as {named}.")
    reject_script(class_path)
    try:
        identifier = _imported(module)
    except (Exception, SystemExit) as error:  # the user's own code
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return [*arguments]  # nothing was run, and the parser has suggestions
        contents = {path: read_config(path) for path in config_files(arguments)}
        option, _ = find_option(arguments, contents, "model")
        raise UsageError(
            f"{option} {class_path}: importing {module} failed with {described(error)}."
        ) from None
    given = {prefix + class_path: f"{prefix}{identifier}.{name}" for prefix in ("", "--model=")}
    return [given.get(argument, argument) for argument in arguments]


def _imported(module: str) -> str:
    """Imports a module, under another name if its own is no identifier; returns the name."""
    identifier = re.sub(r"[^\w.]|^(?=\d)", "_", module)
    spec = PathFinder.find_spec(module) if identifier != module else None
    if spec is None or spec.origin is None:
        import_module(module)
        return module
    renamed = spec_from_file_location(identifier, spec.origin)
    assert renamed is not None
    assert renamed.loader is not None
    sys.modules[identifier] = module_from_spec(renamed)
    renamed.loader.exec_module(sys.modules[identifier])
    return identifier


def _source(module: str) -> tuple[str, ast.Module] | None:
    """Returns the file and the syntax tree of a module that is not imported yet; imports no parent either."""
    if not module or module in sys.modules:
        return None
    search: list[str] | None = None
    file = ""
    try:
        for part in module.split("."):
            spec = PathFinder.find_spec(part, search)
            if spec is None:
                return None
            search, file = [*(spec.submodule_search_locations or [])], spec.origin or ""
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, AttributeError):  # importing it has a better message
        return None
    return relative(file), tree


def _starting(tree: ast.Module) -> set[str]:
    """Returns `_RUNS`, and the functions of a module that make a Trainer, themselves or by another."""
    starting = {"Trainer", "LightningCLI"}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for _ in functions:  # each may call the one below it
        starting |= {f.name for f in functions if any(_name(call) in starting for call in _calls_in(f))}
    return starting - {"Trainer"} | {*_RUNS}


def _calls_in(node: ast.AST) -> list[ast.Call]:
    return [call for call in ast.walk(node) if isinstance(call, ast.Call)]


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _calls_on_import(node: ast.AST, names: set[str]) -> Iterator[ast.Call]:
    """Yields the calls of some names outside of functions, classes and the guard of a script."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "__name__" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Call) and _name(child) in names:
            yield child
        yield from _calls_on_import(child, names)
