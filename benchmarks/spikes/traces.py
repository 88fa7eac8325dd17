"""Losses and gradient norms of small runs, most of them healthy ones whose losses rise, jump or change sign.

Bare torch on one thread, no data from outside: what a detector sees if nothing intervenes.
"""

from __future__ import annotations

import inspect
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: One optimizer step: index of the optimizer, loss, norm of all gradients.
Row = tuple[int, float, float]


@dataclass
class Trace:
    """The steps of one run.

    Args:
        name: Of the program.
        seed: Of the program.
        rows: Its steps.
        diverges: True if it must be rolled back.
    """

    name: str
    seed: int
    rows: list[Row] = field(default_factory=list)
    diverges: bool = False


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    pairs = zip(sizes, sizes[1:], strict=False)
    layers: list[nn.Module] = []
    for inputs, outputs in pairs:
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def step(optimizer: torch.optim.Optimizer, loss: Tensor, index: int = 0) -> Row:
    """Takes a step; returns its numbers."""
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.step()
    return index, float(loss.detach()), float(norm)


def gan(seed: int, steps: int = 1200) -> Iterator[Row]:
    """A GAN of eight Gaussians on a ring; the generator's loss rises as the discriminator learns."""
    torch.manual_seed(seed)
    generator, critic = mlp(8, 64, 64, 2), mlp(2, 64, 64, 1)
    of_g = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.999))
    of_c = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.999))
    bce = F.binary_cross_entropy_with_logits
    for _ in range(steps):
        angle = torch.randint(8, (64,)) * math.pi / 4
        real = 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(64, 2)
        fake = generator(torch.randn(64, 8))
        of_real, of_fake = critic(real), critic(fake.detach())
        loss = bce(of_real, torch.ones_like(of_real)) + bce(of_fake, torch.zeros_like(of_fake))
        yield step(of_c, loss, 1)
        guess = critic(fake)
        yield step(of_g, bce(guess, torch.ones_like(guess)))


