"""Cures are code: what is printed is pasted into a fresh network, which then passes the check."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard import InitializationCheck
from lightning_gradguard.core.initialization import check, repair, table
from lightning_gradguard.core.initialization.findings import Finding, one_line
from lightning_gradguard.core.initialization.trials import Gated
from tests.core.initialization.networks import digits, he, loss_of, mlp, planted
from tests.tasks import same, weights


class Recall(nn.Module):
    """Reads a symbol at the first of many steps, in a recurrent module under a name that is no identifier."""

    def __init__(self, kind: Callable[..., nn.RNNBase], n_steps: int = 60) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cells = nn.ModuleDict({"time-wise": kind(4, 32, batch_first=True)})
        self.head = nn.Linear(32, 4)
        self.batch = torch.randn(16, n_steps, 4), torch.randint(4, (16,))

    def loss(self) -> Tensor:
        inputs, target = self.batch
        outputs, _ = self.cells["time-wise"](inputs)
        return nn.functional.cross_entropy(self.head(outputs[:, -1]), target)


def orthogonal(*arguments: Any, **options: Any) -> Any:
    cell: Any = nn.RNN(*arguments, **options)
    nn.init.orthogonal_(cell.weight_hh_l0)
    return cell


def pasted(text: str, module: nn.Module) -> None:
    lines = re.findall(r"(?:cure: |self:\n +)(.*[^:])$", text, re.MULTILINE)
    assert lines
    torch.manual_seed(5)
    for line in lines:
        exec(line, {"model": module, "nn": nn, "torch": torch})


@pytest.mark.parametrize(
    "make",
    [
        mlp,
        lambda: mlp(20, nn.Tanh),
        lambda: mlp(initialize=lambda w: nn.init.normal_(w, 0, 0.8)),
        lambda: planted(mlp(4, initialize=he), lambda n: n[4].weight.fill_(0.1)),
        lambda: planted(mlp(4, initialize=he), lambda n: n[2].bias.fill_(-100)),
        lambda: planted(mlp(4, nn.Tanh), lambda n: n[2].weight.mul_(1000)),
        lambda: planted(mlp(4, initialize=he), lambda n: n[6].weight[0, 0].fill_(math.nan)),
        lambda: nn.ModuleDict({"not-a-name": mlp()}),
    ],
)
def test_pasted_cure_of_a_feed_forward_network_works(make: Callable[[], Any]) -> None:
    network = make()
    inside = network["not-a-name"] if isinstance(network, nn.ModuleDict) else network
    before = weights(network)
    findings, _ = check(network, loss_of(inside))
    assert all(finding.is_tried for finding in findings if finding.severity != "info")
    assert torch.equal(torch.cat([w.flatten() for w in before]), flat(network)) or not all_finite(before)
    pasted(table(findings), network)
    assert [f for f in check(network, loss_of(inside))[0] if f.severity != "info"] == []


def flat(network: nn.Module) -> Tensor:
    return torch.cat([w.flatten() for w in weights(network)])


def all_finite(tensors: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(w).all()) for w in tensors)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, orthogonal])
def test_pasted_cure_through_time_works(kind: Callable[..., nn.RNNBase]) -> None:
    network = Recall(kind)
    before, numbers = weights(network), torch.get_rng_state()
    findings, values = check(network, network.loss)
    assert same(before, weights(network))
    assert torch.equal(numbers, torch.get_rng_state())
    (finding,) = findings
    severity = "warn" if kind is orthogonal else "fail"
    assert (finding.severity, finding.criterion) == (severity, "gain_through_time")
    assert finding.value == values["gain_through_time/cells.time-wise"] < -3
    assert "model.cells['time-wise']" in finding.cure
    pasted(table(findings), network)
    assert check(network, network.loss)[0] == []


def test_pasted_gates_better_a_recurrent_network_that_no_initializer_betters() -> None:
    network = Recall(nn.RNN, n_steps=200)
    (finding,) = check(network, network.loss)[0]
    assert finding.cure.startswith("model.cells['time-wise'] = nn.LSTM(4, 32, batch_first=True); nn.init.")
    assert finding.cure.endswith("its state is a pair; gain_through_time is as usual, -2.25 .. 3")
    pasted(table([finding]), network)
    assert check(network, network.loss)[0] == []


def test_pasted_gates_are_those_of_all_layers_and_directions() -> None:
    model: Any = nn.Sequential(nn.RNN(4, 8, num_layers=2, bidirectional=True))
    finding = Finding("gain_through_time", "0", -9.0, "-3 .. 3", "fail")
    exec(Gated(model, "0", model[0], 100).describe(finding, "as usual"), {"nn": nn, "model": model})
    assert isinstance(model[0], nn.LSTM)
    assert model(torch.ones(3, 2, 4))[0].shape == (3, 2, 16)
    biases = [p for name, p in model[0].named_parameters() if name.startswith("bias_hh")]
    assert [p[8:16].mean().item() for p in biases] == pytest.approx([4.6] * 4)


class Residual(nn.Module):
    """Residual blocks that multiply what passes them, and their sum, by a number."""

    def __init__(self, of_input: float, of_sum: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.blocks = nn.Linear(64, 10), nn.ModuleList()
        for _ in range(24):
            self.blocks.append(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
        for weight in [p for p in self.blocks.parameters() if p.ndim > 1]:
            he(weight)
        self.first, self.of_input, self.of_sum = nn.Linear(64, 64), of_input, of_sum

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = (x if self.of_input == 1 else self.of_input * x) + block(x)
            x = x if self.of_sum == 1 else x / self.of_sum
        out: Tensor = self.head(x)
        return out


def test_pasted_branches_of_zero_cure_a_residual_network_that_explodes() -> None:
    network = Residual(1, 1)
    findings = check(network, loss_of(network))[0]
    assert findings[0].cure.startswith("for i in range(0, 24): nn.init.zeros_(model.blocks[i][")
    pasted(table(findings[:1]), network)
    assert [f for f in check(network, loss_of(network))[0] if f.severity != "info"] == []


@pytest.mark.parametrize(("of_input", "of_sum"), [(0.5, 1), (1, 4.0)])
def test_what_residual_blocks_multiply_is_told(of_input: float, of_sum: float) -> None:
    network = Residual(of_input, of_sum)
    for block in network.blocks:
        assert isinstance(block, nn.Sequential)
        nn.init.normal_(block.get_parameter("2.weight"), std=0.01)
    found = check(network, loss_of(network))[0]
    told = f"residual blocks multiply what passes them by {of_input / of_sum:.3g}; return x + f(x)"
    assert [told in f.cure for f in found if f.criterion == "gradient_gain"] == [True]


class Steep(nn.Module):
    """The sine of 30 x."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns it."""
        return torch.sin(30 * x)


