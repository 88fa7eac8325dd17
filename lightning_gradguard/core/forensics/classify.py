"""Second run of a batch, and classification of its first nonfinite value."""

from __future__ import annotations

import linecache
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.core.forensics.buffers import buffers_of, corrupted_buffers, origin_in_buffers
from lightning_gradguard.core.forensics.exceptions import origin_of_exception
from lightning_gradguard.core.forensics.faults import FAULTS
from lightning_gradguard.core.forensics.faults.logarithms import in_logarithms
from lightning_gradguard.core.forensics.growth import (
    BOUND,
    GROWTH,
    LOOP,
    growth_in_loop,
    made_outside,
    origin_in_write,
    trained_in,
    where_values_grow,
)
from lightning_gradguard.core.forensics.inputs import (
    HUGE_INPUT,
    Rescaled,
    huge_inputs,
    or_bad_input,
    outliers,
    outlying_rows,
    parts_of,
    parts_out_of_scale,
    standardizing,
)
from lightning_gradguard.core.forensics.operations import (
    JUMP,
    OperationFault,
    advice_on_argument,
    advice_on_number,
    known_fault,
    short_name,
    what_made_it_large,
)
from lightning_gradguard.core.forensics.origin import (
    Origin,
    OutOfRange,
    corrupted_buffer,
    in_rows,
    located,
    nonfinite_input,
    origin_in_weights,
)
from lightning_gradguard.core.forensics.records import (
    LARGE,
    OperationRecord,
    Underflow,
    nonfinite_sources,
)
from lightning_gradguard.core.forensics.trace import OperationTrace, is_nonfinite
from lightning_gradguard.core.incidents import Cause
from lightning_gradguard.core.norms import tensor_norms, total_norm_from_norms
from lightning_gradguard.core.snapshots import preserve_state

Run = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]


def investigate(
    module: nn.Module,
    run: Run,
    batch: Any,
    *,
    out_of_range: Mapping[str, OutOfRange] | None = None,
    repeats_finite: bool = True,
    frameworks: Sequence[str] = (),
) -> Origin:
    """Runs a batch again and finds the origin of its nonfinite value.

    Every operation of the forward and backward pass is checked, with a host synchronization. The search
    follows only nonfinite values back from the nonfinite loss (or gradient), so that a harmless mask of
    `-inf` is not blamed; from an operation that overflows, it follows large values back to the one that made
    them large.

    Args:
        module: The network. Buffers, modes, random numbers and plain attributes are restored.
        run: Computes with it the losses of the batch, and the gradients of its parameters.
        batch: Input of `run`, in which the origin may be; any nesting of tensors.
        out_of_range: Tensors of weights or optimizer state with elements out of range; see
            `out_of_range_elements`.
        repeats_finite: True to run a batch that turns out finite, or is out of scale, once more. False if
            `run` may communicate with ranks whose batches are not finite.
        frameworks: Folders with code that is never the user's, beside that of torch.

    Returns:
        The origin; its cause is `"transient"` if losses and gradients are finite. If `run` raises, the origin
        of the values that made it raise; `"unknown"` if they are not known.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> def run():
        ...     loss = layer(torch.ones(1, 2)).relu().mul(0).log().sum()
        ...     return [loss], torch.autograd.grad(loss, list(layer.parameters()))
        >>> origin = investigate(layer, run, None)
        >>> origin.cause, origin.operation, origin.high
        ('loss', 'aten::log', 0.0)
    """
    parts = parts_of(batch)
    tensors = (*module.named_buffers(), *module.named_parameters())
    named = {**{name.replace("_orig_mod.", ""): tensor for name, tensor in tensors}, **parts}
    before = buffers_of(module)
    out_of_range = out_of_range or {}
    with preserve_state(module), torch.enable_grad(), OperationTrace(module, named, frameworks) as trace:
        losses, gradients, error = _run(run)
        corrupted = corrupted_buffers(module, before, parts.values())
    written = trace.written(out_of_range)
    if written is not None:
        return origin_in_write(written, trace)
    if error is not None:
        last = trace.last_nonfinite()
        if last is not None:
            return _raised(error, _classify(last, out_of_range, parts, trace))
        return origin_of_exception(error, trace.failed, parts, out_of_range, frameworks)
    nonfinite = next((t for t in (*losses, *gradients) if is_nonfinite(t)), None)
    if nonfinite is not None:
        origin = _classify(trace.record_of(nonfinite), out_of_range, parts, trace)
        is_of_code = origin.operation and origin.phase == "forward" and origin.cause != "bad_input"
        return _with_scale(origin, module, run, parts) if is_of_code and repeats_finite else origin
    overflows = _total_norm_overflows(gradients)
    if not (overflows or corrupted):
        return _finite(module, run, repeats=repeats_finite)
    if out_of_range:
        return origin_in_weights(out_of_range)
    if overflows:
        return _overflowing_norm(gradients, parts, trace)
    return or_bad_input(origin_in_buffers(corrupted), parts)