class CartPole:
    """Barto, Sutton, Anderson, Neuronlike adaptive elements, 1983: a pole on a cart, a reward each step."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.reset()

    def reset(self) -> list[float]:
        self.state = [self.random.uniform(-0.05, 0.05) for _ in range(4)]
        self.time = 0
        return self.state

    def move(self, action: int) -> tuple[list[float], bool]:
        x, v, angle, spin = self.state
        force = 10.0 if action else -10.0
        part = (force + 0.05 * spin * spin * math.sin(angle)) / 1.1
        twist = (9.8 * math.sin(angle) - math.cos(angle) * part) / (
            0.5 * (4 / 3 - 0.1 * math.cos(angle) ** 2 / 1.1)
        )
        push = part - 0.05 * twist * math.cos(angle) / 1.1
        self.state = [x + 0.02 * v, v + 0.02 * push, angle + 0.02 * spin, spin + 0.02 * twist]
        self.time += 1
        return self.state, abs(self.state[0]) > 2.4 or abs(self.state[2]) > 0.21 or self.time >= 200


def dqn(
    seed: int, steps: int = 2000, lr: float = 1e-3, huber: bool = False, sync: int = 100
) -> Iterator[Row]:
    """A deep Q network with replay and a target network: its loss grows along with the values it learns."""
    torch.manual_seed(seed)
    world, chance = CartPole(seed), random.Random(seed)
    network, target = mlp(4, 64, 64, 2), mlp(4, 64, 64, 2)
    target.load_state_dict(network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr)
    memory: deque[tuple[list[float], int, list[float], float]] = deque(maxlen=5000)
    state = world.reset()
    for i in range(steps + 64):
        explore = chance.random() < max(0.05, 1 - i / 800)
        with torch.no_grad():
            action = chance.randrange(2) if explore else int(network(torch.tensor(state)).argmax())
        after, done = world.move(action)
        memory.append((state, action, after, float(done)))
        state = world.reset() if done else after
        if len(memory) < 64:
            continue
        states, actions, afters, ends = zip(*chance.sample(memory, 64), strict=True)
        with torch.no_grad():
            values = 1 + 0.99 * (1 - torch.tensor(ends)) * target(torch.tensor(afters)).amax(1)
        guess = network(torch.tensor(states)).gather(1, torch.tensor(actions)[:, None])[:, 0]
        yield step(optimizer, F.smooth_l1_loss(guess, values) if huber else F.mse_loss(guess, values))
        if i % sync == 0:
            target.load_state_dict(network.state_dict())


def dqn_huber(seed: int) -> Iterator[Row]:
    """The same by a Huber loss, the target network replaced every 200 steps."""
    return dqn(seed, 1500, huber=True, sync=200)


def reinforce(seed: int, episodes: int = 400) -> Iterator[Row]:
    """Policy gradient: the loss is a weighted sum without a meaning of its own, and grows with success."""
    torch.manual_seed(seed)
    world, network = CartPole(seed), mlp(4, 64, 2)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(episodes):
        state, done, logs = world.reset(), False, []
        while not done:
            choice = torch.distributions.Categorical(logits=network(torch.tensor(state)))
            action = choice.sample()
            logs.append(choice.log_prob(action))
            state, done = world.move(int(action))
        returns = torch.arange(len(logs), 0, -1, dtype=torch.float)
        yield step(optimizer, -(torch.stack(logs) * returns).sum())


def actor_critic(seed: int, episodes: int = 400) -> Iterator[Row]:
    """The same with a learnt baseline: the loss changes sign."""
    torch.manual_seed(seed)
    world, network = CartPole(seed), mlp(4, 64, 3)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(episodes):
        state, done, outputs, logs = world.reset(), False, [], []
        while not done:
            output = network(torch.tensor(state))
            choice = torch.distributions.Categorical(logits=output[:2])
            action = choice.sample()
            outputs.append(output[2])
            logs.append(choice.log_prob(action))
            state, done = world.move(int(action))
        returns = torch.arange(len(logs), 0, -1, dtype=torch.float)
        values = torch.stack(outputs)
        loss = -(torch.stack(logs) * (returns - values.detach())).mean() + F.smooth_l1_loss(values, returns)
        yield step(optimizer, loss)


def vae(seed: int, steps: int = 1000) -> Iterator[Row]:
    """A variational autoencoder of blobs, a sum over pixels in nats."""
    torch.manual_seed(seed)
    encoder, decoder = mlp(64, 64, 8), mlp(4, 64, 64)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-3)
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij"), -1)
    for _ in range(steps):
        centre = 1.4 * torch.rand(32, 1, 1, 2) - 0.7
        image = torch.exp(-8 * (grid - centre).square().sum(-1)).reshape(32, 64)
        mean, log_variance = encoder(image).chunk(2, 1)
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        nats = F.binary_cross_entropy_with_logits(decoder(code), image, reduction="sum")
        divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum()
        yield step(optimizer, (nats + divergence) / 32)


def flow(seed: int, steps: int = 1000) -> Iterator[Row]:
    """Coupling layers on two moons, trained by their likelihood: the loss falls below 0."""
    torch.manual_seed(seed)
    nets = nn.ModuleList(mlp(1, 32, 2, activation=nn.Tanh) for _ in range(6))
    optimizer = torch.optim.Adam(nets.parameters(), 5e-3)
    for _ in range(steps):
        angle, side = math.pi * torch.rand(64), torch.randint(2, (64,)).float()
        x = torch.stack(
            [angle.cos() + side, (1 - 2 * side) * angle.sin() + side / 2], 1
        ) + 0.02 * torch.randn(64, 2)
        total = torch.zeros(64)
        for net in nets:
            scale, shift = net(x[:, :1]).chunk(2, 1)
            x = torch.cat([x[:, 1:] * scale.exp() + shift, x[:, :1]], 1)
            total = total + scale[:, 0]
        yield step(optimizer, (0.5 * x.square().sum(1) + math.log(2 * math.pi) - total).mean())


def text() -> Tensor:
    """Characters of a module of the standard library, as numbers."""
    return torch.tensor([min(ord(c), 127) for c in inspect.getsource(inspect)])


class CharacterModel(nn.Module):
    """A recurrent language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(128, 32), nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.cell(self.embedding(x))[0])
        return hidden


def language(seed: int, steps: int = 1000, size: int = 16, restarts: bool = False) -> Iterator[Row]:
    """A character model with AdamW; with `restarts`, of a cosine schedule every 200 steps."""
    torch.manual_seed(seed)
    letters, model = text(), CharacterModel()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2 if restarts else 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 200 if restarts else 10**6)
    for _ in range(steps):
        starts = torch.randint(len(letters) - 33, (size,))
        x = torch.stack([letters[s : s + 33] for s in starts])
        yield step(optimizer, F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()))
        schedule.step()


def restarts(seed: int) -> Iterator[Row]:
    """The character model under a schedule with restarts."""
    return language(seed, restarts=True)


def small_batches(seed: int) -> Iterator[Row]:
    """The character model with one sequence a batch."""
    return language(seed, size=1)


