"""Findings of the check of a network, and their table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from lightning_gradguard.core.detectors.diagnosis.contracts import CONTRACT
from lightning_gradguard.core.incidents import CURE, Cause

Severity = Literal["info", "warn", "fail"]
#: The most severe first.
SEVERITIES: tuple[Severity, ...] = ("fail", "warn", "info")

#: How the code of cures is used.
PASTED = "Code of a cure is pasted at the end of __init__, below `from torch import nn` and `model = self`."
_OF_RECTIFIERS = " He's gain, of 'relu', is that for GELU and SiLU too."
#: An index in brackets, as in `model.net[2]`.
_INDEX = r"(?<=\[)\d+(?=\])"
#: The module of a parameter, as `model.fc1` in `model.fc1.weight`.
_MODULE = r"\bmodel(?:\.\w+|\[[^]]+\])+(?=\.\w+\b)"
#: Statements on so many modules are written as a loop over them.
_MIN_LOOPED = 3
#: Measured values with their unit.
_UNITS: dict[str, str] = {
    "gradient_gain": "{:.3g} decades",
    "layer_gain": "{:.2g} decades",
    "gain_through_time": "{:.3g} decades",
    "gradient_profile": "{:.3g} decades",
    "dead_units": "{:.0%} of the units",
    "saturated_units": "{:.0%} of the outputs",
    "nonfinite_weights": "{:.2g} of them",
    "nonfinite_gradients": "{:.0%} of the gradients",
    "symmetric_units": "{:.0f} copies",
    "zero_weights": "std {:.3g}",
    "loss_over_guessing": "{:.3g} times",
    **dict.fromkeys(map(str, CONTRACT), "{:.0%} of the values"),
}


class InitializationError(RuntimeError):
    """Raised if a freshly initialized network will not train."""


@dataclass(frozen=True)
class Finding:
    """A criterion that a module does not meet.

    Args:
        criterion: Name of the criterion.
        module: Module at fault; empty for the whole network.
        value: Measured value.
        expected: Values of healthy networks.
        severity: `"fail"` if the network will not train, `"warn"` if it may not, else `"info"`.
        cure: Code that betters it; else the advice that remains.
        is_tried: True if the cure is code that was tried on the batch.
        cause: Of nonfinite values; empty if it is not known.
        location: File, line and function of the user's code that makes them; empty if unknown.

    Example:
        >>> Finding("gradient_gain", "", -9.31, "-2 .. 2", "fail", "").measured
        '-9.31 decades'
    """

    criterion: str
    module: str
    value: float
    expected: str
    severity: Severity
    cure: str = ""
    cause: Cause | Literal[""] = ""
    is_tried: bool = False
    location: str = ""

    @property
    def measured(self) -> str:
        """The value with its unit."""
        return with_unit(self.criterion, self.value)

    def as_advice(self) -> Finding:
        """Returns the finding as a warning if the task decides whether it is a fault.

        A gradient that vanishes through time fails a task that needs its first steps, and no other: most
        forecasts and language models train with it.
        """
        is_of_task = self.criterion == "gain_through_time" and self.value < 0
        return replace(self, severity="warn") if is_of_task and self.severity == "fail" else self

    def describe(self) -> str:
        """Returns the finding in one line: where, what was measured, and what is usual."""
        return f"{self.criterion} of {self.module or 'the network'}: {self.measured}, usual: {self.expected}"


def tried_cure(findings: Sequence[Finding]) -> str:
    """Returns the code that was tried for the first of the findings, and its like, as advice; or none."""
    tried = [f.cure for f in findings if f.criterion == findings[0].criterion and f.is_tried]
    return f"{CURE}{one_line([*dict.fromkeys(tried)])}" if tried else ""


def fails(findings: Sequence[Finding]) -> bool:
    """True if a criterion failed."""
    return any(finding.severity == "fail" for finding in findings)


def with_unit(criterion: str, value: float) -> str:
    """Returns a measured value with the unit of its criterion.

    Example:
        >>> with_unit("gradient_gain", -0.4)
        '-0.4 decades'
    """
    return _UNITS.get(criterion, "{:.3g}").format(value)


def table(findings: Sequence[Finding]) -> str:
    """Formats findings as a table: severity, layer, criterion, measured, expected; the cure below, once.

    Neighbours with the same criterion and cure share a row.

    Example:
        >>> line = "nn.init.xavier_normal_(model[{}].weight)"
        >>> print(
        ...     table(
        ...         [
        ...             Finding("layer_gain", str(i), -0.84, "-0.2 .. 0.2", "fail", line.format(i))
        ...             for i in (2, 4, 6)
        ...         ]
        ...     )
        ... )
              layer              criterion   measured       expected
        FAIL  2 to 6 (3 layers)  layer_gain  -0.84 decades  -0.2 .. 0.2
              cure: for i in range(2, 7, 2): nn.init.xavier_normal_(model[i].weight)
        Code of a cure is pasted at the end of __init__, below `from torch import nn` and `model = self`.
    """
    head = ("", "layer", "criterion", "measured", "expected")
    grouped = [[*members] for _, members in groupby(findings, key=_likeness)]
    cures = [one_line([f.cure for f in members]) for members in grouped]
    if any(f.criterion == "gradient_gain" for f in findings):
        # the cure of the network is that of its layers
        cures = ["" if g[0].criterion == "layer_gain" else c for g, c in zip(grouped, cures, strict=True)]
    rows = [_row(members) for members in grouped]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines: list[str] = []
    printed: set[str] = set()
    for row, cure in zip((head, *rows), ("", *cures), strict=True):
        lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
        code = cure.partition("  #")[0]
        if cure and code not in printed:
            words = f"{' ' * (widths[0] + 2)}cure: "
            lines.append(words + cure.replace("\n", "\n" + " " * len(words)))
            printed.add(code)
    if any("model." in code or "model[" in code for code in printed):
        lines.append(PASTED + _OF_RECTIFIERS * any("nonlinearity='relu'" in code for code in printed))
    return "\n".join(lines)


def _likeness(finding: Finding) -> tuple[object, ...]:
    """Returns what neighbours in one row have in common: all but the numbers in their names and cures."""
    names = re.sub(r"\d+", "#", finding.module), re.sub(_INDEX, "#", re.sub(_MODULE, "#", finding.cure))
    return finding.criterion, finding.severity, finding.expected, *names


def _row(members: Sequence[Finding]) -> tuple[str, ...]:
    first, last = members[0], members[-1]
    layer, measured = first.module or "(network)", first.measured
    if len(members) > 1:
        layer = f"{first.module} to {last.module} ({len(members)} layers)"
        low, high = min(members, key=lambda f: f.value), max(members, key=lambda f: f.value)
        if low.measured != high.measured:
            measured = f"{low.measured.partition(' ')[0]} .. {high.measured}"
    return first.severity.upper(), layer, first.criterion, measured, first.expected


def one_line(lines: Sequence[str]) -> str:
    """Joins statements to one line, in a loop where they differ in one index, or one module, alone.

    Example:
        >>> one_line(["f(model[0])", "f(model[2])", "f(model[4])"])
        'for i in range(0, 5, 2): f(model[i])'
        >>> one_line(["f(model[0])", "f(model[1])", "g(model[2])"])
        '[f(model[i]) for i in range(0, 2)]; g(model[2])'
        >>> one_line([f"f(model.fc{i}.weight)" for i in (1, 2, 3)])
        'for layer in (model.fc1, model.fc2, model.fc3): f(layer.weight)'
    """
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(re.sub(_INDEX, "#", line), []).append(line)
    alike: dict[str, list[str]] = {}
    for members in groups.values():
        key = re.sub(_MODULE, "#", members[0]) if len(members) == 1 else members[0]
        alike.setdefault(key, []).extend(members)
    parts = []
    for members in alike.values():
        statement, loop = _loop(members)
        if not loop or len(alike) == 1:
            parts.append(f"for {loop}: {statement}" if loop else statement)
        else:
            items = f"({statement.replace('; ', ', ')})" if "; " in statement else statement
            parts.append(f"[{items} for {loop}]")
    return "; ".join(parts)


def _loop(lines: Sequence[str]) -> tuple[str, str]:
    """Returns a statement and what it is repeated for, by index or by module; empty if it is not."""
    parts = [re.split(f"({_INDEX})", line) for line in lines]
    columns = [*zip(*parts, strict=False)]
    differing = [k for k, column in enumerate(columns) if len(set(column)) > 1]
    if not differing:
        return lines[0], ""
    if any(columns[k] != columns[differing[0]] for k in differing) or not differing[0] % 2:
        modules = [{*re.findall(_MODULE, line)} for line in lines]
        if len(lines) < _MIN_LOOPED or any(len(found) != 1 for found in modules):
            return "; ".join(lines), ""
        return re.sub(_MODULE, "layer", lines[0]), f"layer in ({', '.join(min(found) for found in modules)})"
    indices = [*map(int, columns[differing[0]])]
    start, end, step = indices[0], indices[-1] + 1, indices[1] - indices[0]
    statement = "".join("i" if k in differing else text for k, text in enumerate(parts[0]))
    if step > 0 and indices == [*range(start, end, step)]:
        return statement, f"i in range({start}, {end}{f', {step}' if step > 1 else ''})"
    return statement, f"i in ({', '.join(map(str, indices))})"
