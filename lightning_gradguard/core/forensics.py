"""One sick batch again, every operation watched: what made the first nonfinite value, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_leaves_with_path

from lightning_gradguard.core.norms import tensor_norms, total_norm_from_norms
from lightning_gradguard.core.probing import nothing_left_behind
from lightning_gradguard.core.sharding import local_shard

Cause = Literal[
    "bad input",
    "weights",
    "too large a step",
    "forward pass",
    "loss",
    "backward pass",
    "transient",
    "unknown",
]
#: What `Origin.cause` can be.
CAUSES: tuple[Cause, ...] = get_args(Cause)

#: A weight has *grown* if it is so many times larger than any of its tensor was when the run was well.
GROWTH = 10.0
#: What a tensor's largest element counts as at least, in that comparison: biases start at zero.
LEAST = 0.1
#: Up to so many grown elements of one tensor are a corrupted tensor; more are an update that went too far.
CORRUPTED = 2
#: Inputs this large make float32 overflow when they are squared and summed a few times.
HUGE = 1e6

_UNINITIALIZED = ("aten::empty", "aten::new_empty", "aten::resize", "aten::set_")


@dataclass(frozen=True)
class Origin:
    """Where the first nonfinite value of a step came from.

    Args:
        cause: What is at fault; `"transient"` if everything is finite the second time, as after a fault of
            the hardware; `"unknown"` if the batch could not be run again.
        phase: The pass in which the value was made; empty where nothing was made.
        module: Name of the module whose code made it; empty for code of the network's own step, outside of
            all its modules.
        operation: The torch operation, in the backward pass with the name of the autograd node.
        where: The tensors at fault: parameters, or places in the batch such as `batch[0]`.
        dtype: Of what the operation returned.
        low: Smallest finite value that the operation was given; `None` if there was none.
        high: The largest.
        detail: The same in one sentence, for people.
        rows: Of the part of the batch that is at fault, the first ten that hold nonfinite values: samples,
            where its first dimension counts them.
    """

    cause: Cause
    phase: Literal["", "forward", "backward"] = ""
    module: str = ""
    operation: str = ""
    where: tuple[str, ...] = ()
    dtype: str = ""
    low: float | None = None
    high: float | None = None
    detail: str = ""
    rows: tuple[int, ...] = ()


def investigate(
    module: nn.Module,
    run: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
    batch: Any,
    *,
    grown: Mapping[str, int] | None = None,
) -> Origin:
    """Run a batch again and say what made it go wrong.

    Every operation of the forward and of the backward pass is looked at, one by one, and waited for. From
    the nonfinite loss (or gradient) the way leads back over nonfinite values only, so that a mask of `-inf`
    that does no harm is not blamed.

    Args:
        module: The network. Buffers, modes, random numbers and plain attributes are put back.
        run: Computes with it the losses of the batch, and the gradients of its parameters.
        batch: What `run` reads, to be recognized; any nesting of tensors.
        grown: Tensors of weights or optimizer state that hold absurd values, and how many; see
            `grown_elements`.

    Returns:
        The origin; its cause is `"transient"` if losses and gradients are finite.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> def run():
        ...     loss = layer(torch.ones(1, 2)).relu().mul(0).log().sum()
        ...     return [loss], torch.autograd.grad(loss, list(layer.parameters()))
        >>> origin = investigate(layer, run, None)
        >>> origin.cause, origin.operation, origin.high
        ('loss', 'aten::log', 0.0)
    """
    parts = dict(_parts(batch))
    leaves = {**dict(_tensors(module)), **parts}
    sound = [name for name, buffer in module.named_buffers() if not _is_nonfinite(buffer)]
    with nothing_left_behind(module), torch.enable_grad(), _Trace(module, leaves) as trace:
        losses, gradients = run()
        buffers = dict(module.named_buffers())
        spoiled = [name for name in sound if name in buffers and _is_nonfinite(buffers[name])]
    grown = grown or {}
    sick = next((t for t in (*losses, *gradients) if _is_nonfinite(t)), None)
    if sick is not None:
        record = trace.record_of(sick)
        source = _origin_of(record) if record is not None else None
        return _classify(source, grown, parts, trace)
    if _total_norm_overflows(gradients):
        return _of_overflow(grown, parts)
    if spoiled:
        return origin_in_weights(grown) if grown else _of_buffers(spoiled, parts)
    return Origin("transient", detail="Run again on the same weights, the batch gives finite numbers.")


def grown_elements(named: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, int]:
    """Tensors with elements that are absurd beside what they were when the run was well.

    Args:
        named: Name, tensor now, and the tensor as it was then.

    Returns:
        For each tensor that has any: the number of elements that are nonfinite, or ten times larger than the
        largest was (which counts as 0.1 at least).

    Example:
        >>> grown_elements([("weight", torch.tensor([0.2, 1e30]), torch.tensor([0.1, 0.3]))])
        {'weight': 1}
    """
    found = {}
    for name, now, before in named:
        now = local_shard(now.detach())
        if now.is_floating_point() and now.numel():
            bound = GROWTH * max(float(before.abs().amax()), LEAST)
            # one that the type cannot hold would become infinity, and let infinity pass
            bound = min(bound, torch.finfo(now.dtype).max)
            count = int((~(now.abs() <= bound)).sum())
            if count:
                found[name] = count
    return found


def origin_in_weights(grown: Mapping[str, int]) -> Origin:
    """What has happened to weights, from the tensors that are absurd.

    Args:
        grown: At least one tensor; see `grown_elements`.

    Example:
        >>> origin_in_weights({"head.weight": 1}).cause, origin_in_weights({"head.weight": 50}).cause
        ('weights', 'too large a step')
    """
    where = tuple(sorted(grown, key=lambda name: -grown[name]))
    if sum(grown.values()) <= CORRUPTED:
        return Origin("weights", where=where, detail=f"Single elements of {where[0]} are absurd.")
    return Origin(
        "too large a step",
        where=where,
        detail=f"{sum(grown.values())} elements of {len(grown)} tensors are nonfinite or {GROWTH:g} times "
        "larger than when the run was well.",
    )


@dataclass
class _Input:
    """A nonfinite argument of an operation."""

    has_nan: bool
    record: _Record | None
    leaf: str | None


@dataclass
class _Record:
    """An operation that returned nonfinite values."""

    operation: str
    phase: Literal["forward", "backward"]
    module: str
    dtype: str
    #: `"nan"`, `"inf"` or `"-inf"`.
    made: str
    #: Calls of modules that had ended by then.
    modules_left: int
    #: Whether the values were asked for, as the `-inf` of a mask is.
    on_purpose: bool
    low: float | None
    high: float | None
    sick_inputs: list[_Input] = field(default_factory=list)

    @property
    def has_nan(self) -> bool:
        return self.made == "nan"


class _Trace(TorchDispatchMode):
    """Follows nonfinite values from operation to operation, through the forward and the backward pass."""

    def __init__(self, module: nn.Module, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loss_modules: set[str] = set()
        self.modules_left = 0
        self._module = module
        self._leaves = leaves
        self._records: dict[int, _Record] = {}
        self._kept: list[Tensor] = []  # memory that is let go could come back under the same address
        self._inside: list[str] = [""]
        self._begun: list[tuple[int, str]] = [(-1, "")]
        self._hooks = ExitStack()

    def __enter__(self) -> _Trace:
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
        # an operation in place overwrites what it was given; batch normalization too, without saying so
        overwrites = function._schema.is_mutable or "batch_norm" in name
        # the target of a copy is not read: it may be memory that holds whatever was there
        read = inputs[1:] if name == "aten::copy_" else inputs
        before = self._look_at(read) if overwrites else None
        result = function(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        known = set() if overwrites else {_storage(t) for t in inputs}
        made = [t for t in outputs if _storage(t) not in known]
        if not name.startswith(_UNINITIALIZED) and any(map(_is_nonfinite, made)):
            sick, low, high = before or self._look_at(inputs)
            node = torch._C._current_autograd_node()
            record = _Record(
                operation=name if node is None else f"{name} in {node.name()}",
                phase="forward" if node is None else "backward",
                module=self._inside[-1] if node is None else self._module_of(node._sequence_nr()),
                dtype=str(made[0].dtype).removeprefix("torch."),
                made=_what_is_sick(made),
                modules_left=self.modules_left,
                on_purpose=not inputs or _names_nonfinite(args, kwargs),
                low=low,
                high=high,
                sick_inputs=sick,
            )
            for tensor in made:
                self._records[_storage(tensor)] = record
                self._kept.append(tensor)
        return result

    def record_of(self, tensor: Tensor) -> _Record | None:
        """The operation that wrote a tensor."""
        return self._records.get(_storage(tensor))

    def _look_at(self, inputs: Sequence[Tensor]) -> tuple[list[_Input], float | None, float | None]:
        floating = [t.detach() for t in inputs if t.is_floating_point() and t.numel()]
        sick = [
            _Input(
                bool(_values(t).isnan().any()),
                record := self.record_of(t),
                None if record else self._leaf_of(t),
            )
            for t in floating
            if _is_nonfinite(t)
        ]
        finite = [numbers for v in map(_values, floating) if (numbers := v[v.isfinite()]).numel()]
        if not finite:
            return sick, None, None
        return sick, min(float(t.min()) for t in finite), max(float(t.max()) for t in finite)

    def _leaf_of(self, tensor: Tensor) -> str | None:
        """The parameter, buffer or part of the batch that a nonfinite tensor is a view of."""
        same = (n for n, leaf in self._leaves.items() if _storage(leaf) == _storage(tensor))
        return next((name for name in same if _is_nonfinite(self._leaves[name])), None)

    def _enter_module(self, name: str) -> None:
        self._inside.append(name)
        self._begun.append((_next_sequence(), name))

    def _leave_module(self) -> None:
        self._inside.pop()
        self.modules_left += 1
        self._begun.append((_next_sequence(), self._inside[-1]))

    def _module_of(self, sequence: int) -> str:
        """The module whose forward pass made the autograd node of this number."""
        return next(name for begin, name in reversed(self._begun) if begin <= sequence)


def _origin_of(record: _Record) -> _Record | str:
    """Back along nonfinite values to the operation, or the tensor, that they began with."""
    while True:
        sick = record.sick_inputs
        nan = [s for s in sick if s.has_nan]
        if record.has_nan and not nan:
            # NaN was born here, perhaps of an infinity that nobody asked for
            sick = [s for s in sick if s.leaf or (s.record and not s.record.on_purpose)]
        first = next(iter(nan or sick), None)
        if first is None:
            return record
        if first.leaf is not None:
            return first.leaf
        if first.record is None:
            return record
        record = first.record


def _classify(
    source: _Record | str | None, grown: Mapping[str, int], parts: Mapping[str, Tensor], trace: _Trace
) -> Origin:
    if isinstance(source, str):
        if source in parts:
            rows = _nonfinite_rows(parts[source])
            place = f" in row {', '.join(map(str, rows))}" if rows else ""
            detail = f"{source} holds nonfinite values{place}."
            return Origin("bad input", where=(source,), rows=rows, detail=detail)
        grown = grown or {source: 1}
    if grown:
        return origin_in_weights(grown)
    if source is None or isinstance(source, str):
        return Origin("unknown", detail="No watched operation made the nonfinite value.")
    place = f"module `{source.module}`" if source.module else "the step's own code"
    given = "" if source.low is None else f" given {source.low:.4g} to {source.high:.4g}"
    sentence = f"{source.operation} in {place}{given} returned {source.made}"
    is_ahead_of_modules = trace.modules_left > 0 == source.modules_left
    cause: Cause = "forward pass" if source.module or is_ahead_of_modules else "loss"
    where: tuple[str, ...] = (source.module,) if source.module else ()
    huge = _huge(parts)
    if source.phase == "backward":
        cause = "backward pass"
    elif source.module in trace.loss_modules:
        cause = "loss"
    given_most = max(abs(source.low or 0.0), abs(source.high or 0.0))
    if huge and (cause != "loss" or given_most > HUGE):
        cause, where = "bad input", tuple(huge)
        sentence += f"; {where[0]} holds values up to {huge[where[0]]:.4g}"
    return Origin(
        cause,
        source.phase,
        source.module,
        source.operation,
        where,
        dtype=source.dtype,
        low=source.low,
        high=source.high,
        detail=f"{sentence} ({source.dtype}).",
    )


def _of_overflow(grown: Mapping[str, int], parts: Mapping[str, Tensor]) -> Origin:
    if grown:
        return origin_in_weights(grown)
    detail = "Every gradient is finite, but their norm overflows float32"
    if huge := _huge(parts):
        name, high = next(iter(huge.items()))
        detail = f"{detail}: {name} holds values up to {high:.4g}."
        return Origin("bad input", "backward", where=tuple(huge), detail=detail)
    return Origin("backward pass", "backward", detail=f"{detail}.")


def _of_buffers(spoiled: Sequence[str], parts: Mapping[str, Tensor]) -> Origin:
    names = tuple(name.replace("_orig_mod.", "") for name in spoiled)
    owner = names[0].rpartition(".")[0]
    detail = f"Loss and gradients are finite, but the forward pass left nonfinite values in {names[0]}"
    if huge := _huge(parts):
        name, high = next(iter(huge.items()))
        detail = f"{detail}: {name} holds values up to {high:.4g}."
        return Origin("bad input", "forward", owner, where=tuple(huge), detail=detail)
    return Origin("forward pass", "forward", owner, where=names, detail=f"{detail}.")


def _parts(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the batch, by their places in it."""
    for path, leaf in tree_leaves_with_path(batch):
        if isinstance(leaf, Tensor):
            yield "batch" + "".join(map(str, path)), leaf


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers and weights, by their names."""
    for name, tensor in (*module.named_buffers(), *module.named_parameters()):
        yield name.replace("_orig_mod.", ""), tensor


def _huge(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Parts of the batch with values large enough to overflow on their way, the largest first."""
    floating = {name: part for name, part in parts.items() if part.is_floating_point() and part.numel()}
    highest = ((name, float(part.detach().abs().amax())) for name, part in floating.items())
    return dict(sorted(((n, high) for n, high in highest if high > HUGE), key=lambda item: -item[1]))


