"""Changes of a training program that can be tried, kept in a YAML file, and applied again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.core.arguments import nearest
from lightning_gradguard.core.remedies.kinds import CHOICES, FOUND, KINDS, Alters, Argument, ChangeKind
from lightning_gradguard.core.remedies.surgery import activations, additions, initializers, recurrent
from lightning_gradguard.core.remedies.surgery.data_flow import DataFlow
from lightning_gradguard.core.snapshots.preservation import preserve_randomness


@dataclass(frozen=True)
class Change:
    """One change of a training program, which YAML and JSON can hold.

    | kind | arguments |
    |---|---|
    | `replace_activation` | `to`: `relu`, `gelu` in place of saturating ones, `leaky_relu` of ReLU |
    | `rnn_to_gru` | |
    | `add_normalization` | `norm` before activations: `batch`, `layer` (group for convolutions), `auto` |
    | `add_residual` | `weight` of the block in `x + weight * f(x)`; `1 / sqrt(n_blocks)` by default |
    | `standardize_input` | of the layers that get the network's inputs |
    | `scale_output` | `mean` and `std` of the targets, of the layer that gives the values |
    | `initialize` | `to`: `kaiming`, `xavier`, `orthogonal`, `small`, `lsuv`; `seed` |
    | `orthogonal_recurrent` | `gain`, `seed` |
    | `gate_bias` | `value` of forget and update gates, `input_value` of the input gates of an LSTM |
    | `learning_rate` | `scale` |
    | `constant_rate`, without schedules | |
    | `warm_up` | `steps` |
    | `clipping` | `max_norm` |
    | `weight_norm` | `max_norm` |
    | `weight_decay` | `value` |
    | `epsilon` | `value` |
    | `precision` | `value` |

    Args:
        kind: The kind of change.
        arguments: Arguments of this kind. Those of the module have `modules`, names of submodules; all that
            the change fits if there are none.

    Raises:
        ValueError: If the kind, or an argument, is unknown or out of range.

    Example:
        >>> Change("replace_activation", {"to": "gelu"}).describe()
        'replace_activation(to=gelu)'
    """

    kind: ChangeKind
    arguments: Mapping[str, Argument] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks kind and arguments."""
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(KINDS)}.")
        for name, value in self.arguments.items():
            _check(self.kind, name, value)
        plain = {n: list(v) if isinstance(v, tuple) else v for n, v in self.arguments.items()}
        object.__setattr__(self, "arguments", plain)

    def __getitem__(self, name: str) -> Any:
        """Returns an argument, or its default; `None` for one that the kind does not have."""
        return self.arguments.get(name, KINDS[self.kind].arguments.get(name))

    def __hash__(self) -> int:
        """Hashes what YAML and JSON hold, as arguments are a mapping."""
        return hash(json.dumps(self.as_dict(), sort_keys=True))

    @property
    def alters(self) -> Alters:
        """Part of the program that it alters, such as `weights`."""
        return KINDS[self.kind].alters

    @property
    def is_of_module(self) -> bool:
        """True for a change of the module, False for one of its training."""
        return self.alters in ("structure", "weights")

    @property
    def is_of_treatment(self) -> bool:
        """True for a change of the module or of its optimizers, which `Treatment` makes before training."""
        return self.is_of_module or self.alters == "optimizer"

    @property
    def is_resolved(self) -> bool:
        """True if it names all that it alters, so that `apply` needs no batch to find it."""
        return all(name in self.arguments for name in FOUND if name in KINDS[self.kind].arguments)

    @property
    def modules(self) -> list[str]:
        """Names of the modules that it is restricted to; none if it is not."""
        return list(self.arguments.get("modules", ()))  # type: ignore[arg-type]

    def with_arguments(self, **arguments: Argument) -> Change:
        """Returns the change with other arguments."""
        return Change(self.kind, {**self.arguments, **arguments})

    def describe(self) -> str:
        """Returns the change in one line, without the names of modules."""
        shown = {n: v for n, v in self.arguments.items() if n not in FOUND}
        return f"{self.kind}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def as_dict(self) -> dict[str, Any]:
        """Returns what YAML and JSON hold."""
        return {"kind": self.kind, "arguments": dict(self.arguments)}


#: Names of the modules that a change fits, by its kind: of all, or of those that are named.
_RECURRENT = {
    "rnn_to_gru": recurrent.ungated,
    "gate_bias": recurrent.gated,
    "orthogonal_recurrent": recurrent.recurrent,
}
_FITTING = {
    "add_residual": additions.blocks,
    "standardize_input": additions.inputs,
    "scale_output": additions.heads,
}
#: What is made of the named modules.
_MADE: dict[ChangeKind, Callable[[nn.Module, list[str], Change], None]] = {
    "replace_activation": lambda m, names, c: activations.replace_activations(m, names, c["to"]),
    "rnn_to_gru": lambda m, names, _: recurrent.replace_by_gru(m, names),
    "add_normalization": lambda m, names, c: additions.add_normalizations(m, names, c["norms"]),
    "add_residual": lambda m, names, c: additions.add_residuals(m, names, c["weight"]),
    "standardize_input": lambda m, names, _: additions.standardize_inputs(m, names),
    "scale_output": lambda m, names, c: additions.scale_outputs(m, names, c["mean"], c["std"]),
    "orthogonal_recurrent": lambda m, names, c: recurrent.make_orthogonal(m, names, c["gain"], c["seed"]),
    "gate_bias": lambda m, names, c: recurrent.set_gate_biases(m, names, c["value"], c["input_value"]),
}


