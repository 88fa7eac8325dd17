"""A record of every operation of a forward and backward pass that returns nonfinite or large values."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_gradguard.core.forensics.location import Location, user_location
from lightning_gradguard.core.forensics.records import (
    LARGE,
    Argument,
    FailedOperation,
    OperationRecord,
    Underflow,
    overflowed_exp,
)

_UNINITIALIZED = ("aten::empty", "aten::new_empty", "aten::resize", "aten::set_")
#: Operations that add a mask to scores.
_ADDS = ("add", "sub", "addmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")
#: Operations that write an argument to places of another one, where a number that nothing made is a mask's.
_WRITES = ("fill", "masked_fill", "index_fill", "index_put", "scatter", "copy", "where")
#: Operations through which the infinities of a mask remain a mask.
_MOVES = (
    *("add", "sub", "mul", "div", "addmm", "baddbmm", "neg", "_log_softmax", "cat", "stack", *_WRITES),
    *("expand", "clone", "_to_copy", "repeat", "triu", "tril", "index_select", "index_copy"),
    *("masked_scatter", "roll", "flip", "sort", "topk", "maximum", "minimum", "clamp_max"),
)
#: Operations that return 0 of numbers that are none.
_UNDERFLOW = ("prod", "cumprod", "exp", "sigmoid", "_softmax", "mul")
#: Operations that return 0 of 0, where their gradient is infinite.
_ROOTS = ("sqrt", "pow")


class OperationTrace(TorchDispatchMode):
    """Traces nonfinite values from operation to operation, in the forward and the backward pass.

    Attributes:
        failed: The operation that raised, if one did.
        masked: The first product in which all NaN of a factor meet the 0 of a mask, if there is one.
    """

    def __init__(
        self, module: nn.Module, leaves: Mapping[str, Tensor], frameworks: Sequence[str] = ()
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._frameworks = frameworks
        self.failed: FailedOperation | None = None
        self.masked: OperationRecord | None = None
        self._losses: set[str] = set()
        self._return_numbers: set[str] = set()
        self._module = module
        self._leaves = leaves
        self._records: dict[int, OperationRecord] = {}
        self._underflows: dict[int, Underflow] = {}
        self._in_order: list[OperationRecord] = []
        self._kept: list[Tensor] = []  # freed memory could be reused under the same address
        self._inside: list[str] = [""]
        #: The number of the next autograd node at each change of the module, and the module.
        self._begun: list[tuple[int, str]] = [(-1, "")]
        #: The line that made an autograd node, by the number of the node, and the name of the node if it is
        #: one of a backward pass, whose gradient is a second derivative.
        self._made_at: dict[int, tuple[Location | None, str]] = {}
        #: Calls of modules with parameters up to each backward pass, and in all.
        self._entered = 0
        self._entered_before: list[int] = []
        self._in_backward = False
        self._hooks = ExitStack()

    def __enter__(self) -> OperationTrace:
        for name, child in self._module.named_modules():
            name = name.replace("_orig_mod.", "")
            if isinstance(child, _Loss) or "loss" in type(child).__name__.lower():
                self._losses.add(name)
            trains = any(True for _ in child.parameters())
            for handle in (
                child.register_forward_pre_hook(
                    lambda m, i, name=name, trains=trains: self._enter_module(name, trains)
                ),
                child.register_forward_hook(
                    lambda m, i, o, name=name: self._leave_module(name, o), always_call=True
                ),
            ):
                self._hooks.callback(handle.remove)
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function._schema.name
        inputs = _with_memory((args, kwargs))
        node = torch._C._current_autograd_node()
        # the user's code runs in a backward pass too: that of a checkpoint, or of an autograd.Function
        here = user_location(self._frameworks)
        made_at = (here, "") if here is not None or node is None else self._made_by(node)
        self._made_at.setdefault(_next_node() - 1, made_at)
        if node is not None and not self._in_backward:
            self._entered_before.append(self._entered)
        self._in_backward = node is not None
        # an in-place operation overwrites its inputs; batch normalization too, against its schema
        overwrites = function._schema.is_mutable or "batch_norm" in name
        # the target of a copy is not read: it may be uninitialized memory
        read = inputs[1:] if name == "aten::copy_" else inputs
        before = self._inspect(read, name) if overwrites else None
        underflow = self._underflow(name, inputs, args, here) if node is None else None
        try:
            result = function(*args, **(kwargs or {}))
        except Exception:
            self.failed = FailedOperation(name, args, here)
            raise
        outputs = _with_memory(result)
        known = set() if overwrites else {_storage(t) for t in inputs}
        made = [t for t in outputs if _storage(t) not in known]
        if name.startswith(_UNINITIALIZED):
            return result
        notable = sorted((t for t in made if not _magnitude(t) <= LARGE), key=lambda t: not is_nonfinite(t))
        for tensor in made if overwrites else ():
            if _covers_storage(tensor) and not any(tensor is t for t in notable):
                self._records.pop(_storage(tensor), None)
        if underflow is not None:
            saturates = _short(name) == "sigmoid"  # at 1, which 1 - sigmoid takes to 0
            zeros = [t for t in made if _has_zero(t) or (saturates and _has_zero(1 - t))]
            self._underflows.update((_storage(t), underflow) for t in zeros)
            self._kept += zeros
        if notable:
            arguments = self._inspect(inputs, name) if before is None else before
            writes = self._leaf_of(inputs[0], False) if function._schema.is_mutable and node is None else None
            self._record(name, node, here, (args, kwargs), arguments, notable, writes or "")
            if self.masked is None and _short(name) == "mul" and _is_masked(inputs):
                self.masked = self._in_order[-1]
        return result

    def _record(
        self,
        name: str,
        node: torch.autograd.graph.Node | None,
        location: Location | None,
        given: tuple[Any, ...],
        arguments: list[Argument],
        notable: Sequence[Tensor],
        writes: str,
    ) -> None:
        """Records an operation that returned notable values, the nonfinite ones first."""
        made = _describe_nonfinite(notable[0])
        made_at, node_name = (None, "") if node is None else self._made_by(node)
        is_intended = node is None and made != "nan"
        numbers = tuple(float(n) for n in tree_leaves(given) if type(n) in (int, float))
        record = OperationRecord(
            name=name,
            node=node_name,
            module=self._inside[-1] if node is None else self._module_of(node._sequence_nr()),
            dtype=str(notable[0].dtype).removeprefix("torch."),
            made=made,
            largest=max(map(_largest_finite, notable)),
            entered=self._entered,
            segment=len(self._entered_before),
            is_intended=is_intended
            and (not arguments or any(not math.isfinite(n) for n in numbers) or _passes_on(name, arguments)),
            arguments=arguments,
            location=location or made_at,
            length=len(notable[0]) if notable[0].ndim else 0,
            rows=_rows(notable[0]),
            numbers=numbers,
            is_custom=node is not None and location is not None,
            index=len(self._in_order),
            writes=writes,
        )
        self._in_order.append(record)
        for tensor in notable:
            self._records[_storage(tensor)] = record
            self._kept.append(tensor)

    def _made_by(self, node: torch.autograd.graph.Node) -> tuple[Location | None, str]:
        """Returns the line that made a node, and the name of the node whose backward pass it belongs to."""
        location, name = self._made_at.get(node._sequence_nr(), (None, ""))
        return location, name or node.name()

    def _underflow(
        self, name: str, inputs: Sequence[Tensor], args: Sequence[Any], location: Location | None
    ) -> Underflow | None:
        """Returns the operation that zeros of a result come from: an earlier one, or this one."""
        earlier = [(t, u) for t in inputs if (u := self._underflows.get(_storage(t))) is not None]
        short, numbers = _short(name), [arg for arg in args if type(arg) in (int, float, bool)]
        if short in ("sub", "rsub"):  # 0 where two numbers are alike
            ones = (u for _, u in earlier * (numbers == [1]) if u.operation == "sigmoid" and short == "rsub")
            return next((Underflow("1 - sigmoid", u.location) for u in ones), None)
        if short == "add" and any(bool((_values(t) < 0).any()) for t, _ in earlier):
            return None
        passed = (u for t, u in earlier if _has_zero(t) and (short == "mul" or u.operation not in _ROOTS))
        found = next(passed, None)
        if found is None and inputs and _is_root(name, args) and _has_zero(inputs[0]):
            return Underflow(short, location)
        if found is not None or short not in _UNDERFLOW or not inputs:
            is_quotient = found is None and short in ("div", "reciprocal") and inputs
            return overflowed_exp(self.record_of(inputs[-1])) if is_quotient else found
        if any(is_nonfinite(t) or _has_zero(t) for t in inputs):  # a zero is of a mask, or of a ReLU
            return None
        is_signed = short.endswith(("prod", "mul")) and any(bool((_values(t) < 0).any()) for t in inputs)
        is_out = is_signed or (short == "mul" and 0 in numbers)
        return None if is_out else Underflow(short.lstrip("_"), location)

    def record_of(self, tensor: Tensor) -> OperationRecord | None:
        """Returns the operation that wrote a tensor; `None` if none was recorded."""
        return self._records.get(_storage(tensor))

    def written(self, names: Collection[str]) -> OperationRecord | None:
        """Returns the user's first operation that wrote large values to one of these; `None` if none did."""
        return next((r for r in self._in_order if r.writes in names and r.location is not None), None)

    def leaf(self, name: str) -> Tensor:
        """Returns the parameter, buffer or part of the batch of this name."""
        return self._leaves[name]

    def last_nonfinite(self) -> OperationRecord | None:
        """Returns the last operation that returned unintended nonfinite values."""
        return next((r for r in reversed(self._in_order) if r.made != "large" and not r.is_intended), None)

    def follows_backward(self, record: OperationRecord) -> bool:
        """Checks that an operation is neither part of a backward pass nor ahead of one."""
        return not record.node and record.segment == len(self._entered_before) > 0

    def computes_loss(self, record: OperationRecord) -> bool:
        """Checks that an operation belongs to the loss.

        It does within a loss module. Elsewhere no module with parameters is called after it, and it is in the
        step's own code, or in a module that returns a number.
        """
        if record.module in self._losses:
            return True
        is_last = record.entered == [*self._entered_before, self._entered][record.segment]
        return is_last and (not record.module or record.module in self._return_numbers)

    def _inspect(self, inputs: Sequence[Tensor], name: str) -> list[Argument]:
        return [self._argument(t.detach(), _takes_mask(name, n)) for n, t in enumerate(inputs)]

    def _argument(self, tensor: Tensor, may_be_mask: bool) -> Argument:
        is_floating = tensor.is_floating_point() or tensor.is_complex()
        values = _values(tensor) if is_floating else _stored(tensor).double()
        finite = values[values.isfinite()]
        record, nonfinite = self.record_of(tensor), finite.numel() < values.numel()
        underflow = self._underflows.get(_storage(tensor))
        has_nan = nonfinite and bool(values.isnan().any())
        is_zero = bool(finite.numel()) and not bool(finite.any())
        return Argument(
            is_floating=is_floating,
            low=float(finite.min()) if finite.numel() else None,
            high=float(finite.max()) if finite.numel() else None,
            smallest=float(finite.abs().min()) if finite.numel() else None,
            has_nan=has_nan,
            is_nonfinite=nonfinite,
            shape=tuple(tensor.shape),
            record=record,
            leaf=None if record else self._leaf_of(tensor, nonfinite),
            is_mask=may_be_mask and nonfinite and is_zero and not has_nan,
            underflow=underflow if underflow is not None and _has_zero(tensor) else None,
        )

    def _leaf_of(self, tensor: Tensor, nonfinite: bool) -> str | None:
        """Returns the parameter, buffer or part of the batch that a tensor is a view of."""
        same = (n for n, leaf in self._leaves.items() if _storage(leaf) == _storage(tensor))
        return next((name for name in same if not nonfinite or is_nonfinite(self._leaves[name])), None)

    def _enter_module(self, name: str, trains: bool) -> None:
        self._entered += trains
        self._inside.append(name)
        self._begun.append((_next_node(), name))

    def _leave_module(self, name: str, output: Any) -> None:
        if any(isinstance(t, Tensor) and t.ndim == 0 and t.is_floating_point() for t in tree_leaves(output)):
            self._return_numbers.add(name)
        self._inside.pop()
        self._begun.append((_next_node(), self._inside[-1]))

    def _module_of(self, sequence: int) -> str:
        """Returns the module whose forward pass made the autograd node of this number."""
        return next(name for begin, name in reversed(self._begun) if begin <= sequence)


