"""Changes alter what they fit, in place, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.core.remedies.changes import (
    Change,
    apply,
    functional_activations,
    in_order,
    places,
    resolve,
)
from lightning_gradguard.core.remedies.kinds import KINDS, ChangeKind
from tests.core.remedies.networks import networks

TARGETS = torch.randint(3, (16,), generator=torch.Generator().manual_seed(0))

MODULE_CHANGES = [kind for kind in KINDS if Change(kind).is_of_module]

EXPECTED: dict[ChangeKind, dict[str, list[str]]] = {
    "replace_activation": {
        "mlp": ["1", "3", "5", "7", "9"],
        "convolutional": ["activation"],
        "transformer": ["encoder.layers.0.activation", "encoder.layers.1.activation"],
        "blocks": ["blocks.0.function", "blocks.1.function", "blocks.2.function"],
        "residual": ["blocks.0.function", "blocks.1.function", "blocks.2.function"],
    },
    "rnn_to_gru": {"recurrent": ["rnn"]},
    "add_normalization": {
        "mlp": ["0", "2", "4", "6", "8"],
        "convolutional": ["first", "second"],
        "transformer": ["encoder.layers.0.linear1", "encoder.layers.1.linear1"],
        "blocks": ["embed", *(f"blocks.{i}.{n}" for i in range(3) for n in ("first", "second"))],
        "residual": ["embed", *(f"blocks.{i}.{n}" for i in range(3) for n in ("first", "second"))],
        "gated": ["embed", "blocks.0.body", "blocks.1.body", "blocks.2.body"],
    },
    "add_residual": {
        "mlp": ["2:3", "4:5", "6:7", "8:9"],
        "convolutional": ["second"],
        "blocks": ["blocks.0", "blocks.1", "blocks.2"],
        "gated": ["blocks.0", "blocks.1", "blocks.2"],
    },
    "standardize_input": {
        "mlp": ["0"],
        "convolutional": ["first"],
        "loop": ["inputs"],
        "recurrent": ["rnn"],
        "lstm": ["rnn"],
        "transformer": ["embed"],
        "blocks": ["embed"],
        "residual": ["embed"],
        "gated": ["embed"],
    },
    "scale_output": {
        "mlp": ["10"],
        **dict.fromkeys(
            ("loop", "recurrent", "lstm", "transformer", "blocks", "residual", "gated"), ["head"]
        ),
    },
    "orthogonal_recurrent": {"loop": ["state"], "recurrent": ["rnn"], "lstm": ["rnn"]},
    "gate_bias": {"lstm": ["rnn"]},
}


def loss_of(module: nn.Module, inputs: Tensor) -> Callable[[], Tensor]:
    return lambda: nn.functional.cross_entropy(module(inputs), TARGETS)


def same_state(first: nn.Module, second: nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][k], states[1][k]) for k in states[0]
    )


@pytest.mark.parametrize("kind", [kind for kind in MODULE_CHANGES if kind != "initialize"])
def test_places_are_those_that_the_change_fits(kind: ChangeKind) -> None:
    found = {name: places(m, Change(kind), loss_of(m, x)) for name, (m, x) in networks().items()}
    assert {name: where for name, where in found.items() if where} == EXPECTED[kind]


@pytest.mark.parametrize("kind", MODULE_CHANGES)
def test_a_changed_module_trains_and_is_made_again_without_a_batch(kind: ChangeKind) -> None:
    for name, (module, inputs) in networks().items():
        before = copy.deepcopy(module)
        random = torch.get_rng_state()
        change = resolve(module, Change(kind), loss_of(module, inputs))
        assert same_state(module, before)
        changed = apply(module, change, loss_of(module, inputs), resolved=True)
        assert changed == change.modules
        assert torch.equal(torch.get_rng_state(), random)
        kept = {n: p for n, p in module.state_dict().items() if n in before.state_dict()}
        if kind not in ("initialize", "rnn_to_gru", "orthogonal_recurrent", "gate_bias"):
            assert all(torch.equal(p, before.state_dict()[n]) for n, p in kept.items())
        assert module(inputs).shape == (16, 3)
        loss_of(module, inputs)().backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad), name
        if change.arguments.get("to") != "lsuv":
            again = Change(**json.loads(json.dumps(change.as_dict())))
            apply(before, again, resolved=True)
            before.load_state_dict(module.state_dict())
            assert torch.equal(before.eval()(inputs), module.eval()(inputs))
        assert torch.equal(copy.deepcopy(module)(inputs), module(inputs))


@pytest.mark.parametrize("kind", ["replace_activation", "add_normalization", "add_residual", "rnn_to_gru"])
def test_a_change_is_made_once(kind: ChangeKind) -> None:
    for module, inputs in networks().values():
        apply(module, Change(kind), loss_of(module, inputs))
        assert not places(module, Change(kind), loss_of(module, inputs))


def test_small_weights_are_those_of_a_transformer() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    changed = apply(net, Change("initialize", {"to": "small"}), loss_of(net, torch.randn(16, 64)))
    assert changed == ["0", "2"]
    weights = dict(net.named_parameters())
    assert all(
        float(weights[f"{name}.weight"].detach().std()) == pytest.approx(0.02, rel=0.1) for name in changed
    )


def test_scaled_output_trains_as_with_standardized_targets() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 4), 1000 * torch.randn(16, 1) + 4000
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    scaled = copy.deepcopy(plain)
    scaling = Change("scale_output", {"mean": 4000.0, "std": 1000.0})
    assert apply(scaled, scaling, lambda: scaled(x).sum()) == ["2"]
    assert torch.allclose(scaled(x), 1000 * plain(x) + 4000)
    nn.functional.mse_loss(scaled(x), y).backward()
    nn.functional.mse_loss(plain(x), (y - 4000) / 1000).backward()
    for mine, other in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-4)  # type: ignore[arg-type]


def test_all_changes_of_one_module_together() -> None:
    for module, inputs in networks().values():
        for change in in_order([Change(kind) for kind in reversed(MODULE_CHANGES)]):
            apply(module, change, loss_of(module, inputs))
        loss_of(module, inputs)().backward()
        assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)


def test_functions_of_the_users_code_are_left_alone_and_listed() -> None:
    module, inputs = networks()["blocks"]
    listed = functional_activations(module, loss_of(module, inputs))
    assert [entry.partition(" at ")[0] for entry in listed] == ["tanh", "sigmoid"]
    assert all("networks.py:" in entry and entry.endswith("in forward") for entry in listed)
    gated, inputs = networks()["gated"]
    assert len(functional_activations(gated, loss_of(gated, inputs))) == 1


def test_without_a_batch_the_order_of_modules_in_a_sequential_is_known() -> None:
    module, _ = networks()["mlp"]
    for kind in ("replace_activation", "add_normalization", "standardize_input"):
        assert places(module, Change(kind)) == EXPECTED[kind]["mlp"]
    assert places(module, Change("initialize")) == EXPECTED["add_normalization"]["mlp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dropout"}, "kind='dropout' must be one of replace_activation"),
        ({"kind": "warm_up", "arguments": {"stps": 3}}, "warm_up has no argument 'stps'; it has steps"),
        ({"kind": "initialize", "arguments": {"to": "he"}}, "initialize: to='he' must be one of kaiming"),
        ({"kind": "clipping", "arguments": {"max_norm": "1"}}, "clipping: max_norm='1' must be a number"),
        ({"kind": "add_residual", "arguments": {"modules": "net"}}, "modules='net' must be a list of names"),
    ],
)
def test_wrong_changes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Change(**arguments)


def test_unknown_modules_are_named_with_the_nearest() -> None:
    module, _ = networks()["blocks"]
    change = Change("replace_activation", {"modules": ["blocks.0.funtion"]})
    with pytest.raises(ValueError, match=r"the module has no 'blocks.0.funtion'\. Did you mean blocks"):
        apply(module, change)


def test_every_kind_has_defaults() -> None:
    assert all(Change(kind).describe() == f"{kind}()" for kind in KINDS)
