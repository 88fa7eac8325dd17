"""A record of every operation of a forward and backward pass that returns nonfinite values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_UNINITIALIZED = ("aten::empty", "aten::new_empty", "aten::resize", "aten::set_")


@dataclass
class _Input:
    """A nonfinite argument of an operation."""

    has_nan: bool
    record: OperationRecord | None
    leaf: str | None


@dataclass
class OperationRecord:
    """An operation that returned nonfinite values."""

    operation: str
    phase: Literal["forward", "backward"]
    module: str
    dtype: str
    #: `"nan"`, `"inf"` or `"-inf"`.
    made: str
    #: Number of module calls that had returned before.
    modules_left: int
    #: True if the values are intended, as the `-inf` of a mask.
    is_intended: bool
    low: float | None
    high: float | None
    nonfinite_inputs: list[_Input] = field(default_factory=list)


class OperationTrace(TorchDispatchMode):
    """Traces nonfinite values from operation to operation, in the forward and the backward pass."""

    def __init__(self, module: nn.Module, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loss_modules: set[str] = set()
        self.modules_left = 0
        self._module = module
        self._leaves = leaves
        self._records: dict[int, OperationRecord] = {}
        self._kept: list[Tensor] = []  # freed memory could be reused under the same address
        self._inside: list[str] = [""]
        #: The number of the next autograd node at each change of the module, and the module.
        self._begun: list[tuple[int, str]] = [(-1, "")]
        self._hooks = ExitStack()

    def __enter__(self) -> OperationTrace:
        for name, child in self._module.named_modules():
            name = name.replace("_orig_mod.", "")
            if isinstance(child, _Loss):
                self.loss_modules.add(name)
            for handle in (
                child.register_forward_pre_hook(lambda m, i, name=name: self._enter_module(name)),
                child.register_forward_hook(lambda m, i, o: self._leave_module(), always_call=True),
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
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # an in-place operation overwrites its inputs; batch normalization too, against its schema
        overwrites = function._schema.is_mutable or "batch_norm" in name
        # the target of a copy is not read: it may be uninitialized memory
        read = inputs[1:] if name == "aten::copy_" else inputs
        before = self._inspect(read) if overwrites else None
        result = function(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        known = set() if overwrites else {_storage(t) for t in inputs}
        made = [t for t in outputs if _storage(t) not in known]
        if not name.startswith(_UNINITIALIZED) and any(map(is_nonfinite, made)):
            nonfinite, low, high = before or self._inspect(inputs)
            node = torch._C._current_autograd_node()
            record = OperationRecord(
                operation=name if node is None else f"{name} in {node.name()}",
                phase="forward" if node is None else "backward",
                module=self._inside[-1] if node is None else self._module_of(node._sequence_nr()),
                dtype=str(made[0].dtype).removeprefix("torch."),
                made=_describe_nonfinite(made),
                modules_left=self.modules_left,
                is_intended=not inputs or _has_nonfinite_number(args, kwargs),
                low=low,
                high=high,
                nonfinite_inputs=nonfinite,
            )
            for tensor in made:
                self._records[_storage(tensor)] = record
                self._kept.append(tensor)
        return result

    def record_of(self, tensor: Tensor) -> OperationRecord | None:
        """Returns the operation that wrote a tensor; `None` if none was recorded."""
        return self._records.get(_storage(tensor))

    def _inspect(self, inputs: Sequence[Tensor]) -> tuple[list[_Input], float | None, float | None]:
        """Returns the nonfinite inputs, and the smallest and largest of the finite values."""
        floating = [t.detach() for t in inputs if t.is_floating_point() and t.numel()]
        nonfinite = [
            _Input(
                bool(_values(t).isnan().any()),
                record := self.record_of(t),
                None if record else self._leaf_of(t),
            )
            for t in floating
            if is_nonfinite(t)
        ]
        finite = [numbers for v in map(_values, floating) if (numbers := v[v.isfinite()]).numel()]
        if not finite:
            return nonfinite, None, None
        return nonfinite, min(float(t.min()) for t in finite), max(float(t.max()) for t in finite)

    def _leaf_of(self, tensor: Tensor) -> str | None:
        """Returns the parameter, buffer or part of the batch that a nonfinite tensor is a view of."""
        same = (n for n, leaf in self._leaves.items() if _storage(leaf) == _storage(tensor))
        return next((name for name in same if is_nonfinite(self._leaves[name])), None)

    def _enter_module(self, name: str) -> None:
        self._inside.append(name)
        self._begun.append((torch.autograd._get_sequence_nr(), name))  # type: ignore[attr-defined]

    def _leave_module(self) -> None:
        self.modules_left += 1
        self._inside.pop()
        self._begun.append((torch.autograd._get_sequence_nr(), self._inside[-1]))  # type: ignore[attr-defined]

    def _module_of(self, sequence: int) -> str:
        """Returns the module whose forward pass made the autograd node of this number."""
        return next(name for begin, name in reversed(self._begun) if begin <= sequence)


def first_nonfinite(record: OperationRecord) -> OperationRecord | str:
    """Follows nonfinite values back to the operation, or the name of the tensor, that they began with."""
    while True:
        nonfinite = record.nonfinite_inputs
        nan = [i for i in nonfinite if i.has_nan]
        if record.made == "nan" and not nan:
            # NaN was made here, perhaps of an infinity that was not intended
            nonfinite = [i for i in nonfinite if i.leaf or (i.record and not i.record.is_intended)]
        first = next(iter(nan or nonfinite), None)
        if first is None:
            return record
        if first.leaf is not None:
            return first.leaf
        if first.record is None:
            return record
        record = first.record


def _storage(tensor: Tensor) -> int:
    return _values(tensor).untyped_storage().data_ptr()


def is_nonfinite(tensor: Tensor) -> bool:
    """Returns True if any element of a tensor is nonfinite."""
    return tensor.is_floating_point() and not bool(_values(tensor.detach()).isfinite().all())


def _values(tensor: Tensor) -> Tensor:
    """Returns the stored values of a sparse tensor; any other tensor unchanged."""
    return tensor._values() if tensor.layout == torch.sparse_coo else tensor


def _has_nonfinite_number(*arguments: Any) -> bool:
    numbers = [n for n in tree_leaves(arguments) if isinstance(n, float)]
    return any(not torch.isfinite(torch.tensor(n)) for n in numbers)


def _describe_nonfinite(tensors: Sequence[Tensor]) -> str:
    """Returns the kind of the nonfinite values: `"nan"`, `"inf"` or `"-inf"`."""
    floating = [_values(t.detach()) for t in tensors if t.is_floating_point()]
    if any(bool(t.isnan().any()) for t in floating):
        return "nan"
    return "inf" if any(bool(t.isposinf().any()) for t in floating) else "-inf"