def _run(run: Run) -> tuple[Sequence[Tensor], Sequence[Tensor], Exception | None]:
    try:
        return *run(), None
    except Exception as error:  # of the step's own code, or of torch
        return [], [], error


def _with_scale(origin: Origin, module: nn.Module, run: Run, parts: Mapping[str, Tensor]) -> Origin:
    """Returns the origin, advised to standardize parts of the batch first if that alone makes it finite."""
    # of bad data, scaling would hide it
    scales = {n: rms for n, rms in parts_out_of_scale(parts).items() if not outlying_rows(parts[n])}
    if not scales:
        return origin
    factors = [(parts[name], 1 / rms) for name, rms in scales.items()]
    with preserve_state(module), torch.enable_grad(), Rescaled(factors):
        losses, gradients, error = _run(run)
    if error is not None or any(map(is_nonfinite, (*losses, *gradients))):
        return origin
    first = f"First {standardizing(scales)}, and the step is finite with an rms of 1."
    return replace(origin, advice=f"{first} {origin.advice}".strip())


def _raised(error: Exception, origin: Origin) -> Origin:
    """Returns the origin of a nonfinite value that made the step raise."""
    return replace(
        origin, detail=f"{origin.detail.rstrip('.')}; the step then raised {type(error).__name__}."
    )


def _finite(module: nn.Module, run: Run, *, repeats: bool) -> Origin:
    """Returns the origin if nothing is nonfinite in the trace: code may run otherwise without one."""
    numbers: tuple[Tensor, ...] = ()
    if repeats:
        with preserve_state(module), torch.enable_grad():
            losses, gradients = run()
        numbers = (*losses, *gradients)
    if not any(map(is_nonfinite, numbers)):
        detail = "Run again on the same weights, in the same way, the batch gives finite numbers."
        return Origin("transient", detail=detail)
    if _has_compiled_code():
        detail = "The batch is nonfinite with torch.compile, and finite when the same step runs eagerly."
        return Origin("compiled_code", detail=detail)
    return Origin("unknown", detail="The batch is nonfinite again, but not while its operations are traced.")


def _has_compiled_code() -> bool:
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"]["ok"])


def _classify(
    nonfinite: OperationRecord | None,
    out_of_range: Mapping[str, OutOfRange],
    parts: Mapping[str, Tensor],
    trace: OperationTrace,
) -> Origin:
    sources = [] if nonfinite is None else nonfinite_sources(nonfinite)
    source = next(iter(sources), None)
    if isinstance(source, str):
        if source in parts:
            return _masked_input(nonfinite_input(source, parts[source]), trace.masked)
        leaf = trace.leaf(source)
        if not isinstance(leaf, nn.Parameter):
            return corrupted_buffer(source, leaf)
        out_of_range = out_of_range or {source: _nonfinite_elements(leaf)}
    if out_of_range:
        return origin_in_weights(out_of_range)
    if source is None or isinstance(source, str):
        return Origin("unknown", detail="No traced operation made the nonfinite value.")
    outside = made_outside(source, parts, trace)
    if outside is not None:
        return outside
    origin = _origin_of_operation(source, parts, trace)
    others = (r for r in sources[1:] if isinstance(r, OperationRecord) and r.phase == source.phase)
    advice = origin.advice and origin.advice + _likewise(origin.advice, source, others, trace)
    return replace(origin, advice=advice)


def _likewise(
    advice: str, source: OperationRecord, others: Iterable[OperationRecord], trace: OperationTrace
) -> str:
    """Returns the other places with a known fault, without whose cures nonfinite values are left."""
    first, *made = (what_made_it_large(r, FAULTS) for r in (source, *others))
    faults = [(r.location, r, fault) for r in made if r.location and (fault := known_fault(r, FAULTS))]
    fault = known_fault(first, FAULTS)
    why = "" if fault is None else f"{fault.why}. "
    cures = {_advice(r, fault, trace).removeprefix(why): place for place, r, fault in faults}
    return "".join(f" Also at {p}: {c[:1].lower()}{c[1:]}" for c, p in cures.items() if c not in advice)


