"""Changes to a network that are tried as cures: initializers, scaling, changes of architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradguard.core.detectors.module_hooks import UncopiedHook
from lightning_gradguard.core.initialization.findings import Finding, one_line
from lightning_gradguard.core.initialization.propagation import RECTIFIERS, SATURATING, Layer
from lightning_gradguard.core.initialization.repair import holds_default_initialization, repair
from lightning_gradguard.core.parameter_names import code_of
from lightning_gradguard.core.remedies.gates import gate_lines, gated_code
from lightning_gradguard.core.snapshots import preserve_state, preserve_weights

#: Standard deviation of embeddings from which on they are about that of their default.
WIDE = 0.5


def feed_forward_line(module: nn.Module, layer: Layer, *, bias: bool = False) -> str:
    """Returns the line that initializes a linear or convolutional layer for the activation after it.

    References:
        He, Zhang, Ren, Sun, Delving Deep into Rectifiers, 2015, arXiv:1502.01852. Glorot, Bengio,
        Understanding the difficulty of training deep feedforward neural networks, 2010.
    """
    target = code_of(layer.name, module)
    line = _initializer(f"{target}.weight", layer.activation)
    return f"{line}; nn.init.zeros_({target}.bias)" if bias and layer.module.bias is not None else line


def zero_line(module: nn.Module, layer: Layer) -> str:
    """Returns the line that begins with a residual branch of zero, of which a layer is the last.

    References:
        Zhang, Dauphin, Ma, Fixup Initialization: Residual Learning Without Normalization, 2019,
        arXiv:1901.09321.
    """
    target = code_of(layer.name, module)
    line = f"nn.init.zeros_({target}.weight)"
    return line if layer.module.bias is None else f"{line}; nn.init.zeros_({target}.bias)"


def embedding_lines(module: nn.Module) -> dict[str, str]:
    """Returns lines that scale embeddings of std 1 so that a product of two is no larger than an element.

    What is zero stays so, as the row of `padding_idx`.
    """
    found = {name: m for name, m in module.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    return {
        name: f"{code_of(name, module)}.weight.data.mul_({m.embedding_dim**-0.5:.2g})"
        for name, m in found.items()
        if m.embedding_dim > 1 and float(m.weight.detach().float().std()) > WIDE
    }


def smaller_lines(module: nn.Module, findings: Sequence[Finding]) -> dict[str, str]:
    """Returns lines that divide weights by the gain of their layer, where each amplifies the gradient.

    So it is before activations that are steep, as sin(30 x) is: outputs of unit variance are too large there.
    """
    return {
        f.module: f"{code_of(f.module, module)}.weight.data.mul_({10**-f.value:.1g})"
        for f in findings
        if f.criterion == "layer_gain" and f.value > 0
    }


def _initializer(weight: str, activation: str | None) -> str:
    if activation in RECTIFIERS:
        return f"nn.init.kaiming_normal_({weight}, nonlinearity='relu')"
    if activation == "tanh":
        return f"nn.init.xavier_normal_({weight}, gain=nn.init.calculate_gain('tanh'))"
    return f"nn.init.xavier_normal_({weight})"


def recurrent_lines(
    module: nn.Module, name: str, recurrent: nn.RNNBase | nn.RNNCellBase, n_steps: int
) -> Iterator[str]:
    """Yields lines that initialize a recurrent module, one after the other if the first do not better it.

    Of gated modules the biases of gates, then orthogonal recurrent weights; else these in three sizes.

    References:
        Le, Jaitly, Hinton, A Simple Way to Initialize Recurrent Networks of Rectified Linear Units, 2015,
        arXiv:1504.00941.
    """
    target = code_of(name, module)
    weights = [n for n, _ in recurrent.named_parameters() if n.startswith("weight_hh")]
    gains = [""]
    if type(recurrent) in (nn.RNN, nn.RNNCell):
        gains += [", gain=1.1", ", gain=1.2"]
    elif recurrent.bias:
        yield "; ".join(gate_lines(target, recurrent, n_steps))
    for gain in gains:
        yield "; ".join(f"nn.init.orthogonal_({target}.{n}{gain})" for n in weights)


class Trial(Protocol):
    """A change to a network that may better a finding."""

    def applied(self) -> AbstractContextManager[None]:
        """Makes the change, for as long as the context lasts where it is not one of weights."""

    def describe(self, finding: Finding, change: str) -> str:
        """Returns the change as code, or in words, and what it changed in the finding."""


@dataclass(frozen=True)
class Initializers:
    """Lines of code by module."""

    module: nn.Module
    lines: dict[str, str]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Runs the lines as they are printed."""
        for line in self.lines.values():
            exec(line, {"nn": nn, "torch": torch, "model": self.module})
        yield

    def describe(self, finding: Finding, change: str) -> str:
        """Returns the line of a module; for the whole network, all of them as one."""
        if finding.module in self.lines:
            return self.lines[finding.module]
        return f"{one_line([*self.lines.values()])}  # {change}"


