"""Changes of modules that share, freeze, wrap, compile or recompute what they are made of."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.core.remedies.changes import Change, apply, places, resolve
from tests.core.remedies.networks import GatedCell, OfCells, mlp
from tests.core.remedies.test_changes import MODULE_CHANGES, loss_of


class Shared(nn.Module):
    """An encoder that two branches share."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(nn.Sigmoid, depth=1)
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.head(torch.cat([self.encoder(inputs), self.encoder(-inputs)], 1))
        return output


class Frozen(nn.Module):
    """A body that is not trained, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(nn.Sigmoid, depth=1).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(inputs))
        return output


class Recomputed(nn.Module):
    """Blocks whose activations are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False)
        output: Tensor = self.head(hidden)
        return output


class OneByOne(nn.Module):
    """Runs a network on each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(nn.Sigmoid, depth=1)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([self.net(sample) for sample in inputs])


def one_activation() -> nn.Module:
    activation = nn.Tanh()
    return nn.Sequential(nn.Linear(10, 16), activation, nn.Linear(16, 16), activation, nn.Linear(16, 3))


def tied() -> nn.Module:
    net = mlp(nn.Tanh)
    net[4].weight = net[2].weight
    return net


def normalized_weights() -> nn.Module:
    net = mlp(nn.Sigmoid, depth=1)
    parametrizations.spectral_norm(net[0])
    parametrizations.weight_norm(net[2])
    return net


MODULES: dict[str, Callable[[], nn.Module]] = {
    "shared": Shared,
    "frozen": Frozen,
    "recomputed": Recomputed,
    "one by one": OneByOne,
    "one activation": one_activation,
    "tied": tied,
    "normalized weights": normalized_weights,
    "in place": lambda: mlp(lambda: nn.ReLU(inplace=True)),
    "wrapped": lambda: nn.DataParallel(mlp(nn.Sigmoid)),
    "float64": lambda: mlp(nn.Sigmoid).double(),
}
INPUTS = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))


def inputs_of(module: nn.Module) -> Tensor:
    return INPUTS.to(next(module.parameters()).dtype)


@pytest.mark.parametrize("name", MODULES)
def test_all_changes_are_made_and_made_again_from_their_names(name: str) -> None:
    module = MODULES[name]()
    inputs, before = inputs_of(module), copy.deepcopy(module)
    run, made = loss_of(module, inputs), []
    for kind in MODULE_CHANGES:
        made.append(resolve(module, Change(kind), run))
        apply(module, made[-1], run, resolved=True)
    run().backward()
    missing = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert module(inputs).dtype == inputs.dtype
    for change in made:
        apply(before, change, resolved=True)
    before.load_state_dict(module.state_dict())
    assert torch.equal(before.eval()(inputs), module.eval()(inputs))
    if name != "normalized weights":  # torch does not pickle these
        assert torch.equal(pickle.loads(pickle.dumps(module))(inputs), module(inputs))


def found(name: str, kind: Any, **arguments: Any) -> list[str]:
    module = MODULES[name]()
    return places(module, Change(kind, arguments), loss_of(module, inputs_of(module)))


class Table(nn.Module):
    """Numbers beside the embedding of a category."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.head = nn.Embedding(4, 3), nn.Linear(13, 8), nn.Linear(11, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        category = self.embed((inputs[:, 0] > 0).long())
        hidden = self.first(torch.cat([category, inputs], 1)).relu()
        output: Tensor = self.head(torch.cat([category, hidden], 1))
        return output


def test_numbers_that_are_joined_to_an_embedding_are_inputs() -> None:
    module = Table()
    assert places(module, Change("standardize_input"), loss_of(module, INPUTS)) == ["first"]