def _masked_input(origin: Origin, product: OperationRecord | None) -> Origin:
    """Returns the origin in a part of the batch, with the product by which a mask was to hide its NaN."""
    if product is None:
        return origin
    name = origin.where[0]
    advice = (
        f"The NaN of {name} meet the 0 of a mask, and NaN times 0 is NaN; torch.where has a gradient of NaN "
        f"there too. Keep the mask, and replace them before: torch.nan_to_num(y) (`y` is {name})."
    )
    detail = f"{origin.detail.rstrip('.')}, which a mask multiplies by 0"
    return located(replace(origin, detail=detail, advice=advice), product.location)


def _nonfinite_elements(tensor: Tensor) -> OutOfRange:
    return OutOfRange(int((~tensor.detach().isfinite()).sum()), tensor.numel(), math.inf)


def _origin_of_operation(
    overflowing: OperationRecord, parts: Mapping[str, Tensor], trace: OperationTrace
) -> Origin:
    source = what_made_it_large(overflowing, FAULTS)
    fault = known_fault(source, FAULTS)
    underflow = _underflow(source, fault)
    given = "" if source.low is None else f" given {source.low:.4g} to {source.high:.4g}"
    place = f"module `{source.module}`" if source.module else "the step's own code"
    writes_gradients = trace.follows_backward(source)
    place = "code that writes gradients" if writes_gradients else place
    returned = f"returned {source.made}"
    if source is not overflowing:
        returned = f"returned values up to {source.largest:.3g}, so that {overflowing.operation} overflowed"
    called = f" of {source.called}" if source.called else ""
    sentence = f"{source.operation}{called} in {place}{given} {returned} ({source.dtype})"
    if underflow is not None:
        elsewhere = f" at {underflow.location}" if underflow.location not in (None, source.location) else ""
        why = "a root of 0" if underflow.operation in ("sqrt", "pow") else "which rounds to 0"
        sentence += f"; its 0 comes from {underflow.operation}{elsewhere}, {why}"
    factor = growth_in_loop(source)
    if factor:
        sentence += f", as values grow {factor:.3g} times each time that this line runs"
    rows = _rows_at_fault(source, parts)
    sentence += f",{in_rows(rows)}" if rows else ""
    sentence += "".join(f"; {outlier}" for outlier in outliers(rows, parts))
    cause: Cause = "loss" if trace.computes_loss(source) else "forward_pass"
    cause = "backward_pass" if source.phase == "backward" or writes_gradients else cause
    cause = (fault.cause if fault is not None else "") or cause
    advice = LOOP.format(factor) * bool(factor)
    factors = source.arguments if factor and short_name(source) == "mul" else []
    name = trained_in(factors, source, trace)  # a clamp of the product has no gradient
    advice += BOUND.format(name) if name else _advice(source, fault, trace)
    origin = Origin(
        cause,
        source.phase,
        source.module,
        source.operation,
        (source.module,) if source.module else (),
        dtype=source.dtype,
        low=source.low,
        high=source.high,
        detail=sentence,
        rows=rows,
        advice=advice,
    )
    origin = located(origin, source.location)
    of_rows = outliers(rows, parts)  # of which any layer makes large values
    if source is overflowing and not of_rows and (first := where_values_grow(source, trace)) is not None:
        detail = f"{origin.detail.rstrip('.')}; values are above {LARGE:.0e} from module `{first.module}` on"
        origin = replace(
            origin,
            cause="forward_pass",
            where=(first.module,),
            detail=detail,
            advice=GROWTH.format(first.module),
        )
    # an infinite part would have been the source, unless it is a mask
    huge = {name: high for name, high in huge_inputs(parts).items() if math.isfinite(high)}
    largest = max(abs(source.low or 0.0), abs(source.high or 0.0))
    if huge and (cause != "loss" or largest > HUGE_INPUT or source is not overflowing):
        name, high = next(iter(huge.items()))
        rows = rows or tuple(outlying_rows(parts[name]))
        detail = f"{origin.detail.rstrip('.')}; {name} holds values up to {high:.4g}"
        detail += f"{in_rows(rows)}."
        # the cure of the operation would hide bad data
        return replace(origin, cause="bad_input", where=tuple(huge), rows=rows, detail=detail, advice="")
    return origin


