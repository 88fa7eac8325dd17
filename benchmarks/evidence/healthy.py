"""Programs that train well without help, at the rates that are usual for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.adversarial import dqn, gan, policy_gradient
from benchmarks.evidence.networks import CNN, GPT, VAE, Flow, RecurrentLM, ResNet, ViT
from benchmarks.evidence.programs import (
    Batch,
    Loss,
    Program,
    Scenario,
    Task,
    accuracy,
    adam,
    adamw,
    clusters,
    cross_entropy,
    diabetes,
    digits,
    held_out_loss,
    mlp,
    mse,
    r2,
    served,
    sgd,
    split,
    text,
    warm_up,
)

Maker = Callable[[Any], torch.optim.Optimizer]


def _regression(
    net: Callable[[], nn.Module],
    data: Callable[[torch.Generator], Batch],
    optimizer: Maker,
    n: int = 400,
    size: int = 16,
    loss: Loss = mse,
) -> Callable[[int], Program]:
    def make(seed: int) -> Program:
        torch.manual_seed(seed)
        network = net()
        train, test = split(data(torch.Generator().manual_seed(seed)), 100, seed)
        return Program(Task(network, loss, optimizer), served(train, n, size, seed), r2(network, test))

    return make


def _parabola(generator: torch.Generator) -> Batch:
    x = torch.rand(500, 1, generator=generator) * 4 - 2
    return x, 5 * x.square() + torch.randn(500, 1, generator=generator)


def parabola(rate: float) -> Callable[[int], Program]:
    """Returns a maker of a regression on a parabola, after a question on StackOverflow (48934338)."""
    return _regression(lambda: mlp(1, 50, 30, 1), _parabola, sgd(rate), 1000, 8)


def _hundreds(generator: torch.Generator) -> Batch:
    x = torch.rand(500, 1, generator=generator) * 10
    return x / 10, 3 * x * 10 + 20 + 5 * torch.randn(500, 1, generator=generator)


def _plane(generator: torch.Generator, tail: float = 0.0) -> Batch:
    x = torch.randn(600, 8, generator=generator)
    noise = torch.randn(600, 1, generator=generator)
    if tail:  # Student's t with two degrees of freedom
        noise = noise / (-torch.rand(600, 1, generator=generator).clamp(min=1e-3).log()).sqrt()
    scale = torch.linspace(-3, 3, 8)[:, None]
    return x, (x @ scale) * (1 if tail else 20) + 100 * (not tail) + noise


def _zero_linear() -> nn.Module:
    layer = nn.Linear(8, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _summed(net: nn.Module, batch: Batch) -> Any:
    return (net(batch[0]) - batch[1]).square().sum()


def _diabetes(optimizer: Maker, n: int = 400) -> Callable[[int], Program]:
    def make(seed: int) -> Program:
        torch.manual_seed(seed)
        network = mlp(10, 32, 32, 1)
        train, test = diabetes(seed)
        return Program(Task(network, mse, optimizer), served(train, n, 32, seed), r2(network, test))

    return make


def classify_digits(
    net: Callable[[], nn.Module],
    optimizer: Maker,
    n: int = 300,
    size: int = 32,
    **options: Any,
) -> Callable[[int], Program]:
    """Returns a maker of classifiers of digits."""

    def make(seed: int) -> Program:
        torch.manual_seed(seed)
        network = net()
        train, test = digits(seed)
        task = Task(network, cross_entropy, optimizer, **options)
        return Program(task, served(train, n, size, seed), accuracy(network, test))

    return make


def classify_clusters(
    net: Callable[[], nn.Module], optimizer: Maker, n: int = 400, **options: Any
) -> Callable[[int], Program]:
    """Returns a maker of classifiers of four clusters."""

    def make(seed: int) -> Program:
        torch.manual_seed(seed)
        network = net()
        task = Task(network, cross_entropy, optimizer, **options)
        return Program(task, clusters(n, seed), accuracy(network, clusters(1, 7777, size=2000)[0]))

    return make


def language(
    net: Callable[[], nn.Module], optimizer: Maker, n: int = 250, **options: Any
) -> Callable[[int], Program]:
    """Returns a maker of language models by character."""

    def make(seed: int) -> Program:
        torch.manual_seed(seed)
        network = net()
        task = Task(network, cross_entropy, optimizer, **options)
        test = text(1, 7777, size=64)[0]
        return Program(task, text(n, seed), held_out_loss(network, cross_entropy, test))

    return make


def _likelihood(seed: int) -> Program:
    def loss(net: nn.Module, batch: Batch) -> Any:
        mean, log_std = net(batch[0]).chunk(2, 1)
        return (log_std + 0.5 * ((batch[1] - mean) / log_std.exp()).square()).mean()

    torch.manual_seed(seed)
    network = mlp(1, 32, 32, 2)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(600, 1, generator=generator) * 4 - 2
    data = x, 0.3 * x.sin() + 0.1 * torch.randn(600, 1, generator=generator)
    train, test = split(data, 100, seed)
    task = Task(network, loss, sgd(0.002, 0.9))
    return Program(task, served(train, 400, 32, seed), held_out_loss(network, loss, test))


def _vae(seed: int) -> Program:
    def loss(net: nn.Module, batch: Batch) -> Any:
        logits, mean, log_variance = net(batch[0])
        error = nn.functional.binary_cross_entropy_with_logits(logits, batch[0], reduction="sum")
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        return (error + divergence) / len(batch[0])

    torch.manual_seed(seed)
    network = VAE()
    train, test = digits(seed)
    task = Task(network, loss, adam(1e-3))
    return Program(task, served(train, 300, 64, seed), held_out_loss(network, loss, test))


def _flow(seed: int) -> Program:
    def loss(net: nn.Module, batch: Batch) -> Any:
        return net(batch[0]).mean()

    torch.manual_seed(seed)
    network = Flow()
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand(1000, generator=generator) * 6.283
    points = torch.stack((angle.cos(), angle.sin()), 1) + 0.1 * torch.randn(1000, 2, generator=generator)
    train, test = split((points,), 200, seed)
    task = Task(network, loss, adam(3e-3))
    return Program(task, served(train, 300, 64, seed), held_out_loss(network, loss, test))


def _unfreezing(seed: int) -> Program:
    """The head of a trained network is trained alone, on other classes; then all of it."""
    torch.manual_seed(seed)
    network = mlp(64, 64, 64, 10)
    (images, targets), test = digits(seed)
    known = targets < 5
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for batch in served((images[known], targets[known]), 100, 32, seed):
        optimizer.zero_grad()
        cross_entropy(network, batch).backward()
        optimizer.step()
    network[:-1].requires_grad_(False)
    task = Task(network, cross_entropy, sgd(0.05, 0.9), unfreeze_at=150)
    return Program(task, served((images, targets), 300, 32, seed), accuracy(network, test))


def _curriculum(seed: int) -> Program:
    """Short sequences, then whole ones: the sum of the last half must be remembered."""
    torch.manual_seed(seed)

    class Adder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(1, 32, batch_first=True)
            self.head = nn.Linear(32, 1)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.cell(x)[0][:, -1])

    network = Adder()
    generator = torch.Generator().manual_seed(seed)
    lengths = [5] * 150 + [30] * 150
    batches = [torch.randn(32, length, 1, generator=generator) for length in lengths]
    test = torch.randn(400, 30, 1, generator=generator)
    task = Task(network, mse, sgd(0.01, 0.9))
    pairs = [(x, x.sum(1)) for x in batches]
    return Program(task, pairs, r2(network, (test, test.sum(1))))


def _restarts(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 100)


def _bigram() -> nn.Module:
    return nn.Embedding(96, 96)


def deep_network() -> nn.Module:
    """Returns a network of twelve layers with He initialization."""
    layers: list[nn.Module] = [nn.Linear(20, 64), nn.ReLU()]
    for _ in range(10):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(64, 4))
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


SCENARIOS = (
    Scenario("parabola", "y = 5x² + noise, unscaled, SGD .001", parabola(1e-3), tuned=True),
    Scenario(
        "hundreds",
        "sigmoid units, targets to 300, SGD .01",
        _regression(lambda: mlp(1, 5, 1, activation=nn.Sigmoid), _hundreds, sgd(1e-2), 1500, 8),
        tuned=True,
    ),
    Scenario(
        "zero linear",
        "linear regression from zero weights, targets near 100, SGD .01",
        _regression(_zero_linear, _plane, sgd(1e-2)),
    ),
    Scenario(
        "summed mse",
        "linear regression, squared errors summed, SGD .001",
        _regression(lambda: nn.Linear(8, 1), _plane, sgd(1e-3), loss=_summed),
        tuned=True,
    ),
    Scenario("diabetes sgd", "targets 25 to 346, SGD 1e-4, momentum .9", _diabetes(sgd(1e-5, 0.9))),
    Scenario("diabetes adam", "the same, Adam .003", _diabetes(adam(3e-3)), tuned=True),
    Scenario(
        "heavy tails",
        "noise with Student's t of 2 degrees, SGD .01",
        _regression(lambda: mlp(8, 32, 1), lambda g: _plane(g, 1.0), sgd(1e-2), 600),
    ),
    Scenario(
        "likelihood",
        "Gaussian likelihood, loss below 0, SGD .002, momentum .9",
        _likelihood,
        higher=False,
        tuned=True,
    ),
    Scenario(
        "clusters",
        "3 layers, SGD .05, momentum .9",
        classify_clusters(lambda: mlp(20, 64, 64, 4), sgd(0.05, 0.9)),
        tuned=True,
    ),
    Scenario(
        "deep .003", "12 layers, SGD .003, momentum .9", classify_clusters(deep_network, sgd(0.003, 0.9))
    ),
    Scenario(
        "deep .001",
        "12 layers, SGD .001, momentum .9",
        classify_clusters(deep_network, sgd(0.001, 0.9)),
        tuned=True,
    ),
    Scenario("digits .5", "digits, MLP, SGD .5", classify_digits(lambda: mlp(64, 64, 10), sgd(0.5))),
    Scenario(
        "digits momentum",
        "digits, MLP, SGD .1, momentum .9",
        classify_digits(lambda: mlp(64, 64, 64, 10), sgd(0.1, 0.9)),
        tuned=True,
    ),
    Scenario(
        "digits adam", "digits, MLP, Adam .003", classify_digits(lambda: mlp(64, 64, 64, 10), adam(3e-3))
    ),
    Scenario("cnn", "digits, CNN, SGD .1, momentum .9", classify_digits(CNN, sgd(0.1, 0.9), 250), tuned=True),
    Scenario(
        "resnet",
        "digits, ResNet, SGD .05, momentum .9, weight decay",
        classify_digits(ResNet, sgd(0.05, 0.9, weight_decay=5e-4), 200),
    ),
    Scenario(
        "restarts",
        "digits, MLP, SGD .1, momentum .9, cosine with restarts",
        classify_digits(lambda: mlp(64, 64, 10), sgd(0.1, 0.9), schedule=_restarts),
    ),
    Scenario(
        "small batches",
        "digits, MLP, batches of 2, SGD .05",
        classify_digits(lambda: mlp(64, 64, 10), sgd(0.05), 600, 2),
        tuned=True,
    ),
    Scenario("unfreezing", "a head, then all of the network, SGD .05, momentum .9", _unfreezing),
    Scenario(
        "vit",
        "digits, ViT, AdamW .003, warm-up",
        classify_digits(ViT, adamw(3e-3), 400, schedule=warm_up(30)),
        tuned=True,
    ),
    Scenario(
        "vit sgd",
        "digits, ViT, SGD .05, momentum .9, warm-up",
        classify_digits(ViT, sgd(0.05, 0.9), 400, schedule=warm_up(30)),
    ),
    Scenario(
        "gpt adamw",
        "GPT, AdamW .003, warm-up",
        language(GPT, adamw(3e-3), schedule=warm_up(30)),
        higher=False,
    ),
    Scenario("gpt sgd", "GPT, SGD .3, momentum .9", language(GPT, sgd(0.3, 0.9)), higher=False, tuned=True),
    Scenario(
        "gru", "GRU language model, SGD .5, momentum .9", language(RecurrentLM, sgd(0.5, 0.9)), higher=False
    ),
    Scenario(
        "lstm adam",
        "LSTM language model, Adam .003",
        language(lambda: RecurrentLM(nn.LSTM), adam(3e-3)),
        higher=False,
        tuned=True,
    ),
    Scenario("bigrams", "table of pairs of characters, SGD 50", language(_bigram, sgd(50.0)), higher=False),
    Scenario("curriculum", "GRU adds 5 numbers, then 30, SGD .01, momentum .9", _curriculum, tuned=True),
    Scenario("vae", "VAE of digits, Adam .001", _vae, higher=False),
    Scenario("flow", "normalizing flow, loss may be below 0, Adam .003", _flow, higher=False, tuned=True),
    Scenario("gan", "GAN, Adam 2e-4, two optimizers", gan, higher=False),
    Scenario("dqn", "Q-learning on a chain, growing returns, Adam .001", dqn, tuned=True),
    Scenario("policy gradient", "REINFORCE on a bandit of contexts, Adam .01", policy_gradient),
)