def is_nonfinite(tensor: Tensor) -> bool:
    """Returns True if any element of a tensor is nonfinite."""
    return not math.isfinite(_magnitude(tensor.detach()))


def _with_memory(tree: Any) -> list[Tensor]:
    """Returns the tensors with values: second derivatives have some without, as zeros of autograd."""
    tensors = (t for t in tree_leaves(tree) if isinstance(t, Tensor))
    return [t for t in tensors if not (t.is_meta or t._is_zerotensor())]


def _next_node() -> int:
    """Returns the number that the next autograd node gets."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def _storage(tensor: Tensor) -> int:
    return _stored(tensor).untyped_storage().data_ptr()


def _covers_storage(tensor: Tensor) -> bool:
    stored = _stored(tensor)
    return stored.numel() * stored.element_size() == stored.untyped_storage().nbytes()


def _stored(tensor: Tensor) -> Tensor:
    """Returns the stored values of a sparse tensor; any other tensor unchanged."""
    return tensor._values() if tensor.layout == torch.sparse_coo else tensor


def _values(tensor: Tensor) -> Tensor:
    """Returns the stored values as real numbers."""
    stored = _stored(tensor)
    return torch.view_as_real(stored.resolve_conj()) if stored.is_complex() else stored


def _magnitude(tensor: Tensor) -> float:
    """Returns the largest magnitude: NaN if a value is NaN, 0 for integers and without values."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    values = _values(tensor.detach())
    return float(values.abs().amax()) if values.numel() else 0.0


