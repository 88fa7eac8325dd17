"""Messages of a command: one short line for wrong input; none of Lightning's."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lightning_gradguard

_PACKAGE = str(Path(lightning_gradguard.__file__).parent)
#: Paths of code that is not the user's.
_INSTALLED = (*(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")), _PACKAGE, "<")

Instance = TypeVar("Instance")
#: Classes that could not be instantiated, their exceptions, and their arguments without a value.
Failures = list[tuple[type, Exception, list[str]]]


class UsageError(Exception):
    """The input is wrong; the message names the mistake and the remedy in one line."""


@contextmanager
def usage_errors_reported(verb: str) -> Iterator[None]:
    """Prints the message of a usage error, and ends the command with code 2."""
    try:
        yield
    except UsageError as error:
        print(f"lightning-gradguard {verb}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def one_line(text: str) -> str:
    """Joins the lines of a message, and cuts it at 300 characters.

    Example:
        >>> one_line("wrong:   - a value")
        'wrong: - a value'
    """
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."


def source_line(error: BaseException) -> str:
    """Returns the line of the user's own code that an exception comes from, in parentheses; empty if none."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    own = next((frame for frame in frames if not frame.filename.startswith(_INSTALLED)), None)
    return f" ({relative(own.filename)}, line {own.lineno})" if own else ""


def described(error: BaseException) -> str:
    """Returns an exception in one line, with its class and the line of the user's own code."""
    return f"{type(error).__name__}: {one_line(str(error))}{source_line(error)}"


def is_raised_by_suite(error: BaseException) -> bool:
    """Checks that the suite has rejected a value; such a message needs no name of an exception."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError) and raised_in.startswith(_PACKAGE)


def recording_failures(instantiator: Callable[..., Instance], failures: Failures) -> Callable[..., Instance]:
    """Wraps an instantiator of jsonargparse, so that the exceptions of classes are kept.

    jsonargparse tries several types for an option, and keeps the text of an exception alone.
    """

    # positional-only: the arguments of a user's class may have any name
    @functools.wraps(instantiator)
    def instantiate_recorded(kind: type, /, *args: Any, **kwargs: Any) -> Instance:
        try:
            return instantiator(kind, *args, **kwargs)
        except Exception as error:  # the user's own code
            failures.append((kind, error, _without_value(kind, kwargs)))
            raise

    return instantiate_recorded


def instantiate(kind: Callable[..., Instance], /, *args: Any, **kwargs: Any) -> Instance:
    """Returns an instance of a class."""
    return kind(*args, **kwargs)


def _without_value(kind: type, given: Mapping[str, Any]) -> list[str]:
    """Returns the arguments for which jsonargparse, which has no type for them, has put `None`."""
    try:
        parameters = inspect.signature(kind).parameters.values()
    except ValueError:  # of a class that is not written in Python
        return []
    return [p.name for p in parameters if p.default is p.empty and given.get(p.name, p) is None]


def failure_message(failures: Failures, error: Exception) -> str:
    """Describes why a class could not be instantiated; `error` is what jsonargparse has raised in the end."""
    if (taken := re.search(r"got multiple values for argument '(\w+)'", str(error))) and not failures:
        return taken_name(taken[1])
    kind, cause, unset = failures[-1] if failures else (type(None), error, [])
    if kind.__module__.startswith("lightning_gradguard.") and isinstance(cause, ValueError):
        return f"{kind.__name__}: {one_line(str(cause))}"
    subject = f"{kind.__module__}.{kind.__qualname__} could not be built: " if failures else ""
    needs = f"; it needs {', '.join(unset)}, which no option gives." if unset else ""
    return f"{subject}{described(cause)}{needs}"


def taken_name(name: str) -> str:
    """Describes that an argument of a user's class has a name that no option can have."""
    return (
        f"an argument of __init__ is named {name}, a name that jsonargparse, which parses the command line, "
        "uses itself: rename it."
    )


def relative(path: str) -> str:
    """Returns a path from the current folder, if it lies below that."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
