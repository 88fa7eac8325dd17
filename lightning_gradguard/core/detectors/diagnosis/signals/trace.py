"""Traces one sampled step: outputs and gradients of layers, activations, losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_gradguard.core.detectors.diagnosis.sample import (
    MIN_TIMES,
    Sample,
    TimeSignal,
    UnitSignal,
)
from lightning_gradguard.core.detectors.diagnosis.signals import attention, loss_calls, recurrences, units
from lightning_gradguard.core.detectors.diagnosis.signals.batch_data import BatchData
from lightning_gradguard.core.detectors.diagnosis.signals.dimensions import Dimensions
from lightning_gradguard.core.detectors.diagnosis.signals.loss_baseline import LossBaselines
from lightning_gradguard.core.detectors.diagnosis.signals.loss_trace import LossTrace
from lightning_gradguard.core.detectors.diagnosis.signals.matrices import (
    PRODUCTS,
    BareMatrices,
    is_layer,
    own_matrices,
)
from lightning_gradguard.core.detectors.diagnosis.signals.records import LayerRecord, UnitRecord
from lightning_gradguard.core.detectors.diagnosis.signals.scalars import (
    MIN_COLUMNS,
    MIN_ROWS,
    DeviceScalars,
    column_scales,
    is_measurable,
    spread_over_rows,
)
from lightning_gradguard.core.detectors.module_hooks import UncopiedHook
from lightning_gradguard.core.forensics.inputs import parts_of
from lightning_gradguard.core.norms import local_shard
from lightning_gradguard.core.parameter_names import plain_name

#: Calls of layers that are recorded; a long recurrence has more.
MAX_CALLS = 2048


class StepTrace(TorchFunctionMode):
    """Traces the training step within its context, and the backward pass after it.

    It writes nothing: hooks read outputs and gradients, and the mode calls each function unchanged. What it
    cannot measure it leaves out. Call `close` after the backward pass.

    Args:
        module: The module that is trained.
        batch: The batch of the step, by which targets are recognized.
        baselines: Sums over the targets, to which those of this step are added.
    """

    def __init__(self, module: nn.Module, batch: Any, baselines: LossBaselines) -> None:
        super().__init__()
        self._module = module
        self._scalars = DeviceScalars()
        self._layers: dict[str, LayerRecord] = {}
        self._units: list[UnitRecord] = []
        self._times: dict[str, tuple[int, ...]] = {}
        self.losses = LossTrace(self._scalars, baselines)
        self._one_signed: dict[str, int] = {}
        self._answer: Tensor | None = None
        self._spread: int | None = None
        self._has_residuals = False
        self._last, self._n_calls, self._is_open = "", 0, True
        self._gradients: list[int] = []
        self._blocked = units.UnitGradients()
        self._dead = units.DeadShares()
        self._first_share: int | None = None
        self._modules: list[str] = []
        self._attention: list[str] = []
        self._sigmoids: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._of_sigmoid: dict[int, UnitRecord] = {}
        self._hooks = ExitStack()
        self._bare = BareMatrices(module)
        parts = parts_of(batch)
        self._data = BatchData(parts.values())
        self._dimensions = Dimensions(self._scalars, list(parts.values()), self._data)
        self._used: set[int] = set()
        inputs = [name for name, part in parts.items() if is_measurable(part)]
        self._input_name = max(inputs, key=lambda name: parts[name].numel(), default="")
        self._largest = parts.get(self._input_name)
        self._input: int | None = None
        self._columns: list[int] | None = None

    @property
    def unregistered(self) -> dict[str, nn.Parameter]:
        """Parameters that take part in the step and that no module has registered, by name."""
        return self._bare.unregistered

    @property
    def layers(self) -> list[str]:
        """Names of the layers in the order of their first calls."""
        return list(self._layers)

    def __enter__(self) -> StepTrace:
        for name, child in self._module.named_modules():
            if child is self._module or isinstance(child, torch.jit.ScriptModule):
                continue
            name = plain_name(name)
            if isinstance(child, nn.RNNBase):
                self._hook(child.register_forward_pre_hook, partial(self._before_recurrence, name))
            if isinstance(child, nn.MultiheadAttention):
                self._hook(
                    child.register_forward_pre_hook, lambda *_, name=name: self._attention.append(name)
                )
                self._hook(child.register_forward_hook, lambda *_: self._attention.clear())
            if is_layer(child):
                self._hook(child.register_forward_hook, partial(self._after_layer, name))
            elif not child._modules and any(True for _ in own_matrices(child)):
                self._hook(child.register_forward_hook, partial(self._after_own_layer, name))
            elif not child._modules:
                self._hook(child.register_forward_pre_hook, lambda *_, name=name: self._modules.append(name))
                self._hook(child.register_forward_hook, lambda *_: self._modules.clear())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()
        answer, self._answer = self._answer, None
        n_rows = len(answer) if answer is not None and answer.ndim else 0
        if answer is not None and n_rows >= MIN_ROWS and answer[0].numel() >= MIN_COLUMNS:
            with _silent():
                self._spread = self._scalars.add(spread_over_rows(local_shard(answer)))

    def uses(self, tensor: Tensor) -> bool:
        """True if a function was called with a tensor of the batch."""
        return id(tensor) in self._used

    def close(self, device: torch.device) -> Tensor:
        """Stops recording, and returns all numbers, shape `(n,)`, on the device."""
        self._is_open = False
        self.losses.close()
        self._hooks.close()
        with _silent(), torch.no_grad():
            if self._largest is not None:
                self._measure_input(self._largest)
                self._largest = None
            parts = [self._dead.values(device)] if len(self._dead) else []
            if len(self._blocked):
                # gradients arrive from the loss on: a layer is compared with those between
                largest = self._scalars.largest_so_far(self._gradients).to(device)
                parts += self._blocked.blocked_shares(largest).unbind()
            self._first_share = self._scalars.add_last(torch.cat(parts)) if parts else None
        return self._scalars.stacked(device)

    def sample(self, step: int, host: Sequence[float]) -> Sample:
        """Returns the signals of the step, from its numbers on the host."""
        numbers = self._scalars
        numbers.read(host)
        layers = [layer.signal(numbers, is_last=layer.name == self._last) for layer in self._layers.values()]
        found = [
            u.signal(numbers, self._share(u.dead), is_head=u.after == self._n_calls) for u in self._units
        ]
        for layer in self._layers.values():
            if layer.blocked is not None and layer.activation not in units.SATURATING:
                first = len(self._dead) + layer.blocked
                dead, saturated = (numbers[self._share(first + i)] for i in (0, len(self._blocked)))
                found.append(UnitSignal(layer.name, "", "", dead, saturated, layer.name == self._last))
        times = [
            TimeSignal(name, numbers[first], numbers[last], numbers[largest], n_times, numbers[padded])
            for name, (first, last, largest, padded, n_times) in self._times.items()
        ]
        # cells of a recurrence; gradients arrive last step first
        by_call = [(x.name, recurrences.of_used_calls(x.gradients)) for x in layers]
        called = [(name, back) for name, back in by_call if len(back) >= MIN_TIMES]
        times += [TimeSignal(name, back[-1], back[0], max(back), len(back)) for name, back in called]
        return Sample(
            step,
            layers=layers,
            units=found,
            times=times,
            calls=self.losses.signals(),
            mistakes=self._dimensions.mistakes(self._n_calls),
            input_rms=numbers[self._input],
            input_name=self._input_name,
            columns=None if self._columns is None else tuple(numbers[i] for i in self._columns),
            one_signed=numbers[self._one_signed.get(self._last)] == 1,
            spread=numbers[self._spread],
            meets_data=self._data.is_met,
            has_residuals=self._has_residuals,
            divergence=self.losses.divergence(),
        )

    def _measure_input(self, tensor: Tensor) -> None:
        """Measures what a layer gets of the largest tensor of the batch: the network may standardize it."""
        if self._input is None and self._largest is not None and tensor.numel() == self._largest.numel():
            self._input = self._scalars.add_rms(tensor)
            columns = column_scales(tensor)
            self._columns = None if columns is None else [self._scalars.add(number) for number in columns]

    def _share(self, index: int | None) -> int | None:
        return None if index is None or self._first_share is None else self._first_share + index

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            return result  # a graph break here would leave the user's function uncompiled from then on
        if self._records():
            with _silent():
                self._record(getattr(function, "__name__", ""), function, args, kwargs or {}, result)
        return result

    def _records(self) -> bool:
        return (
            self._is_open
            and torch._C._current_graph_task_id() == -1  # a checkpoint computes again within backward
            and torch._C._functorch.maybe_current_level() is None
        )

    def _record(
        self, name: str, function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any
    ) -> None:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._used.update(map(id, given))
        plain = name.strip("_")
        if isinstance(result, Tensor):
            self._data.add_call(plain, given, result)
        if name in loss_calls.LOSSES:
            answer, target, options = loss_calls.arguments_of(function, args, kwargs)
            self.losses.add(name, answer, target, options, result, is_data=target in self._data)
            return
        if name in attention.FUNCTIONS:
            self._record_attention(name, attention.arguments_of(function, args, kwargs), result)
        if not isinstance(result, Tensor):
            return
        self.losses.add_latent(plain, result)
        place = self._modules[-1] if self._modules else self._last
        self._dimensions.add_call(plain, args, kwargs, result, place, self._n_calls)
        if plain == "hardtanh" and units.is_rectifier(function, args, kwargs):
            plain = "relu6"
        if plain in PRODUCTS and (layer := self._bare.name_of(given)):
            self._add_call(layer, result, 1 - result.ndim if plain.startswith("conv") else -1)
        elif plain in units.ACTIVATIONS:
            self._record_units(plain, result)
        elif plain in ("sub", "rsub", "subtract") and self._n_calls:
            self.losses.add_difference(args, self._data)
        elif plain in ("mul", "rmul", "multiply"):
            self._record_gate(given)
        elif plain in ("add", "radd", "iadd") and not self._has_residuals:
            self._has_residuals = self._n_calls <= loss_calls.MAX_SEARCHED and loss_calls.adds_its_input(
                given
            )

    def _record_attention(self, name: str, arguments: dict[str, Any], result: Any) -> None:
        where = self._attention[-1] if self._attention else self._last
        self._dimensions.add_attention(name, arguments, where)
        if where and _tensors(result)[0].requires_grad:
            share = attention.saturated_rows(name, arguments, _tensors(result)[0])
            kind = "attention" if _tensors(result)[0].ndim > 2 else "softmax"
            self._add_saturated(where, kind, share, after=self._n_calls)

    def _record_units(self, name: str, output: Tensor) -> None:
        layer = self._layers.get(self._last)
        if layer is None or not is_measurable(output) or len(self._units) >= MAX_CALLS:
            return
        layer.activation = layer.activation or name
        dim = layer.units if output.ndim > -layer.units else -1
        dead = saturated = outputs = None
        smooth = name in units.SMOOTH_RECTIFIERS
        if smooth or name in units.RECTIFIERS:
            found = units.heights(output.detach(), dim, smooth=smooth)
            dead = None if found is None else self._dead.add(*found)
        if name in units.SATURATING:
            is_gate = layer.calls > 2 and name.endswith("sigmoid")
            shares = units.saturated_shares(output.detach(), dim, name, is_gate=is_gate)
            if shares is not None:
                saturated, outputs = map(self._scalars.add, shares)
        if dead is not None or saturated is not None:
            module = self._modules[-1] if self._modules else ""
            place = layer.name, module, name
            self._units.append(UnitRecord(*place, dead, saturated, self._n_calls, outputs))
            if saturated is not None and name.endswith("sigmoid"):
                self._sigmoids[id(output)], self._of_sigmoid[id(output)] = output, self._units[-1]

    def _record_gate(self, factors: Sequence[Tensor]) -> None:
        """Examines sigmoids again, as gates, that something is multiplied by."""
        for factor in factors:
            if self._sigmoids.get(id(factor)) is factor:
                units_of = self._of_sigmoid[id(factor)]
                shares = units.saturated_shares(
                    factor.detach(), self._layers[units_of.layer].units, units_of.function, is_gate=True
                )
                if shares is not None:
                    units_of.saturated, units_of.outputs = map(self._scalars.add, shares)
                del self._sigmoids[id(factor)]

    def _after_layer(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._records():
            return
        with _silent(), torch._C.DisableTorchFunction():
            given = next((leaf for leaf in _tensors(inputs) if is_measurable(leaf)), None)
            if given is not None and not self._data.is_made(given):
                self._measure_input(given)
            if (tensor := next((leaf for leaf in _tensors(output) if is_measurable(leaf)), None)) is None:
                return
            layer = self._add_call(name, tensor, 1 - tensor.ndim if isinstance(module, _ConvNd) else -1)
            if layer is None:
                return
            layer.is_lookup = given is None and bool(_tensors(inputs))
            if isinstance(module, nn.RNNBase) and module.mode == "RNN_TANH":
                shares = units.saturated_shares(tensor.detach(), -1, "tanh")
                self._add_saturated(name, "tanh", None if shares is None else shares[0])
            # of the calls of a cell, the first, the second, the fourth, ...
            elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and layer.calls.bit_count() == 1:
                for kind, share in recurrences.saturated_gates(module, _tensors(inputs), tensor):
                    self._add_saturated(name, kind, share)

    def _after_own_layer(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Records a layer that is written by hand, unless the functions that it calls were recorded."""
        if not self._bare.has_seen(module):
            self._after_layer(name, module, inputs, output)

    def _add_call(self, name: str, output: Tensor, units_dim: int) -> LayerRecord | None:
        if self._n_calls >= MAX_CALLS or not is_measurable(output):
            return None
        layer = self._layers.get(name)
        if layer is None:
            layer = self._layers[name] = LayerRecord(name, units_dim, self._scalars.add_rms(output))
        layer.calls += 1
        self._last = name
        self._n_calls += 1
        if output.requires_grad:
            layer.n_attached += 1
            self._answer = output
            extremes = units.extremes(output.detach(), layer.units) if layer.calls == 1 else None
            output.register_hook(partial(self._on_gradient, layer, extremes))  # type: ignore[no-untyped-call]
        return layer

    def _add_saturated(self, name: str, kind: str, share: Tensor | None, after: int = -1) -> None:
        if share is not None and len(self._units) < MAX_CALLS:
            self._units.append(UnitRecord(name, name, kind, None, self._scalars.add(share), after))

    def _on_gradient(
        self, layer: LayerRecord, extremes: tuple[Tensor, Tensor] | None, gradient: Tensor
    ) -> None:
        if not self._is_open:
            return
        with _silent(), torch._C.DisableTorchFunction(), torch.no_grad():
            index = self._scalars.add_rms(gradient)
            self._gradients.append(index)
            layer.gradients.append(index)
            if extremes is not None:
                arrived = len(self._gradients) - 1
                layer.blocked = self._blocked.add(gradient, layer.units, *extremes, arrived)
            if layer.name == self._last:
                self._one_signed[layer.name] = self._scalars.add(loss_calls.is_one_signed(gradient))

    def _before_recurrence(self, name: str, module: nn.RNNBase, inputs: Any) -> Any:
        """Has the gradient at the module's input recorded, by a view of it."""
        if self._records() and torch.is_grad_enabled():
            with _silent(), torch._C.DisableTorchFunction():
                if not module.batch_first:
                    self._dimensions.add_sequence(name, inputs[0])
                padded = self._scalars.add(recurrences.padded_share(module, inputs[0]))
                record = partial(self._on_gradient_through_time, name, padded)
                return recurrences.with_watched_input(module, inputs, record)
        return None

    def _on_gradient_through_time(
        self, name: str, padded: int, dim: int, sizes: list[int] | None, gradient: Tensor
    ) -> None:
        if self._is_open and name not in self._times:
            with _silent(), torch._C.DisableTorchFunction(), torch.no_grad():
                norms = map(self._scalars.add, recurrences.through_time(gradient, dim, sizes))
                self._times[name] = *norms, padded, gradient.shape[dim] if sizes is None else len(sizes)

    def _hook(self, register: Callable[[UncopiedHook], RemovableHandle], hook: Callable[..., Any]) -> None:
        self._hooks.callback(register(UncopiedHook(hook)).remove)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@contextmanager
def _silent() -> Iterator[None]:
    """Leaves a signal out where it cannot be measured: a diagnosis never stops the run."""
    with suppress(Exception):
        yield