def test_pasted_smaller_weights_cure_steep_activations() -> None:
    network = mlp(4, Steep)
    (finding,) = (f for f in check(network, loss_of(network))[0] if f.criterion == "gradient_gain")
    assert finding.value > 2
    assert "weight.data.mul_(" in finding.cure
    pasted(table([finding]), network)
    assert all(f.criterion != "gradient_gain" for f in check(network, loss_of(network))[0])


def test_another_activation_is_advised_where_no_initializer_betters_a_sigmoid() -> None:
    network = mlp(20, nn.Sigmoid)
    findings, _ = check(network, loss_of(network))
    architecture, _, line = findings[0].cure.partition("\n")
    assert architecture == "nn.ReLU() in place of sigmoid, and at the end of __init__, with model = self:"
    for i in range(1, 40, 2):
        network[i] = nn.ReLU()
    exec(line, {"model": network, "nn": nn})
    assert check(network, loss_of(network))[0] == []


def test_an_operation_without_a_gradient_is_advised_to_be_looked_for() -> None:
    class Sign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sign()

    network = mlp(3, nn.ReLU).insert(4, Sign())
    findings = [f for f in check(network, loss_of(network))[0] if f.severity == "fail"]
    assert findings
    assert all("an operation that passes none" in finding.cure for finding in findings)