def _has_zero(tensor: Tensor) -> bool:
    """Returns True if a value is 0, or next to it: the gradient of its logarithm may overflow."""
    values = _values(tensor.detach())
    is_zero = values.abs() < torch.finfo(values.dtype).tiny if values.is_floating_point() else values == 0
    return bool(is_zero.any())


def _largest_finite(tensor: Tensor) -> float:
    return float(_values(tensor.detach()).nan_to_num(0.0, 0.0, 0.0).abs().amax())


def _is_root(name: str, args: Sequence[Any]) -> bool:
    exponent = args[1] if len(args) > 1 and _short(name) == "pow" else 0.5
    return _short(name) in _ROOTS and type(exponent) is float and 0 < exponent < 1


def _passes_on(name: str, arguments: Sequence[Argument]) -> bool:
    """Checks that an operation only moves the intended infinities of a mask."""
    masks = [(n, a) for n, a in enumerate(arguments) if a.is_nonfinite and not a.has_nan]
    short = _short(name)
    intended = all(
        a.is_mask or (a.record.is_intended if a.record else short in _WRITES and not (a.shape or a.leaf))
        for _, a in masks
    )
    added = all(n == 0 for n, _ in masks) or "mm" not in name  # factors of a matrix product are no masks
    return bool(masks) and intended and added and short in _MOVES