def _next_sequence() -> int:
    """The number of the next autograd node."""
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]


def _storage(tensor: Tensor) -> int:
    return _values(tensor).untyped_storage().data_ptr()


def _is_nonfinite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(_values(tensor.detach()).isfinite().all())


def _values(tensor: Tensor) -> Tensor:
    """The numbers of a sparse gradient."""
    return tensor._values() if tensor.layout == torch.sparse_coo else tensor


def _what_is_sick(tensors: Sequence[Tensor]) -> str:
    floating = [_values(t.detach()) for t in tensors if t.is_floating_point()]
    if any(bool(t.isnan().any()) for t in floating):
        return "nan"
    return "inf" if any(bool(t.isposinf().any()) for t in floating) else "-inf"


def _nonfinite_rows(tensor: Tensor) -> tuple[int, ...]:
    """The first ten places along the first dimension; none for a scalar, or what has no dense numbers."""
    if tensor.ndim == 0 or tensor.layout != torch.strided:
        return ()
    sick = (~tensor.detach().isfinite()).reshape(len(tensor), -1).any(dim=1)
    return tuple(sick.nonzero().flatten()[:10].tolist())


def _names_nonfinite(*arguments: Any) -> bool:
    numbers = [n for n in tree_leaves(arguments) if isinstance(n, float)]
    return any(not torch.isfinite(torch.tensor(n)) for n in numbers)


def _total_norm_overflows(gradients: Sequence[Tensor]) -> bool:
    # measured as a step is, in which squares that overflow float32 count as a norm that does
    total = total_norm_from_norms(tensor_norms([g.detach() for g in gradients]))
    return float(total) > torch.finfo(torch.float32).max
