"""The line of the user's code that runs an operation."""

from __future__ import annotations

import ast
import contextlib
import inspect
import linecache
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from lightning_gradguard.core.snapshots.libraries import LIBRARIES, TORCH

#: Code that is never the user's: torch, this one, and what enters and leaves context managers of both.
_FRAMEWORKS = (TORCH, str(Path(__file__).parents[1]), contextlib.__file__)
#: Files with classes, and functions, of torch that consist of several operations.
_UTILS = os.path.dirname(nn.utils.__file__)
_CLASSES = (
    os.path.dirname(torch.distributions.__file__),
    *(os.path.join(_UTILS, f"{name}.py") for name in ("parametrizations", "spectral_norm", "weight_norm")),
)
_FUNCTIONAL = torch.nn.functional.__file__
_LOSSES = (torch.nn.modules.loss.__file__, torch.nn.modules.distance.__file__)
#: Functions that consist of several operations and are not written in Python.
_COMPOSITE = ("corrcoef", "cosine_similarity", "cov", "logdet", "nanmean")
#: Functions in which a run of a batch begins, and the backward pass: frames outside of them ran no operation.
_BOUNDARIES = ("investigate", "_engine_run_backward")


@dataclass(frozen=True)
class Location:
    """A line of code.

    Args:
        file: Its file.
        line: Its number.
        function: The function that it is in.
        called: The function or distribution of torch that it calls and that consists of several operations,
            such as `gumbel_softmax` or `Categorical`; empty for any other.
        expression: The call or operator in it that ran; empty where Python does not know it.
        generated: Code without a file that this line runs, and in which the operation is; empty as a rule.
        functional: The expression as a call of the function of torch that a loss module calls; empty for any
            other.
    """

    file: str
    line: int
    function: str
    called: str = ""
    expression: str = ""
    generated: str = ""
    functional: str = ""

    def __str__(self) -> str:
        inside = "" if self.function == "<module>" else f" in {self.function}"
        within = f", which runs {self.generated} of code without a file" if self.generated else ""
        return f"{_shortened(self.file)}:{self.line}{inside}{within}"

    @property
    def called_code(self) -> str:
        """The source of the call or operator that ran, or the whole line where Python does not know it.

        Empty where the line only runs the code that has it.
        """
        return self.expression or ("" if self.generated else self.code)

    @property
    def code(self) -> str:
        """The line itself; empty if the file cannot be read."""
        return linecache.getline(self.file, self.line).strip()


def user_location(frameworks: Sequence[str] = ()) -> Location | None:
    """Returns the innermost line of the user's code that is running now; `None` if frameworks alone are.

    A library of others counts as the user's code only if nothing else called the operation.
    """
    frame: FrameType | None = sys._getframe(1)
    in_library, called, generated, loss = None, "", "", None
    while frame is not None and frame.f_code.co_name not in _BOUNDARIES:
        file = frame.f_code.co_filename
        if file.startswith(_CLASSES):
            owner = frame.f_locals.get("self")
            called = frame.f_code.co_name if owner is None else type(owner).__name__
        elif file == _FUNCTIONAL:
            called = frame.f_code.co_name
        elif file in _LOSSES:
            loss = frame.f_locals.get("self")
            called = called or ("cosine_similarity" if isinstance(loss, nn.CosineSimilarity) else "")
        if file.startswith("<") and not (_is_cell(file) or file.startswith("<frozen")):
            generated = generated or f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
        elif not file.startswith(("<frozen", *_FRAMEWORKS, *frameworks)):
            name = frame.f_code.co_name
            expression = "" if generated else _expression(frame.f_code, frame.f_lasti)
            code = expression or linecache.getline(file, frame.f_lineno)
            called = called or next((f for f in _COMPOSITE if re.search(rf"\b{f}\(", code)), "")
            functional = _functional(expression, called, loss) if isinstance(loss, nn.Module) else ""
            here = Location(file, frame.f_lineno, name, called, expression, generated, functional)
            if not file.startswith(LIBRARIES):
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
        file, name = code.co_filename, code.co_name
        if file.startswith("<") and not (_is_cell(file) or file.startswith("<frozen")):
            generated = f"{file}:{traceback.tb_lineno} in {name}"
            found = replace(found, generated=generated) if found and not found.generated else found
        elif not file.startswith(("<frozen", *_FRAMEWORKS, *frameworks, *LIBRARIES)):
            expression = _expression(code, traceback.tb_lasti)
            found = Location(file, traceback.tb_lineno, name, expression=expression)
        traceback = traceback.tb_next
    return found


def _is_cell(file: str) -> bool:
    """True for what was typed at a prompt or in a notebook, whose lines Python keeps."""
    return file.startswith(("<ipython-input", "<python-input")) and file in linecache.cache


@lru_cache(maxsize=256)  # a loss is called from one line in every step
def _expression(code: CodeType, instruction: int) -> str:
    """Returns the source of the call or operator that code is at; empty ahead of Python 3.11."""
    if not hasattr(code, "co_positions"):
        return ""
    line, end, column, end_column = next(islice(code.co_positions(), instruction // 2, None))
    if line is None or end is None or column is None or end_column is None:
        return ""
    lines = [text.encode() for text in linecache.getlines(code.co_filename)[line - 1 : end]]
    if len(lines) <= end - line:
        return ""
    lines[-1] = lines[-1][:end_column]
    lines[0] = lines[0][column:]
    return b"".join(lines).decode(errors="replace")


def _functional(expression: str, called: str, loss: nn.Module) -> str:
    """Returns the call of a function with the arguments and options of a call of a loss module.

    Empty if the code, or an option, has no such form.
    """
    kind: type = type(loss)
    defaults = _defaults(kind)
    options = {n: getattr(loss, n, default) for n, default in defaults.items()}
    options = {n: value for n, value in options.items() if value is not defaults[n] and value != defaults[n]}
    if not (expression and called and all(isinstance(v, (int, float, str)) for v in options.values())):
        return ""
    return _as_function(expression, called, tuple(options.items()))


@lru_cache(maxsize=256)
def _defaults(kind: type) -> dict[str, Any]:
    """Returns the defaults of the options of a loss module."""
    known = next((c for c in kind.__mro__ if c.__module__.startswith("torch.nn.")), kind)
    return {n: p.default for n, p in inspect.signature(known).parameters.items()}


@lru_cache(maxsize=256)
def _as_function(expression: str, called: str, options: tuple[tuple[str, Any], ...]) -> str:
    try:
        node = ast.parse(expression, mode="eval").body
    except SyntaxError:
        return ""
    if not isinstance(node, ast.Call):
        return ""
    node.func = ast.parse(f"torch.nn.functional.{called}", mode="eval").body
    node.keywords += [ast.keyword(n, ast.Constant(value)) for n, value in options]
    return ast.unparse(node)


def _shortened(file: str) -> str:
    """Returns the path from the current folder, if the file is below it."""
    try:
        relative = os.path.relpath(file)
    except ValueError:  # on another drive
        return file
    return file if relative.startswith("..") or file.startswith("<") else relative
