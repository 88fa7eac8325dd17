"""Classes that a command line names: found by their paths, and instantiated with their exceptions kept."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from lightning_gradguard.cli.errors import nearest, one_line, source_line

Instance = TypeVar("Instance")
#: Classes that could not be instantiated, and their exceptions.
Failures = list[tuple[type, Exception]]


def recording_failures(instantiator: Callable[..., Instance], failures: Failures) -> Callable[..., Instance]:
    """Wraps an instantiator of jsonargparse, so that the exceptions of classes are kept.

    jsonargparse tries several types for an option, and keeps the text of an exception alone.

    Args:
        instantiator: Called with a class and its arguments.
        failures: Receives the exceptions.
    """

    # positional-only: the arguments of a user's class may have any name
    @functools.wraps(instantiator)
    def instantiate_recorded(kind: type, /, *args: Any, **kwargs: Any) -> Instance:
        try:
            return instantiator(kind, *args, **kwargs)
        except Exception as error:  # the user's own code
            failures.append((kind, error))
            raise

    return instantiate_recorded


def instantiate(kind: Callable[..., Instance], /, *args: Any, **kwargs: Any) -> Instance:
    """Returns an instance of a class."""
    return kind(*args, **kwargs)


def failure_message(failures: Failures, error: Exception) -> str:
    """Describes why a class could not be instantiated with well-formed arguments.

    Args:
        failures: See `recording_failures`.
        error: The exception that jsonargparse has raised in the end.
    """
    kind, cause = failures[-1] if failures else (type(None), error)
    text = one_line(str(cause))
    if kind.__module__.startswith("lightning_gradguard.") and isinstance(cause, ValueError):
        return f"{kind.__name__}: {text}"
    subject = f"{kind.__module__}.{kind.__qualname__} could not be built: " if failures else ""
    return f"{subject}{type(cause).__name__}: {text}{source_line(cause)}"


def import_problem(path: str, base: type) -> str | None:
    """Describes why a path leads to no subclass of a class, with the nearest name that does.

    Args:
        path: As `my.Module`.
        base: The class that is expected; `object` for any.

    Returns:
        `None` if the path leads to one.
    """
    package, _, name = path.rpartition(".")
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
        text = f"importing {package} failed with {type(error).__name__}: {one_line(str(error))}"
        return f"{text}{source_line(error)}."
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


def example_subclass(base: Any, arguments: Collection[str]) -> str:
    """Returns the name of a subclass that takes all of some arguments; `my.Class` if there is none."""
    fitting = (h.__name__ for h in _concrete(base) if {*arguments} <= {*inspect.signature(h).parameters})
    return next(fitting, "my.Class")


def _concrete(base: Any) -> Iterator[type]:
    """Yields the subclasses that are imported and can be instantiated."""
    for heir in base.__subclasses__():
        if not inspect.isabstract(heir):
            yield heir
        yield from _concrete(heir)