def test_scaling_is_advised_where_inputs_saturate_the_first_layer() -> None:
    network = mlp(3, nn.Tanh)
    inputs, target = digits()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(network(inputs[:128] * 255), target[:128])

    (finding,) = check(network, loss)[0]
    made = eval(finding.cure.splitlines()[1], {"InitializationCheck": InitializationCheck})
    assert (made.on_failure, made.repair_modules) == ("repair", ())
    repair(network, loss, names=made.repair_modules)
    assert check(network, loss)[0] == []


def test_a_repair_is_not_advised_where_it_does_nothing() -> None:
    class Times4(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 4 * x

    layers = [[layer, Times4()] if isinstance(layer, nn.ReLU) else [layer] for layer in mlp(10, nn.ReLU)]
    network = nn.Sequential(*(layer for pair in layers for layer in pair))
    findings = {f.criterion: f for f in check(network, loss_of(network))[0]}
    assert {f.severity for f in findings.values()} == {"warn"}
    assert "weight.data.mul_(0.6)" in findings["gradient_gain"].cure


def test_like_rows_share_one() -> None:
    network = mlp(20, nn.Sigmoid)
    lines = table(check(network, loss_of(network))[0]).splitlines()
    assert len(lines) == 6  # a head, the network, its cure in two lines, the layers, how the cure is used
    row = " ".join(lines[4].split())
    assert row == "FAIL 2 to 38 (19 layers) layer_gain -0.88 .. -0.81 decades -0.2 .. 0.2"


def test_statements_join_to_one_line() -> None:
    assert one_line(["f(model[0])"]) == "f(model[0])"
    assert one_line(["f(m[0]); g(m[0])", "f(m[3]); g(m[3])"]) == "for i in range(0, 4, 3): f(m[i]); g(m[i])"
    assert one_line(["f(m[0])", "f(m[3])", "f(m[4])"]) == "for i in (0, 3, 4): f(m[i])"
    assert one_line(["f(m[0].a[1])", "f(m[1].a[2])"]) == "f(m[0].a[1]); f(m[1].a[2])"
    assert one_line(["f(m.a)", "f(m.b)"]) == "f(m.a); f(m.b)"
    lines = [f"f(model.{name}.weight); g(model.{name}.bias)" for name in ("fc1", "d['a.b']", "at[0].q")]
    looped = "for layer in (model.fc1, model.d['a.b'], model.at[0].q): f(layer.weight); g(layer.bias)"
    assert one_line(lines) == looped
    in_brackets = "[(f(layer.weight), g(layer.bias)) for layer in (model.fc1, model.d['a.b'], model.at[0].q)]"
    assert one_line([*lines, "g(model[3])"]) == f"{in_brackets}; g(model[3])"


def test_layers_of_any_name_share_a_row_and_a_cure() -> None:
    """The cure of twelve attributes is one loop, which works as it is printed."""
    network = mlp(12, nn.Tanh)
    named = nn.ModuleDict(
        {f"fc{i}": layer for i, layer in enumerate(network) if isinstance(layer, nn.Linear)}
    )
    findings = [
        Finding("layer_gain", name, -0.8, "-0.2 .. 0.2", "fail", f"nn.init.zeros_(model.{name}.weight)")
        for name in named
    ]
    _, row, cure, *_ = table(findings).splitlines()
    assert f"fc0 to fc{2 * len(named) - 2} ({len(named)} layers)" in row
    exec(cure.partition("cure: ")[2], {"nn": nn, "model": named})
    assert not any(weight.any() for name, weight in named.named_parameters() if name.endswith("weight"))


class Embedded(nn.Module):
    """Scores of pairs, as in matrix factorization, or of a next word by the embeddings of the first layer."""

    def __init__(self, loss: str, padding: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.users, self.items = nn.Embedding(40, 64, padding), nn.Embedding(50, 64)
        self.kind, self.pairs = loss, (torch.randint(40, (128,)), torch.randint(50, (128,)))
        self.ratings = torch.rand(128)

    def loss(self) -> Tensor:
        users, items = (table(ids) for table, ids in zip((self.users, self.items), self.pairs, strict=True))
        if self.kind == "tied":
            users = nn.functional.layer_norm(users, (64,))
            return nn.functional.cross_entropy(users @ self.items.weight.T, self.pairs[1])
        of_pairs = nn.functional.mse_loss if self.kind == "mse" else bce
        return of_pairs((users * items).sum(1), self.ratings)


bce = nn.functional.binary_cross_entropy_with_logits


@pytest.mark.parametrize(("kind", "padding"), [("mse", None), ("bce", None), ("tied", None), ("mse", 0)])
def test_smaller_embeddings_are_advised_where_their_products_are_far_from_the_targets(
    kind: str, padding: int | None
) -> None:
    network = Embedded(kind, padding)
    before = network.loss().item()
    (finding,) = check(network, network.loss, scale_free=False)[0]
    assert (finding.criterion, finding.is_tried) == ("loss_over_guessing", True)
    assert kind == "tied" or finding.severity == "info"
    exec(finding.cure, {"nn": nn, "model": network})
    assert network.loss().item() < before / 2
    assert padding is None or not network.users.weight[padding].any()
    assert [f for f in check(network, network.loss, scale_free=False)[0] if kind == "mse"] == []


@pytest.mark.parametrize("targets", [0.0, 1000.0])
def test_embeddings_that_are_not_at_fault_have_no_finding(targets: float) -> None:
    """As small ones, or where the targets are far from 0."""
    network = Embedded("mse")
    network.ratings += targets
    if not targets:
        network.users.weight.data.mul_(0.02)
    assert check(network, network.loss, scale_free=False)[0] == []


class Contrastive(nn.Module):
    """Two views of a sample, and the product of what one network makes of them."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.product = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), product
        self.views = [digits()[0][:64] + 0.1 * torch.randn(64, 64) for _ in range(2)]

    def loss(self) -> Tensor:
        first, second = (10 * self.net(view) for view in self.views)
        return nn.functional.cross_entropy(self.product(first, second), torch.arange(64))


def test_factors_are_normalized_where_small_weights_on_both_sides_of_a_product_do_not_train() -> None:
    network = Contrastive(lambda a, b: a @ b.T / 0.01)
    (finding, *_) = check(network, network.loss)[0]
    assert "both factors of the product" in finding.cure
    assert "zeros_" not in finding.cure
    network.product = lambda a, b: nn.functional.normalize(a) @ nn.functional.normalize(b).T / 0.01
    assert network.loss().item() < 20


def test_weights_of_zero_are_no_cure_where_no_step_from_there_lowers_the_loss() -> None:
    network = Contrastive(lambda a, b: (a[:, None] * b).sum(2) / 0.01)
    (finding, *_) = check(network, network.loss)[0]
    assert "zeros_" not in finding.cure


def test_means_of_neighbours_are_advised_where_their_sums_explode() -> None:
    torch.manual_seed(0)
    neighbours, nodes = (torch.rand(20, 20) < 0.5).float(), torch.randn(20, 32)
    first, message, head = (nn.Linear(32, n) for n in (32, 32, 1))

    def loss(divisor: Tensor | float = 1.0) -> Tensor:
        h = first(nodes)
        for _ in range(12):
            h = h + torch.relu((neighbours / divisor) @ message(h))
        answers: Tensor = head(h)
        return answers.square().mean()

    network = nn.ModuleList([first, message, head])
    (finding, *_) = check(network, loss)[0]
    assert "means of neighbours" in finding.cure
    degrees = neighbours.sum(-1, keepdim=True).clamp(min=1)
    assert [f for f in check(network, lambda: loss(degrees))[0] if f.severity != "info"] == []
