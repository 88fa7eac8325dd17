"""Faults of operations: a range of arguments that gives nonfinite values, the reason, and code without it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lightning_gradguard.core.forensics.arguments import call_in, replacement
from lightning_gradguard.core.forensics.records import Argument, OperationRecord, largest_first
from lightning_gradguard.core.incidents import Cause

#: Functions with one cure.
_ALIKE = (
    *(("log", "log2", "log10"), ("exp", "exp2", "expm1", "sinh", "cosh"), ("acos", "asin"), ("std", "var")),
    *(("amin", "amax", "min", "max"), ("remainder", "fmod"), ("lgamma", "digamma")),
    (
        *("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss"),
        "binary_cross_entropy_with_logits",
    ),
    (
        *("l1_loss", "kl_div", "poisson_nll_loss", "gaussian_nll_loss", "hinge_embedding_loss"),
        *("cosine_embedding_loss", "margin_ranking_loss", "triplet_margin_loss"),
    ),
    ("sum", "cumsum"),
)


@dataclass(frozen=True)
class OperationFault:
    """A way in which an operation makes nonfinite values of finite ones.

    Args:
        operations: Names in the forward pass without namespace and trailing underscore, or of the autograd
            nodes without `Backward` and number.
        why: The cause, as a sentence.
        cure: Code to use instead; `x` is the argument, `y` the other one.
        phase: The pass in which it happens.
        argument: The argument that the bounds are about; `None` for any of them.
        at_most: That argument has a value at or below this.
        at_least: That argument has a value at or above this.
        beyond: That argument has a value of at least this magnitude.
        has_zero: That argument has a zero.
        is_empty: That argument has no elements.
        is_infinite: That argument has the infinity of a mask.
        underflow: Its zeros come from one of these operations, which underflowed; `x` is that one's argument.
        number_at_most: One of the operation's number arguments is at or below this.
        dtypes: Of the result; empty for all.
        called: Regular expression of the function or distribution that the user's line calls.
        made: What the operation returned, `"nan"` or `"inf"`; empty for both.
        cause: Of the incident, if it is another than that of the place.
    """

    operations: tuple[str, ...]
    why: str
    cure: str
    phase: Literal["forward", "backward"] = "forward"
    argument: int | None = 0
    at_most: float | None = None
    at_least: float | None = None
    beyond: float | None = None
    has_zero: bool = False
    is_empty: bool = False
    is_infinite: bool = False
    underflow: tuple[str, ...] = ()
    number_at_most: float | None = None
    dtypes: tuple[str, ...] = ()
    called: str = ""
    made: str = ""
    cause: Cause | Literal[""] = ""

    def matches(self, record: OperationRecord) -> bool:
        """Checks that a recorded operation is one of these, and its arguments are in the range."""
        # code of the user's own in a backward pass is like any other
        phase = "forward" if record.is_custom else record.phase
        if phase != self.phase or short_name(record) not in self.operations:
            return False
        if self.called and not re.fullmatch(self.called, record.called):
            return False
        if self.dtypes and record.dtype not in self.dtypes:
            return False
        if self.made and self.made not in (record.made, record.made.removeprefix("-")):
            return False
        if self.number_at_most is not None and not any(n <= self.number_at_most for n in record.numbers):
            return False
        given = record.arguments if self.argument is None else record.arguments[self.argument :][:1]
        return not self._is_bounded or any(map(self._is_in_range, given))

    @property
    def _is_bounded(self) -> bool:
        is_bounded = (self.at_most, self.at_least, self.beyond) != (None, None, None)
        return is_bounded or self.has_zero or self.is_empty or self.is_infinite or bool(self.underflow)

    def _is_in_range(self, argument: Argument) -> bool:
        if self.is_empty:
            return 0 in argument.shape
        if self.is_infinite:
            return argument.is_nonfinite and not argument.has_nan
        if self.underflow:
            return argument.underflow is not None and argument.underflow.operation in self.underflow
        if argument.low is None or argument.high is None:
            return False
        return (
            (self.at_most is None or argument.low <= self.at_most)
            and (self.at_least is None or argument.high >= self.at_least)
            and (self.beyond is None or argument.largest >= self.beyond)
            and (not self.has_zero or argument.smallest == 0)
        )

    def advice(self, function: str, code: str = "") -> str:
        """Returns the cause and the cure in words, with the function that failed in place of its like.

        `code` calls it: its arguments take the places of `x` and `y`.
        """
        try:
            return self._advice(function, code)
        except Exception:  # of code that no rule for it foresees: the operation and its line are known
            return f"{self.why}."

    def _advice(self, function: str, code: str) -> str:
        cure, failed = self.cure, function.lower()
        if re.search(r"\bF\.", code):  # the name that most code has for it
            cure = cure.replace("torch.nn.functional.", "F.")
        for alike in _ALIKE:
            if failed in alike:
                cure = re.sub(rf"(?<=\.)({'|'.join(alike)})\(", f"{failed}(", cure)
        usual = (self.called.split("|") if self.called else self.underflow or self.operations)[0]
        name, usual = (n if self.called else _called_name(n) for n in (function, usual))
        used = [name for name in ("x", "y") if re.search(rf"\b{name}\b", cure)]
        is_alike = name == usual or used == ["y"] or call_in(cure, name) is not None
        replaced = replacement(code, name, cure, is_inside=bool(self.called)) if is_alike else None
        if replaced is not None:
            return f"{self.why}. In place of {replaced[0]} use {replaced[1]}."
        if used == ["x"] and is_alike and not (self.called or self.underflow):
            return f"{self.why}. In place of {name}(x) use {cure}."
        given = " and ".join(f"`{name}`" for name in used)
        names = ("", f" ({given} is its argument)", f" ({given} are its arguments)")[len(used)]
        return f"{self.why}. {'Use' if is_alike else f'For {usual}, use'} {cure}{names}."


def _called_name(operation: str) -> str:
    """Returns the name of the function of torch that consists of an operation, or made an autograd node."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).strip("_").lower().removesuffix("_ex")