def places(module: nn.Module, change: Change, run_loss: Callable[[], Tensor] | None = None) -> list[str]:
    """Returns names of the submodules that a change would alter, and alters nothing.

    Blocks of a residual addition are named as `first:last`. There are none if the change does not fit.
    `run_loss` shows what follows each layer, also in functional code; without it, only what lies in an
    `nn.Sequential` is known.
    """
    return resolve(module, change, run_loss).modules if change.is_of_module else []


def resolve(module: nn.Module, change: Change, run_loss: Callable[[], Tensor] | None = None) -> Change:
    """Returns a change with the names of the modules that it alters, which needs no batch to be applied.

    Raises:
        ValueError: If the change names a module that the network does not have.
    """
    _check_names(module, change)
    flow, names = DataFlow.of(module, run_loss), change.modules
    if change.kind == "replace_activation":
        return change.with_arguments(modules=activations.replaceable(module, flow, change["to"], names))
    if change.kind == "add_normalization":
        layers = additions.normalizable(module, flow, names)
        norms = [additions.fitting_norm(x) if change["norm"] == "auto" else change["norm"] for x in layers]
        return change.with_arguments(modules=[layer.name for layer in layers], norms=norms)
    if change.kind == "initialize":
        layers = initializers.initializable(module, flow, names)
        followers = [layer.activation or "" for layer in layers]
        return change.with_arguments(modules=[layer.name for layer in layers], activations=followers)
    if change.kind in _RECURRENT:
        found = _RECURRENT[change.kind](module, flow)
        return change.with_arguments(modules=[name for name in found if not names or name in names])
    return change.with_arguments(modules=_FITTING[change.kind](module, flow, names))


def apply(
    module: nn.Module, change: Change, run_loss: Callable[[], Tensor] | None = None, *, resolved: bool = False
) -> list[str]:
    """Makes a change of the module in place; returns the names of what was altered.

    Parameters that the change does not concern are the same tensors as before; new ones have the dtype and
    the device of their neighbours. The global random number generators are as before. A change is `resolved`
    if `resolve` has returned it; to initialize by LSUV takes a `run_loss`.

    Raises:
        ValueError: If the change names a module that the network does not have, or needs a batch.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 1), nn.Sigmoid())
        >>> apply(net, Change("replace_activation")), type(net[1]).__name__, type(net[3]).__name__
        (['1'], 'ReLU', 'Sigmoid')
    """
    change = change if resolved else resolve(module, change, run_loss)
    names = change.modules
    if not names:
        return []
    if any(hasattr(child, "_orig_mod") for child in module.modules()):
        torch.compiler.reset()  # compiled code of before does not run the hooks that are added
    with preserve_randomness():
        torch.manual_seed(0)  # the same numbers on every rank
        if change.kind == "initialize":
            of_layers, to, seed = change["activations"], change["to"], change["seed"]
            initializers.initialize(module, names, of_layers, to, seed, run_loss)
        else:
            _MADE[change.kind](module, names, change)
    return names


def in_order(changes: Sequence[Change]) -> list[Change]:
    """Returns changes in the order in which they are applied: activations before what depends on them."""
    order = list(KINDS)
    return sorted(changes, key=lambda change: order.index(change.kind))


def functional_activations(module: nn.Module, run_loss: Callable[[], Tensor]) -> list[str]:
    """Returns saturating activations that the user's code calls as functions, which no change can replace.

    Each with the line that calls it, such as `sigmoid at model.py:12 in forward`; none that is a gate or the
    output of the network.
    """
    functions = DataFlow.of(module, run_loss).functions()
    return [x.name for x in functions if x.saturates and x.is_hidden and not x.is_gate]


def _check(kind: ChangeKind, name: str, value: Argument) -> None:
    valid = KINDS[kind].arguments
    if name not in valid:
        raise ValueError(f"{kind} has no argument {name!r}; it has {', '.join(valid)}.")
    choices = CHOICES.get((kind, name))
    if choices is not None and value not in choices:
        raise ValueError(f"{kind}: {name}={value!r} must be one of {', '.join(choices)}.")
    if name in FOUND:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"{kind}: {name}={value!r} must be a list of names.")
    elif choices is None and name != "value" and not isinstance(value, (int, float)):
        raise ValueError(f"{kind}: {name}={value!r} must be a number.")


def _check_names(module: nn.Module, change: Change) -> None:
    known = {name for name, _ in module.named_modules()}
    for name in (part for entry in change.modules for part in entry.split(":")):
        parent, _, attribute = name.rpartition(".")
        if name not in known and not (parent in known and hasattr(module.get_submodule(parent), attribute)):
            raise ValueError(f"{change.kind}: the module has no {name!r}.{nearest(name, known)}")
