"""How a command refuses wrong input: in one short message, with what is near to what was typed."""

from __future__ import annotations

import difflib
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning_gradguard

_OWN = str(Path(lightning_gradguard.__file__).parent)
#: Where code lies that the user has not written.
_FOREIGN = (*(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")), _OWN, "<")


class UsageError(Exception):
    """What was typed is wrong; the message says what, and what to do, in a line."""


@contextmanager
def told(verb: str) -> Iterator[None]:
    """Ends the command with a short message where something that was typed is wrong.

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
    """A message of many lines in one, and not too long.

    Example:
        >>> one_line("wrong:   - a value")
        'wrong: - a value'
    """
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."


def nearest(name: str, known: Iterable[str], before: str = "") -> str:
    """A question whether the nearest of the valid names was meant; empty if none is near.

    Example:
        >>> nearest("patienc", ["patience", "check"], "--nan_rollback.")
        ' Did you mean --nan_rollback.patience?'
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {before}{near[0]}?" if near else ""


def place_of(error: BaseException) -> str:
    """The line of the user's own code that an exception comes from, in parentheses; empty if none is."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    own = next((frame for frame in frames if not frame.filename.startswith(_FOREIGN)), None)
    return f" ({_relative(own.filename)}, line {own.lineno})" if own else ""


def is_own(error: BaseException) -> bool:
    """Whether the suite itself has refused a value, in words that need no name of an exception."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError) and raised_in.startswith(_OWN)


def _relative(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