def short_name(record: OperationRecord) -> str:
    """Returns the name of an operation, or of the autograd node that ran it.

    Names lose what differs between variants: `aten::log_` is `log`, `SqrtBackward0` is `Sqrt`.
    """
    if record.node and not record.is_custom:
        return re.sub(r"Backward\d*$", "", record.node.rpartition("::")[2])
    return record.name.rpartition("::")[2].rstrip("_")


_WRITES = ("scalar_tensor", "full", "full_like", "fill", "masked_fill", "index_fill", "index_put")
_ARITHMETIC = ("mul", "add", "sub", "rsub", "div", "pow")
#: A result this many times larger than the argument is a jump; normalized networks have smaller ones.
JUMP = 1e3


def what_made_it_large(record: OperationRecord, faults: Iterable[OperationFault]) -> OperationRecord:
    """Follows large values back from an operation that overflows to the first one that made them large.

    That is the first one with a jump and a known fault, such as `exp` where its square overflows; else the
    operation itself, as if it fails at a zero.
    """
    known = list(faults)
    fault = known_fault(record, known)
    if advice_on_number(record) or (fault and (fault.underflow or (fault.has_zero and record.made != "inf"))):
        return record
    before = [r for r in largest_first(record) if r.growth >= JUMP and known_fault(r, known)]
    return before[-1] if before else record


def advice_on_number(record: OperationRecord) -> str:
    """Returns what to do about a number of the user's code that is not finite; empty if there is none.

    The infinity of a mask is one whose product with 0 fails.
    """
    number = next((n for n in record.numbers if not math.isfinite(n)), None)
    name, given = short_name(record), record.given_nonfinite
    if number is None and given is not None and given.has_nan and given.shape == ():  # as `x[mask] = nan`
        number = math.nan
    if number is None or (math.isinf(number) and record.made == "nan"):
        return ""
    if math.isnan(number) and name in _WRITES and not record.called:
        return (
            "The NaN that this line writes reaches the loss: a product with 0 does not hide it, as NaN times "
            "0 is NaN, nor does torch.where its gradient. Write a finite number, and mask what is computed "
            "of it."
        )
    if name not in _ARITHMETIC:
        return ""
    return (
        f"A number that this line gives to {name} is {number}: look at the code that computes it, for a "
        "division by a count of 0, a mean of nothing or a logarithm of 0, and leave its term out then."
    )


def advice_on_argument(record: OperationRecord) -> str:
    """Returns what to do about an argument that was nonfinite before; empty if there is none."""
    given = record.given_nonfinite
    if given is not None:
        return (
            f"An argument of shape {given.shape} is nonfinite before {record.name} runs, and is neither part "
            "of the batch nor a weight or buffer: look at the code that makes it, for a division by a count "
            "of 0, torch.empty, or a state that is kept from an earlier batch."
        )
    written = (a.record for a in record.arguments if a.is_nonfinite and a.record is not None)
    place = next((r.location for r in written if r.is_intended), None)
    if place is None or record.node:
        return ""
    return (
        f"An argument is infinite, as {place} writes it (`{place.code}`). A mask of -inf belongs right "
        "before a softmax; elsewhere write a finite number."
    )


def known_fault(record: OperationRecord, faults: Iterable[OperationFault]) -> OperationFault | None:
    """Returns the first fault that an operation has, the more specific ones listed first."""
    return next((fault for fault in faults if fault.matches(record)), None)
