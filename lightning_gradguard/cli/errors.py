"""Errors of usage: wrong input ends a command with one short message, with the nearest valid name."""

from __future__ import annotations

import difflib
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning_gradguard

_PACKAGE = str(Path(lightning_gradguard.__file__).parent)
#: Paths of code that is not the user's.
_INSTALLED = (*(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")), _PACKAGE, "<")


class UsageError(Exception):
    """The input is wrong; the message names the mistake and the remedy in one line."""


@contextmanager
def usage_errors_reported(verb: str) -> Iterator[None]:
    """Prints the message of a usage error, and ends the command.

    Args:
        verb: The command.

    Raises:
        SystemExit: With code 2.
    """
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


def nearest(name: str, known: Iterable[str], before: str = "") -> str:
    """Suggests the nearest of the valid names; empty if none is near.

    Example:
        >>> nearest("patienc", ["patience", "check"], "--nan_rollback.")
        ' Did you mean --nan_rollback.patience?'
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {before}{near[0]}?" if near else ""


def source_line(error: BaseException) -> str:
    """Returns the line of the user's own code that an exception comes from, in parentheses; empty if none."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    own = next((frame for frame in frames if not frame.filename.startswith(_INSTALLED)), None)
    return f" ({_relative(own.filename)}, line {own.lineno})" if own else ""


def is_raised_by_suite(error: BaseException) -> bool:
    """Checks that the suite has rejected a value; such a message needs no name of an exception."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError) and raised_in.startswith(_PACKAGE)


def _relative(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
