"""Records of operations that returned nonfinite or large values, and the way from one to those before it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lightning_gradguard.core.forensics.location import Location

#: Finite results above this are recorded too, so that what overflows later can be followed back to them.
LARGE = 1e4


@dataclass(frozen=True)
class Underflow:
    """An operation that returned 0, or a number next to it, of numbers that are none; or a root of 0.

    Args:
        operation: Such as `prod`, or `sqrt`.
        location: The user's line that ran it.
    """

    operation: str
    location: Location | None


@dataclass(frozen=True)
class Argument:
    """A tensor that an operation is given.

    Args:
        is_floating: True unless it holds integers or truth values.
        low: Smallest finite value; `None` without any.
        high: Largest finite value.
        smallest: Smallest magnitude of a finite value.
        has_nan: True if a value is NaN.
        is_nonfinite: True if a value is NaN or infinite.
        shape: Its shape.
        record: The operation that made it, if it is recorded.
        leaf: Name of the parameter, buffer or part of the batch that it is a view of.
        is_mask: True if it is a mask that is added to scores: infinite in some places, 0 in all others.
        underflow: The operation that its zeros come from, if that underflowed.
    """

    is_floating: bool
    low: float | None
    high: float | None
    smallest: float | None
    has_nan: bool
    is_nonfinite: bool
    shape: tuple[int, ...]
    record: OperationRecord | None
    leaf: str | None
    is_mask: bool = False
    underflow: Underflow | None = None

    @property
    def largest(self) -> float:
        """Largest magnitude of a finite value; 0 without any."""
        return max(abs(self.low or 0.0), abs(self.high or 0.0))


@dataclass
class OperationRecord:
    """An operation that returned nonfinite or large values."""

    #: Such as `aten::log`.
    name: str
    #: The autograd node that ran it; empty in the forward pass.
    node: str
    module: str
    dtype: str
    #: `"nan"`, `"inf"`, `"-inf"`, or `"large"` for finite values.
    made: str
    #: Largest magnitude of the finite results.
    largest: float
    #: Calls of modules with parameters that had begun, and backward passes that had.
    entered: int
    segment: int
    #: True if the values are intended, as the `-inf` of a mask.
    is_intended: bool
    arguments: list[Argument]
    location: Location | None
    #: Length of the result's first dimension, and the first ten nonfinite (else the largest) rows.
    length: int = 0
    rows: tuple[int, ...] = ()
    #: The arguments that are numbers.
    numbers: tuple[float, ...] = ()
    #: True if code of the user's ran it in a backward pass: of a `torch.autograd.Function`, or a hook.
    is_custom: bool = False
    #: Its place among the recorded ones.
    index: int = 0
    #: Name of the parameter or buffer that it wrote in place.
    writes: str = ""

    @property
    def operation(self) -> str:
        """Name with that of the autograd node."""
        return f"{self.name} in {self.node}" if self.node else self.name

    @property
    def called(self) -> str:
        """The function or distribution of torch that the user's line calls; empty for an operation."""
        return "" if self.location is None else self.location.called

    @property
    def phase(self) -> Literal["forward", "backward"]:
        """The pass in which it ran."""
        return "backward" if self.node else "forward"

    @property
    def low(self) -> float | None:
        """Smallest finite argument."""
        return min((a.low for a in self.arguments if a.is_floating and a.low is not None), default=None)

    @property
    def high(self) -> float | None:
        """Largest finite argument."""
        return max((a.high for a in self.arguments if a.is_floating and a.high is not None), default=None)

    @property
    def given_nonfinite(self) -> Argument | None:
        """A nonfinite argument that nothing in this step has made."""
        found = (a for a in self.arguments if a.is_nonfinite and not (a.record or a.leaf or a.is_mask))
        return next(found, None)

    @property
    def growth(self) -> float:
        """Largest result relative to the largest argument, of which numbers below 1 count as 1."""
        given = max([1.0, *(a.largest for a in self.arguments if a.is_floating)])
        return (self.largest if self.made == "large" else math.inf) / given

    @property
    def largest_argument(self) -> Argument | None:
        """The one with the largest finite value, if that is large."""
        floating = (a for a in self.arguments if a.is_floating)
        found = max(floating, key=lambda a: a.largest, default=None)
        return found if found is not None and found.largest > LARGE else None


@dataclass(frozen=True)
class FailedOperation:
    """An operation that raised, with its arguments."""

    name: str
    arguments: tuple[Any, ...]
    location: Location | None


def nonfinite_sources(record: OperationRecord) -> list[OperationRecord | str]:
    """Follows nonfinite values back to the operations, or the names of tensors, that they began with.

    The operations are in the order in which they ran. If the first arguments lead to a tensor, it is first.
    """
    found: list[OperationRecord | str] = []
    seen: set[int] = set()
    ahead = [record]
    while ahead:
        record = ahead.pop()
        if id(record) in seen:
            continue
        seen.add(id(record))
        nonfinite = [a for a in record.arguments if a.is_nonfinite]
        nan = [a for a in nonfinite if a.has_nan]
        if record.made == "nan" and not nan:
            # NaN was made here, perhaps of an infinity that was not intended
            nonfinite = [a for a in nonfinite if not (a.is_mask and a.leaf)]
        leaves = [a.leaf for a in nan or nonfinite if a.leaf is not None]
        made = [a.record for a in nan or nonfinite if a.record is not None and not a.record.is_intended]
        found += leaves or ([] if made else [record])
        ahead += reversed(made)  # the first argument's is followed first
    operations = sorted((r for r in found if isinstance(r, OperationRecord)), key=lambda r: r.index)
    tensors = [name for name in found if isinstance(name, str)]
    return [*tensors, *operations] if isinstance(found[0], str) else [*operations, *tensors]


def largest_first(record: OperationRecord) -> Iterator[OperationRecord]:
    """Yields an operation, and those before it that made its values large, the last one first."""
    seen: set[int] = set()
    while id(record) not in seen:
        seen.add(id(record))
        yield record
        largest = record.largest_argument
        if largest is None or largest.record is None:
            return
        record = largest.record


def overflowed_exp(record: OperationRecord | None) -> Underflow | None:
    """Returns what makes 0 of a quotient by a result, if that is infinite as an `exp` has overflowed."""
    sources = [] if record is None or record.made != "inf" else nonfinite_sources(record)
    exps = (r for r in sources if isinstance(r, OperationRecord) and r.name == "aten::exp")
    return next((Underflow("1 / exp", r.location) for r in exps), None)
