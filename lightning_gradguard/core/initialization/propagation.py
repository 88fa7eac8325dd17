"""Measurements of activations and gradients from one batch, without a change to the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from lightning_gradguard.core.detectors.diagnosis.signals.loss_calls import adds_its_input
from lightning_gradguard.core.detectors.module_hooks import UncopiedHook
from lightning_gradguard.core.snapshots import preserve_state, preserve_weights

#: log10 of a gain of zero.
ZERO_GAIN = -45.0
#: Activations by the name of the function that computes them; the in-place forms end in `_`.
RECTIFIERS = frozenset({"relu", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "relu6", "celu"})
SATURATING = {"tanh": 0.97, "sigmoid": 0.985}
LOSSES = frozenset({"cross_entropy", "nll_loss"})
#: The loss of a constant answer to targets, of losses of products of embeddings.
_OF_CONSTANT: dict[str, Callable[[Tensor], Tensor | float]] = {
    "mse_loss": lambda target: target.var(correction=0),
    "binary_cross_entropy_with_logits": lambda target: math.log(2),
}
_FACTORS = ("mul", "rmul", "div", "truediv")
#: Calls in one pass from which on a cell counts as a loop through time.
MIN_CALLS = 4
#: Layers whose weights are checked.
WeightedLayer: TypeAlias = nn.Linear | _ConvNd
LAYERS = (nn.Linear, _ConvNd)


@dataclass
class SignalPropagation:
    """Measurements of one batch in a network.

    Args:
        loss: The loss.
        n_classes: Number of classes, if a classification loss was called that is a mean and most of the loss.
        layers: Weighted layers with a gradient, in the order of the forward pass: frozen ones have none.
        branches: The last layer of each residual branch.
        kept: Share of its input that a residual block passes on, below 1 where it is multiplied by a number.
        block_gain: Like `Layer.gain`, at the output of the first repeated block.
        variation: By how much the last layer's input differs from sample to sample, in units of its rms.
        recurrent_gains: For each recurrent module, log10 of the ratio of gradient norms at its first and its
            last input.
        recurrent_losses: The same ratio for the gradient of the loss, which also takes other paths.
        recurrent_steps: Number of steps of each of them.
        gradients: Gradient of the loss for each parameter by name; `None` where it is unused.
    """

    loss: float
    n_classes: int | None = None
    layers: list[Layer] = field(default_factory=list)
    branches: list[Layer] = field(default_factory=list)
    kept: float = 1.0
    block_gain: float | None = None
    variation: float = 1.0
    recurrent_gains: dict[str, float] = field(default_factory=dict)
    recurrent_losses: dict[str, float] = field(default_factory=dict)
    recurrent_steps: dict[str, int] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    constant: float | None = None


def propagate(module: nn.Module, run_loss: Callable[[], Tensor]) -> SignalPropagation:
    """Runs one batch through a network and measures its activations and gradients.

    Args:
        module: The network.
        run_loss: Computes the training loss of the batch with it.

    Returns:
        The measurements. Weights, gradients, buffers, modes and random numbers are unchanged.
    """
    with preserve_weights(module), preserve_state(module), torch.enable_grad(), ForwardTrace(module) as trace:
        loss = run_loss()
        is_of_classes = abs(loss.detach() - trace.class_loss) <= abs(loss.detach()) / 2
        n_classes = trace.n_classes if is_of_classes else None  # or other terms make up most of the loss
        facts = n_classes, trace.layers, trace.branches, trace.kept
        result = SignalPropagation(float(loss.detach()), *facts)
        result.constant = trace.constant if is_of_classes else None
        generator = torch.Generator().manual_seed(0)
        if trace.last_input is not None and len(trace.layers) > 1:
            hidden = trace.layers[:-1]
            outputs = [layer.output for layer in hidden]
            gains, gradients = _gains(trace.last_input, outputs, generator)
            for layer, gain, gradient in zip(hidden, gains, gradients, strict=True):
                layer.gain = gain
                if layer.dead is None and layer.activation not in SATURATING and gradient is not None:
                    layer.dead = _blocked_share(layer, gradient)
            blocks = trace.blocks if len(trace.blocks) > 2 else outputs
            (result.block_gain,), _ = _gains(trace.last_input, blocks[:1], generator)
            result.variation = _variation(trace.last_input.detach())
        for name, recurrence in trace.recurrent.items():
            outputs_over_time, time = recurrence[1:]
            result.recurrent_gains[name] = _gain_through_time(*recurrence, generator)
            result.recurrent_steps[name] = outputs_over_time.shape[time]
            of_loss = torch.autograd.grad(loss, recurrence[0], retain_graph=True, allow_unused=True)[0]
            if of_loss is not None:
                result.recurrent_losses[name] = _ends(of_loss, time)
        for name, calls in trace.cells.items():
            if len(calls) >= MIN_CALLS:
                vector = torch.randn(calls[-1].shape, generator=generator).to(calls[-1])
                (first,) = torch.autograd.grad(calls[-1], calls[:1], vector, retain_graph=True)
                result.recurrent_gains[name] = _decades(float((first.norm() / vector.norm()).double()))
                result.recurrent_steps[name] = len(calls)
                ends = torch.autograd.grad(loss, [calls[0], calls[-1]], retain_graph=True, allow_unused=True)
                if ends[0] is not None and ends[1] is not None:
                    result.recurrent_losses[name] = _ratio(*ends)
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if named and loss.requires_grad:
            found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            result.gradients = {name: g for (name, _), g in zip(named, found, strict=True)}
        for layer in result.layers:
            layer.output = layer.output.detach()
        return result


def _gains(
    source: Tensor, targets: Sequence[Tensor], generator: torch.Generator
) -> tuple[list[float | None], Sequence[Tensor | None]]:
    """Returns log10 of the rms at each target of two random unit-rms vectors, and the second, propagated."""
    found: Sequence[Tensor | None] = ()
    squares: list[float | None] = [None] * len(targets)
    for _ in range(2):
        vector = torch.randn(source.shape, generator=generator).to(source)
        found = torch.autograd.grad(source, targets, vector, retain_graph=True, allow_unused=True)
        for i, gradient in enumerate(found):
            if gradient is not None:
                squares[i] = (squares[i] or 0.0) + float(gradient.double().square().mean())
    return [None if s is None else _decades((s / 2) ** 0.5) for s in squares], found


def _variation(value: Tensor) -> float:
    """Returns the rms of what differs from the mean over samples, relative to the rms; 1 if unknown."""
    value = value.double()
    if len(value) < 2 or not bool(value.any()):
        return 1.0
    return float((value - value.mean(0)).norm() / value.norm())


def _blocked_share(layer: Layer, gradient: Tensor) -> float | None:
    """Returns the share of units that no gradient passes as all are negative, as behind `clamp(min=0)`."""
    output = layer.output.detach()
    if output.ndim < 2:
        return None
    others = layer.dims_beside_units(output)
    blocked = (output.amax(others) <= 0) & (gradient.abs().amax(others) == 0)
    return float(blocked.float().mean())


def _gain_through_time(inputs: Tensor, outputs: Tensor, time: int, generator: torch.Generator) -> float:
    last = outputs.select(time, -1)
    vector = torch.randn(last.shape, generator=generator).to(last)
    (gradient,) = torch.autograd.grad(last, inputs, vector, retain_graph=True)
    return _ends(gradient, time)


def _ends(gradient: Tensor, time: int) -> float:
    """Returns log10 of the norm at the first step over that at the last."""
    return _ratio(gradient.select(time, 0), gradient.select(time, -1))


def _ratio(first: Tensor, last: Tensor) -> float:
    return _decades(float(first.double().norm())) - _decades(float(last.double().norm()))


def _decades(value: float) -> float:
    return math.nan if math.isnan(value) else math.log10(max(value, 10**ZERO_GAIN))


@dataclass
class Layer:
    """A weighted layer, and the measurements of one batch in it.

    Args:
        name: Name in the network.
        module: The layer.
        output: Its output, attached to the graph.
        has_finite_input: False if its input is nonfinite already.
        activation: Name of the function applied before the next layer, if any.
        dead: Share of units that are zero after the activation for every sample.
        saturated: Share of outputs in the flat part of a saturating activation.
        gain: log10 of the rms of a random vector of unit rms, propagated back from the last hidden layer to
            the output of this one; `None` without a path between them.
        calls: Number of its calls in one pass.
    """

    name: str
    module: WeightedLayer
    output: Tensor
    has_finite_input: bool = True
    activation: str | None = None
    dead: float | None = None
    saturated: float | None = None
    gain: float | None = None
    calls: int = 1

    def dims_beside_units(self, output: Tensor) -> list[int]:
        """Returns the dimensions of its output, or of that of its activation, but that of the units."""
        units = -1 if isinstance(self.module, nn.Linear) else 1
        return [d for d in range(output.ndim) if d != units % output.ndim]

    @property
    def is_gate(self) -> bool:
        """True for a sigmoid in a recurrence: it may be saturated so that the state passes."""
        return self.calls > 2 and self.activation == "sigmoid"


class ForwardTrace(TorchFunctionMode):
    """Traces a forward pass: layers by hooks, activations and losses by intercepted functions."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self.branches: list[Layer] = []
        self.kept = 1.0
        self._sums: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._products: dict[int, tuple[Tensor, Tensor, float]] = {}
        self.blocks: list[Tensor] = []
        self.cells: dict[str, list[Tensor]] = {}
        self.recurrent: dict[str, tuple[Tensor, Tensor, int]] = {}
        self.last_input: Tensor | None = None
        self.n_classes: int | None = None
        self.class_loss: Tensor | float = 0.0
        self.constant: float | None = None
        self._module = module
        self._hooks = ExitStack()

    def __enter__(self) -> ForwardTrace:
        containers = (m for m in self._module.modules() if isinstance(m, (nn.Sequential, nn.ModuleList)))
        for child in (child for container in containers for child in container):
            if len(list(child.children())) > 1:
                self._on_forward(child, self._record_block)
        for name, child in self._module.named_modules():
            if isinstance(child, LAYERS):
                self._on_forward(child, self._record_layer, name.replace("_orig_mod.", ""))
            elif isinstance(child, nn.RNNCellBase):
                self._on_forward(child, self._record_call, name)
            elif isinstance(child, nn.RNNBase):
                handle = child.register_forward_pre_hook(_with_gradient_of_input)
                self._hooks.callback(handle.remove)
                self._on_forward(child, self._record_recurrent, name)
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "").strip("_")
        result = function(*args, **(kwargs or {}))
        is_mean = (kwargs or {}).get("reduction", "mean") == "mean"
        if name in LOSSES and args and is_mean:
            self.n_classes = args[0].shape[1] if args[0].ndim > 1 else None
            self.class_loss = result.detach()
        elif name in _OF_CONSTANT and not self.layers and is_mean and len(args) > 1:
            self.constant = float(_OF_CONSTANT[name](args[1].detach().double()))
            self.class_loss = result.detach()
        elif self.layers and (name in RECTIFIERS or name in SATURATING) and result.requires_grad:
            self._record_activation(self.layers[-1], name, result)
        elif self.layers and name in ("add", "radd", "iadd"):
            self._record_sum(_tensors(args), result)
        elif self.layers and name in _FACTORS and len(args) == 2:
            self._record_product(args, result, is_quotient=name in ("div", "truediv"))
        return result

    def _record_sum(self, summands: Sequence[Tensor], result: Tensor) -> None:
        known = [self._products.get(id(summand)) for summand in summands]
        originals = [s if found is None else found[1] for s, found in zip(summands, known, strict=True)]
        if adds_its_input(summands):
            self.branches.append(self.layers[-1])
        elif adds_its_input(originals):  # what passes the branch is multiplied
            self.kept = min([self.kept, *(found[2] for found in known if found is not None)])
        else:
            return
        self._sums[id(result)] = result

    def _record_product(self, args: Sequence[Any], result: Any, *, is_quotient: bool) -> None:
        tensors, numbers = _tensors(args), [abs(a) for a in args if isinstance(a, (int, float)) and a]
        if len(tensors) == len(numbers) == 1 and tensors[0].requires_grad:
            factor = 1 / numbers[0] if is_quotient else numbers[0]
            self._products[id(result)] = result, tensors[0], factor
            if self._sums.get(id(tensors[0])) is tensors[0]:
                self.kept = min(self.kept, factor)

    def _on_forward(self, module: nn.Module, record: Callable[..., None], *facts: Any) -> None:
        handle = module.register_forward_hook(UncopiedHook(lambda m, i, o: record(m, i, o, *facts)))
        self._hooks.callback(handle.remove)

    def _record_layer(self, module: WeightedLayer, inputs: Any, output: Any, name: str) -> None:
        known = next((layer for layer in self.layers if layer.module is module), None)
        if known is not None:
            known.calls += 1
        elif output.requires_grad:
            is_finite = not inputs or bool(torch.isfinite(inputs[0].detach()).all())
            self.layers.append(Layer(name, module, output, is_finite))
            self.last_input = inputs[0] if inputs and inputs[0].requires_grad else self.last_input

    def _record_block(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            self.blocks.append(output)

    def _record_call(self, module: nn.Module, inputs: Any, output: Any, name: str) -> None:
        # of an LSTM, the state that its gates keep
        output = output[-1] if isinstance(output, tuple) else output
        if output.requires_grad:
            self.cells.setdefault(name, []).append(output)

    def _record_recurrent(self, module: nn.RNNBase, inputs: Any, output: Any, name: str) -> None:
        if isinstance(inputs[0], Tensor) and inputs[0].ndim == 3 and output[0].requires_grad:
            self.recurrent[name] = (inputs[0], output[0], 1 if module.batch_first else 0)

    def _record_activation(self, layer: Layer, name: str, output: Tensor) -> None:
        if layer.activation is not None:
            return
        layer.activation = name
        output = output.detach()
        if name in SATURATING:
            centred = output if name == "tanh" else 2 * output - 1
            flat = SATURATING[name] if name == "tanh" else 2 * SATURATING[name] - 1
            layer.saturated = float((centred.abs() > flat).float().mean())
        elif name == "relu" and output.ndim > 1:
            layer.dead = float((output.amax(dim=layer.dims_beside_units(output)) <= 0).float().mean())


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]


def _with_gradient_of_input(module: nn.Module, inputs: Any) -> Any:
    first, *rest = inputs
    if isinstance(first, Tensor) and first.is_floating_point() and not first.requires_grad:
        first = first.detach().requires_grad_()
    return (first, *rest)