@dataclass(frozen=True)
class Zeroed(Initializers):
    """Lines that set weights to zero, of use where a step from there lowers the loss.

    None does where both factors of a product are of zeros.
    """

    run_loss: Callable[[], Tensor]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Runs the lines.

        Raises:
            RuntimeError: If no step lowers the loss.
        """
        with super().applied():
            if not _descends(self.module, self.run_loss):
                raise RuntimeError("a step along the gradient does not lower the loss")
            yield


def _descends(module: nn.Module, run_loss: Callable[[], Tensor]) -> bool:
    """True if a step that is to lower the loss by a hundredth lowers it by half of that."""
    with preserve_weights(module), preserve_state(module), torch.enable_grad():
        parameters = [p for p in module.parameters() if p.requires_grad]
        torch.manual_seed(0)
        loss = run_loss()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        square = sum(float(g.double().square().sum()) for g in found if g is not None)
        fall = 0.01 * abs(float(loss.detach()))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient * min(fall / max(square, 1e-30), 1e30))
        torch.manual_seed(0)
        return bool(run_loss().detach() < loss.detach() - fall / 2)


@dataclass(frozen=True)
class Repaired:
    """The repair of `InitializationCheck`, which scales each layer to unit variance."""

    module: nn.Module
    run_loss: Callable[[], Tensor]
    names: Sequence[str]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Repairs the layers."""
        repair(self.module, self.run_loss, names=self.names)
        yield

    def describe(self, finding: Finding, change: str) -> str:
        """Returns the callback that does it, with the names that it needs."""
        named = [n for n in self.names if not holds_default_initialization(self.module.get_submodule(n))]
        modules = f", repair_modules={named}" if named else ""
        place = "Put among the Trainer's callbacks, as by default_callbacks(initialization_check=...):"
        return f"{place}\nInitializationCheck(on_failure='repair'{modules})  # {change}"


@dataclass(frozen=True)
class Rectified:
    """ReLU with He initialization in place of saturating activations, with normalization or without."""

    module: nn.Module
    layers: Sequence[Layer]
    normalized: bool = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Computes ReLU where a saturating activation follows one of the layers."""
        for line in self._lines():
            exec(line, {"nn": nn, "model": self.module})
        with ExitStack() as stack:
            if self.normalized:
                stack.enter_context(Normalized(self.module, self.layers).applied())
            stack.enter_context(_Substitution({layer.module for layer in self.layers}))
            yield

    def describe(self, finding: Finding, change: str) -> str:
        """Returns the change of architecture and its initializers."""
        kind = self.layers[0].activation
        is_linear = isinstance(self.layers[0].module, nn.Linear)
        norm = f" behind a normalization such as nn.{'LayerNorm' if is_linear else 'GroupNorm'}"
        norm = norm if self.normalized else ""
        words = f"nn.ReLU(){norm} in place of {kind}, and at the end of __init__, with model = self:"
        return f"{words}\n{one_line(self._lines())}  # {change}"

    def _lines(self) -> list[str]:
        return [_initializer(f"{code_of(x.name, self.module)}.weight", "relu") for x in self.layers]


class _Substitution(TorchFunctionMode):
    """Replaces the first saturating activation after each of some layers."""

    def __init__(self, layers: set[Any]) -> None:
        super().__init__()
        self._layers = layers
        self._is_due = False
        self._hooks = ExitStack()

    def __enter__(self) -> _Substitution:
        for layer in self._layers:
            self._hooks.callback(layer.register_forward_hook(UncopiedHook(self._expect)).remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def _expect(self, *_: Any) -> None:
        self._is_due = True

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._is_due and getattr(function, "__name__", "").rstrip("_") in SATURATING:
            self._is_due = False
            return torch.relu(args[0])
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Normalized:
    """Normalization between layers and their activations."""

    module: nn.Module
    layers: Sequence[Layer]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Normalizes the outputs of the layers."""
        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.callback(layer.module.register_forward_hook(_normalize).remove)
            yield

    def describe(self, finding: Finding, change: str) -> str:
        """Returns the change of architecture, with the layer of the finding as the example."""
        layer = next((x for x in self.layers if x.name == finding.module), self.layers[0])
        kind = "nn.LayerNorm({})" if isinstance(layer.module, nn.Linear) else "nn.GroupNorm(1, {})"
        where = code_of(layer.name, self.module)
        made = kind.format(layer.module.weight.shape[0])
        return f"normalization after each layer but the last, such as {made} after {where}  # {change}"


def _normalize(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return nn.functional.layer_norm(output, output.shape[-1:])
    return nn.functional.group_norm(output, 1)


@dataclass(frozen=True)
class Gated:
    """An LSTM whose forget gates are open in place of a module without such gates, or of a GRU.

    docs/callbacks/initialization_check.md has what this trains, and at which rates.

    References:
        Tallec, Ollivier, Can recurrent neural networks warp time?, 2018, arXiv:1804.11188.
    """

    module: nn.Module
    name: str
    recurrent: nn.RNNBase
    n_steps: int

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Computes the output of the module by the LSTM."""
        old, weight = self.recurrent, next(self.recurrent.parameters())
        lstm = nn.LSTM(
            old.input_size,
            old.hidden_size,
            old.num_layers,
            batch_first=old.batch_first,
            bidirectional=old.bidirectional,
        ).to(weight)
        exec("; ".join(gate_lines("lstm", lstm, self.n_steps)), {"nn": nn, "lstm": lstm})

        def replaced(module: nn.Module, inputs: Any, output: Any) -> Any:
            outputs, (hidden, _) = lstm(inputs[0])
            return outputs, hidden

        handle = old.register_forward_hook(replaced)
        try:
            yield
        finally:
            handle.remove()

    def describe(self, finding: Finding, change: str) -> str:
        """Returns the code that makes the LSTM."""
        code = gated_code(code_of(self.name, self.module), self.recurrent, self.n_steps)
        return f"{code}; {change}"