def _underflow(record: OperationRecord, fault: OperationFault | None) -> Underflow | None:
    """Returns the operation that the zeros at fault come from, if it underflows."""
    is_of_zeros = fault is not None and (fault.has_zero or fault.underflow)
    return next((a.underflow for a in record.arguments if is_of_zeros and a.underflow is not None), None)


def _advice(record: OperationRecord, fault: OperationFault | None, trace: OperationTrace) -> str:
    if of_number := advice_on_number(record):
        return of_number
    if fault is None or record.given_nonfinite is not None:
        return advice_on_argument(record)
    is_positive = "clamp_min(1e-" in fault.cure  # it makes its argument so
    if name := trained_in(record.arguments[fault.argument or 0 :][:is_positive], record, trace):
        return (
            f"{fault.why}. `{name}` is trained, and a clamp has no gradient there: train its logarithm, and "
            f"use torch.exp(self.{name}) in place of self.{name}."
        )
    name = record.node.removesuffix("Backward")
    is_function = record.is_custom and name != record.node  # torch's own nodes end in a number
    whose = f"The backward pass of your own autograd.Function {name}: " * is_function
    failed = record.called if fault.called else short_name(record)
    place = record.location
    code = place.called_code if place else ""
    underflow = _underflow(record, fault) if fault.underflow else None
    computed = place if underflow is None else underflow.location
    is_logarithm = "log" in short_name(record).lower()  # of which the cure takes the place, too
    if computed is not None and (underflow is not None or failed == "exp"):
        source = "".join(linecache.getlines(computed.file))
        operation = "exp" if underflow is None else underflow.operation.removeprefix("1 / ")
        found = in_logarithms(source, computed.line, operation)
        cures = ", and in place of ".join(f"{old} use {new}" for old, new in found)
        if cures and (underflow is None or is_logarithm or any(code in old for old, _ in found)):
            return f"{whose}{fault.why}. In place of {cures}."
    if underflow is not None:
        underflowed = computed.called_code if computed else ""
        advice = whose + fault.advice(underflow.operation, "" if is_logarithm else underflowed)
        return advice if "In place of" in advice else advice + _bounded(record, underflow, code)
    if place is not None and place.functional:
        advice = fault.advice(failed, place.functional)
        return advice.replace(f"In place of {place.functional} use", f"In place of {code} use")
    return whose + fault.advice(failed, code)


def _bounded(record: OperationRecord, underflow: Underflow, code: str) -> str:
    """Returns the cure of what is given the zeros of an underflow, where that is on another line."""
    plain = known_fault(record, [f for f in FAULTS if not (f.underflow or f.called)])
    is_root = underflow.operation in ("sqrt", "pow")  # where a bound has no finite gradient
    found = (
        None if plain is None or is_root else plain.advice(short_name(record), code).partition("In place of")
    )
    return f" Or bound it, without a gradient there. In place of{found[2]}" if found and found[2] else ""


def _rows_at_fault(source: OperationRecord, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Returns the rows of the result, if these are the rows of the batch."""
    lengths = [len(part) for part in parts.values() if part.ndim]
    return source.rows if lengths and source.length == lengths[0] > 1 else ()


def _overflowing_norm(
    gradients: Sequence[Tensor], parts: Mapping[str, Tensor], trace: OperationTrace
) -> Origin:
    detail = "Every gradient is finite, but their norm overflows float32"
    largest = max(gradients, key=lambda g: float(g.detach().abs().amax()) if g.numel() else 0.0)
    record = trace.record_of(largest)
    outside = None if record is None else made_outside(record, parts, trace)
    if outside is not None:
        return outside
    source = None if record is None else what_made_it_large(record, FAULTS)
    if record is None or source is None or source.growth < JUMP or not known_fault(source, FAULTS):
        advice = "Normalize between layers, and take means of neighbours, steps or elements in place of sums."
        return or_bad_input(Origin("backward_pass", "backward", detail=detail, advice=advice), parts)
    origin = _origin_of_operation(record, parts, trace)
    sentence = origin.detail.replace(f"{record.operation} overflowed", "the norm of the gradients overflowed")
    return replace(origin, detail=sentence)


def _total_norm_overflows(gradients: Sequence[Tensor]) -> bool:
    # measured like a step, where the norm overflows if squares overflow float32
    total = total_norm_from_norms(tensor_norms([g.detach() for g in gradients]))
    return float(total) > torch.finfo(torch.float32).max
