"""Findings of the initialization check, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_gradguard.core.initialization.probe import RECTIFIERS

Severity = Literal["info", "warn", "fail"]


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
        cure: Line of code that cures it.
    """

    criterion: str
    module: str
    value: float
    expected: str
    severity: Severity
    cure: str


def table(findings: Sequence[Finding]) -> str:
    """Formats findings as a table: severity, layer, criterion, measured, expected, cure."""
    head = ("", "layer", "criterion", "measured", "expected", "cure")
    rows = [
        (f.severity.upper(), f.module or "(network)", f.criterion, f"{f.value:.3g}", f.expected, f.cure)
        for f in findings
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in (head, *rows)
    )


def initializer_line(name: str, activation: str | None) -> str:
    """Returns the line that initializes a layer for the activation after it."""
    target = f"model.{name}.weight" if name else "model.weight"
    if activation in RECTIFIERS:
        return f"nn.init.kaiming_normal_({target}, nonlinearity='relu')"
    if activation == "tanh":
        return f"nn.init.orthogonal_({target}, gain=nn.init.calculate_gain('tanh'))"
    if activation == "sigmoid":
        return f"nn.init.xavier_normal_({target})  # better: ReLU, or normalization before the sigmoid"
    return f"nn.init.xavier_normal_({target})"
