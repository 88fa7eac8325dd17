"""Large values that no operation makes at once: code writes them, or they grow from call to call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lightning_gradguard.core.forensics.faults import FAULTS
from lightning_gradguard.core.forensics.inputs import HUGE_INPUT
from lightning_gradguard.core.forensics.operations import what_made_it_large
from lightning_gradguard.core.forensics.origin import Origin, corrupted_buffer, located
from lightning_gradguard.core.forensics.records import Argument, OperationRecord, largest_first
from lightning_gradguard.core.forensics.trace import OperationTrace

#: Advice where no operation makes values large at once.
GROWTH = (
    "Values grow in {0} and what follows it: initialize its weights for a gain of 1 (recurrent ones by "
    "torch.nn.init.orthogonal_, He before ReLU, Xavier before tanh), normalize there, or, if this begins "
    "only after updates, lower the learning rate."
)
#: Advice where a line that runs in a loop makes values larger each time.
LOOP = "Scale values by 1/{0:.3g} in the loop, or normalize them there. "
#: Advice where that line multiplies by a trained factor.
BOUND = (
    "Or bound the trained factor below 1: use torch.sigmoid(self.{0}), or torch.tanh(self.{0}) for either "
    "sign, in place of self.{0}."
)
#: Times that a line is to have run on large values.
REPEATED = 5


def made_outside(
    overflowing: OperationRecord, parts: Mapping[str, Tensor], trace: OperationTrace
) -> Origin | None:
    """Returns the origin of large values that no operation of the network makes; `None` if one does.

    Code of the step has written them to a parameter or buffer, or they have piled up in a buffer.
    """
    if overflowing.made == "nan":
        return None
    chain = list(largest_first(overflowing))
    written = next((r for r in chain if r.writes and r.made == "large"), None)
    if written is not None:
        return origin_in_write(written, trace)
    first = chain[-1].largest_argument
    name = "" if first is None or first.leaf in parts or first.largest <= HUGE_INPUT else first.leaf
    if not name or isinstance(trace.leaf(name), nn.Parameter):
        return None
    has_other_fault = what_made_it_large(overflowing, FAULTS) is not overflowing
    return None if has_other_fault else corrupted_buffer(name, trace.leaf(name))


def origin_in_write(record: OperationRecord, trace: OperationTrace) -> Origin:
    """Returns the origin in code of the step that has written large values to a parameter or buffer."""
    is_weight = isinstance(trace.leaf(record.writes), nn.Parameter)
    written = f"values up to {record.largest:.3g}" if record.made == "large" else record.made
    origin = Origin(
        "corrupted_weights" if is_weight else "forward_pass",
        record.phase,
        record.module,
        record.operation,
        (record.writes,),
        dtype=record.dtype,
        detail=f"{record.operation} writes {written} to {record.writes}",
        advice=f"This line writes {record.writes}: correct it, or bound what it writes. A lower learning "
        "rate does not help.",
    )
    return located(origin, record.location)


def growth_in_loop(record: OperationRecord) -> float:
    """Returns the factor by which values grow each time that a line runs in a loop; 0 without a loop."""
    same = [r for r in largest_first(record) if (r.name, r.location) == (record.name, record.location)]
    if len(same) < REPEATED or record.location is None:
        return 0.0
    return float((same[1].largest / same[-1].largest) ** (1 / (len(same) - 2)))


def trained_in(arguments: Iterable[Argument], record: OperationRecord, trace: OperationTrace) -> str:
    """Returns the name of the first parameter among arguments, in the module that runs the operation."""
    names = (a.leaf for a in arguments if a.leaf and isinstance(trace.leaf(a.leaf), nn.Parameter))
    return next(names, "").removeprefix(f"{record.module}.")


def where_values_grow(record: OperationRecord, trace: OperationTrace) -> OperationRecord | None:
    """Returns the first operation with large values before one that overflows, if a layer runs it."""
    if record.phase == "backward" or record.made == "nan":
        return None
    first = list(largest_first(record))[-1]
    is_layer = first.module not in ("", record.module) and not trace.computes_loss(first)
    return first if is_layer else None