def curriculum(seed: int, stages: int = 5) -> Iterator[Row]:
    """Regression whose targets are three times larger in each stage of 200 steps."""
    torch.manual_seed(seed)
    model = mlp(8, 64, 64, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for i in range(200 * stages):
        x = torch.randn(32, 8)
        y = 3.0 ** (i // 200) * (x[:, :1] * x[:, 1:2] + x[:, 2:3])
        yield step(optimizer, F.mse_loss(model(x), y))


def unfreezing(seed: int) -> Iterator[Row]:
    """A head is trained; then the body too, at ten times the rate, on other data."""
    torch.manual_seed(seed)
    body, head = mlp(8, 64, 64), nn.Linear(64, 1)
    optimizer = torch.optim.SGD(head.parameters(), 0.01, momentum=0.9)
    for i in range(800):
        if i == 300:
            optimizer.add_param_group({"params": list(body.parameters()), "lr": 0.02})
        x = torch.randn(32, 8)
        y = x[:, :1] + (4 * x[:, 1:2] * x[:, 2:3] if i >= 300 else 0)
        yield step(optimizer, F.mse_loss(head(body(x).relu()), y))


def heavy_tails(seed: int) -> Iterator[Row]:
    """Regression of targets with the tails of Student's t with two degrees of freedom, batches of 8."""
    torch.manual_seed(seed)
    model, tails = mlp(8, 64, 64, 1), torch.distributions.StudentT(2.0)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    for _ in range(1200):
        x = torch.randn(8, 8)
        y = x[:, :1] * x[:, 1:2] + tails.sample((8, 1))
        yield step(optimizer, F.mse_loss(model(x), y))


def unscaled(seed: int) -> Iterator[Row]:
    """Regression of targets around 300, as house prices have them, from a network that begins at 0."""
    torch.manual_seed(seed)
    model = mlp(8, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(800):
        x = torch.randn(32, 8)
        y = 300 + 100 * x[:, :1] + 30 * torch.randn(32, 1)
        yield step(optimizer, F.mse_loss(model(x), y))


def classifier(
    seed: int, rate: float = 3e-3, outlier: int = 0, adam: bool = True, depth: int = 4
) -> Iterator[Row]:
    """Four noisy classes; at step `outlier` one step is made at ten thousand times the rate."""
    torch.manual_seed(seed)
    model = mlp(20, *[64] * (depth - 1), 4)
    kind = torch.optim.Adam if adam else torch.optim.SGD
    options = {} if adam else {"momentum": 0.9}
    optimizer = kind(model.parameters(), rate, **options)  # type: ignore[arg-type]
    centres = torch.randn(4, 20, generator=torch.Generator().manual_seed(99))
    for i in range(600):
        y = torch.randint(4, (32,))
        x = centres[y] + torch.randn(32, 20)
        optimizer.param_groups[0]["lr"] = rate * (1e4 if outlier and i == outlier else 1)
        yield step(optimizer, F.cross_entropy(model(x), y))


def hundredfold_adam(seed: int) -> Iterator[Row]:
    """The classifier at a hundred times the rate that trains it."""
    return classifier(seed, rate=0.3)


def one_large_step(seed: int) -> Iterator[Row]:
    """The classifier with one step of SGD at ten thousand times the rate."""
    return classifier(seed, rate=0.01, outlier=300, adam=False)


def hundredfold_sgd(seed: int) -> Iterator[Row]:
    """The classifier with SGD at a hundred times its rate."""
    return classifier(seed, rate=3.0, adam=False, depth=8)


HEALTHY: dict[str, Callable[[int], Iterator[Row]]] = {
    f.__name__: f
    for f in (
        gan, dqn, dqn_huber, reinforce, actor_critic, vae, flow, language, restarts, small_batches,
        curriculum, unfreezing, heavy_tails, unscaled, classifier,
    )
}  # fmt: skip
DIVERGING: dict[str, Callable[[int], Iterator[Row]]] = {
    f.__name__: f for f in (hundredfold_adam, one_large_step, hundredfold_sgd)
}


def record(name: str, seed: int) -> Trace:
    """Runs a program, to its end or to its first nonfinite number."""
    torch.set_num_threads(1)
    trace = Trace(name, seed, diverges=name in DIVERGING)
    for row in {**HEALTHY, **DIVERGING}[name](seed):
        if not (math.isfinite(row[1]) and math.isfinite(row[2])):
            break
        trace.rows.append(row)
    return trace