def test_what_is_shared_or_frozen() -> None:
    assert found("shared", "replace_activation") == ["encoder.1", "encoder.3"]
    assert found("shared", "orthogonal_recurrent") == []
    assert found("frozen", "replace_activation") == ["head.1"]
    assert found("frozen", "add_normalization") == ["head.0"]
    assert found("frozen", "add_residual") == ["head.0:head.1"]
    assert found("frozen", "standardize_input") == []
    assert found("one activation", "replace_activation") == ["1"]
    assert found("one activation", "add_residual") == ["2"]
    assert found("tied", "initialize") == ["0", "6", "8"]
    assert found("normalized weights", "initialize") == []
    assert found("in place", "replace_activation", to="leaky_relu") == ["1", "3", "5", "7", "9"]


def test_a_shared_activation_is_exchanged_in_every_place() -> None:
    module = one_activation()
    apply(module, Change("replace_activation"), loss_of(module, INPUTS))
    assert isinstance(module[1], nn.ReLU)  # type: ignore[index]
    assert module[1] is module[3]  # type: ignore[index]


@pytest.mark.slow
def test_what_was_compiled_before_runs_the_changes() -> None:
    module: Any = torch.compile(mlp(nn.Sigmoid, depth=1), backend="eager")
    run = loss_of(module, INPUTS)
    run()
    apply(module, Change("add_normalization"), run)
    run().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_part_of_a_block_that_runs_alone_is_as_it_was() -> None:
    module = mlp(nn.Sigmoid, depth=1)
    apply(module, Change("add_residual"), loss_of(module, INPUTS))
    hidden = torch.randn(4, 16)
    assert torch.equal(module[3](hidden), torch.sigmoid(hidden))
    assert not torch.equal(module[2:4](hidden), torch.sigmoid(module[2](hidden)))


class Plain(nn.Module):
    """Layers in a loop of the user's, with a function as their activation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.embed(inputs))
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))
        output: Tensor = self.head(hidden)
        return output


def test_the_input_of_a_layer_is_added_before_an_activation_function() -> None:
    module = Plain()
    assert apply(module, Change("add_residual", {"weight": 0.0}), loss_of(module, INPUTS)) == [
        "layers.0",
        "layers.1",
    ]
    assert torch.equal(module(INPUTS), module.head(torch.relu(module.embed(INPUTS))))


def test_the_state_of_a_cell_is_added_to_what_it_returns() -> None:
    module, sequence = OfCells(), torch.randn(16, 9, 4)
    change = resolve(module, Change("add_residual"), lambda: module(sequence).sum())
    assert change.modules == ["cell:cell"]
    plain = copy.deepcopy(module)
    apply(module, change, resolved=True)
    state = torch.randn(16, 16)
    expected = state + plain.cell(sequence[:, 0], state)
    assert torch.allclose(module.cell(sequence[:, 0], state), expected)
    assert not places(module, change.with_arguments(modules=[]), lambda: module(sequence).sum())
    gated = OfCells(GatedCell)
    assert not places(gated, Change("add_residual"), lambda: gated(sequence).sum())


def test_one_sample_is_normalized_as_in_evaluation() -> None:
    module = mlp(nn.Sigmoid, depth=1)
    apply(module, Change("add_normalization"), loss_of(module, INPUTS))
    assert module.train()(INPUTS[:1]).shape == (1, 3)


def test_inputs_are_standardized_by_the_training_batches() -> None:
    module = nn.Sequential(nn.Linear(10, 3))
    columns = torch.arange(1.0, 11.0)
    columns[0] = 0.0  # a constant one
    batches = [INPUTS * columns + 100 * columns, INPUTS * columns * 2]
    apply(module, Change("standardize_input"), lambda: loss_of(module, INPUTS)())
    for batch in (*batches, INPUTS * float("nan")):
        module(batch)
    standardize: Any = module[0].added_standardization
    rows = torch.cat(batches)
    torch.testing.assert_close(standardize.mean, rows.mean(0))
    torch.testing.assert_close(standardize.variance, rows.var(0, correction=0))
    values = standardize.eval()(rows)
    torch.testing.assert_close(values[:, 1:].std(0, correction=0), torch.ones(9), rtol=1e-4, atol=1e-4)
    assert not values[:, 0].any()
