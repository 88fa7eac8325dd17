"""The line of the user's code that runs an operation."""

from __future__ import annotations

import ast
import linecache
import os
import site
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch

#: Folders with code that is never the user's: torch, and this one.
_FRAMEWORKS = (os.path.dirname(torch.__file__), str(Path(__file__).parents[1]))
#: Files with functions of torch that consist of several operations.
_DISTRIBUTIONS = os.path.dirname(torch.distributions.__file__)
_FUNCTIONAL = torch.nn.functional.__file__
_LIBRARIES = (*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_paths()["stdlib"])
#: Functions in which a run of a batch begins, and the backward pass: frames outside of them ran no operation.
_BOUNDARIES = ("investigate", "_engine_run_backward")
#: What functions of torch are called on, and no argument of theirs.
_NAMESPACES = ("torch", "nn.", "F", "functional")
#: Characters of an argument, beyond which advice is easier to read without it.
MAX_ARGUMENT = 40


@dataclass(frozen=True)
class Location:
    """A line of code.

    Args:
        file: Its file.
        line: Its number.
        function: The function that it is in.
        called: The function or distribution of torch that it calls and that is written in Python, such as
            `gumbel_softmax` or `Categorical`; empty for any other.
    """

    file: str
    line: int
    function: str
    called: str = ""

    def __str__(self) -> str:
        inside = "" if self.function == "<module>" else f" in {self.function}"
        return f"{_shortened(self.file)}:{self.line}{inside}"

    @property
    def code(self) -> str:
        """The line itself; empty if the file cannot be read."""
        return linecache.getline(self.file, self.line).strip()


def argument_in(code: str, function: str) -> str:
    """Returns the only argument of the only call of a function in a line, ready to be used in an expression.

    Empty if the line is no statement by itself, calls the function more than once, or has a long argument.

    Example:
        >>> argument_in("loss = -torch.log(rate).mean()", "log"), argument_in("y = (p + q).sqrt()", "sqrt")
        ('rate', '(p + q)')
    """
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except SyntaxError:
        return ""
    found: list[ast.expr] = []
    for call in nodes:
        match call:
            case ast.Call(func=ast.Attribute(value, name)) if name.rstrip("_") == function:
                is_method = not ast.unparse(value).startswith(_NAMESPACES)
                found += [value] if is_method and not call.args else [] if is_method else call.args
            case ast.Call(func=ast.Name(name), args=arguments) if name.rstrip("_") == function:
                found += arguments
    if len(found) != 1 or len(ast.unparse(found[0])) > MAX_ARGUMENT:
        return ""
    text = ast.unparse(found[0])
    return text if isinstance(found[0], ast.Name | ast.Attribute | ast.Call | ast.Subscript) else f"({text})"


def user_location(frameworks: Sequence[str] = ()) -> Location | None:
    """Returns the innermost line of the user's code that is running now; `None` if frameworks alone are.

    A library of others counts as the user's code only if nothing else called the operation.
    """
    frame: FrameType | None = sys._getframe(1)
    in_library, called = None, ""
    while frame is not None and frame.f_code.co_name not in _BOUNDARIES:
        file = frame.f_code.co_filename
        if file.startswith(_DISTRIBUTIONS):
            owner = frame.f_locals.get("self")
            called = frame.f_code.co_name if owner is None else type(owner).__name__
        elif file == _FUNCTIONAL:
            called = frame.f_code.co_name
        if not file.startswith(("<", *_FRAMEWORKS, *frameworks)):
            here = Location(file, frame.f_lineno, frame.f_code.co_name, called)
            if not file.startswith(_LIBRARIES):
                return here
            in_library = in_library or here
        frame = frame.f_back
    return in_library


def innermost_of_traceback(
    traceback: TracebackType | None, frameworks: Sequence[str] = ()
) -> Location | None:
    """Returns the innermost line of the user's code through which an exception came."""
    found = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not code.co_filename.startswith(("<", *_FRAMEWORKS, *frameworks, *_LIBRARIES)):
            found = Location(code.co_filename, traceback.tb_lineno, code.co_name)
        traceback = traceback.tb_next
    return found


def _shortened(file: str) -> str:
    """Returns the path from the current folder, if the file is below it."""
    try:
        relative = os.path.relpath(file)
    except ValueError:  # on another drive
        return file
    return file if relative.startswith("..") else relative