def _takes_mask(name: str, position: int) -> bool:
    """Checks that an operation adds this argument to others, or subtracts it from them."""
    return _short(name) in _ADDS and (position == 0 if "mm" in name else position > 0 or "sub" not in name)


def _is_masked(factors: Sequence[Tensor]) -> bool:
    """Checks that one factor is 0 wherever the other is NaN, as a mask is that is to hide it."""
    if len(factors) != 2:
        return False
    one, other = torch.broadcast_tensors(*(f.detach() for f in factors))  # type: ignore[no-untyped-call]
    pairs = ((one.isnan(), other), (other.isnan(), one))
    return any(bool(nan.any()) and not bool(factor[nan].any()) for nan, factor in pairs)


def _short(name: str) -> str:
    return name.rpartition("::")[2].rstrip("_")


def _rows(tensor: Tensor) -> tuple[int, ...]:
    """Returns the first ten rows with nonfinite values, or with large ones; none if all rows have some."""
    if tensor.ndim == 0 or tensor.layout != torch.strided or not tensor.numel():
        return ()
    highest = _values(tensor.detach()).abs().reshape(len(tensor), -1).amax(dim=1)
    notable = ~highest.isfinite()
    notable = notable if bool(notable.any()) else highest > LARGE
    return () if bool(notable.all()) else tuple(notable.nonzero().flatten()[:10].tolist())


def _describe_nonfinite(tensor: Tensor) -> str:
    """Returns the kind of the values: `"nan"`, `"inf"` or `"-inf"`, or `"large"` if they are finite."""
    values = _values(tensor.detach())
    if bool(values.isnan().any()):
        return "nan"
    if bool(values.isfinite().all()):
        return "large"
    return "inf" if bool(values.isposinf().any()) else "-inf"
