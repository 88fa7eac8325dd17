"""Healthy programs whose loss is no measure of progress: a GAN, Q-learning, a policy gradient."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from benchmarks.evidence.programs import Batch, Program, adam, mlp, served


class GAN(pl.LightningModule):
    """A generator of points on a ring, and a discriminator, under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = mlp(4, 64, 64, 2)
        self.discriminator = mlp(2, 64, 64, 1, activation=nn.LeakyReLU)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for_generator, for_discriminator = self.optimizers()  # type: ignore[attr-defined]
        bce = nn.functional.binary_cross_entropy_with_logits
        real, code = batch
        made = self.generator(code)
        judged = self.discriminator(made.detach())
        loss = bce(self.discriminator(real), torch.ones(len(real), 1)) + bce(judged, torch.zeros_like(judged))
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        judged = self.discriminator(made)
        for_generator.zero_grad()
        self.manual_backward(bce(judged, torch.ones_like(judged)))
        for_generator.step()

    def configure_optimizers(self) -> Any:
        make = adam(2e-4, betas=(0.5, 0.999))
        return [make(self.generator.parameters()), make(self.discriminator.parameters())]


def gan(seed: int) -> Program:
    """Returns a GAN; the score is the mean distance of generated points from the ring."""
    torch.manual_seed(seed)
    module = GAN()
    noise = torch.Generator().manual_seed(seed)
    angle = torch.rand(2000, generator=noise) * 6.283
    ring = 2 * torch.stack((angle.cos(), angle.sin()), 1)
    batches = [(*batch, torch.randn(64, 4, generator=noise)) for batch in served((ring,), 500, 64, seed)]
    code = torch.randn(500, 4, generator=noise)

    def score() -> float:
        with torch.no_grad():
            return float((module.generator(code).norm(dim=1) - 2).abs().mean())

    return Program(module, batches, score)


STATES, GAMMA = 12, 0.95


class DQN(pl.LightningModule):
    """Learns the value of moving left or right on a chain with a reward of 10 at one end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(STATES, 64, 2)
        self.target = mlp(STATES, 64, 2)
        self.target.load_state_dict(self.net.state_dict())
        self.target.requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if batch_idx % 25 == 0:
            self.target.load_state_dict(self.net.state_dict())
        state, action, reward, after = batch
        value = self.net(state).gather(1, action[:, None])[:, 0]
        wanted = reward + GAMMA * self.target(after).amax(1)
        return nn.functional.mse_loss(value, wanted)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), 1e-3)


def dqn(seed: int) -> Program:
    """Returns Q-learning; the score is the share of states with the right action."""
    torch.manual_seed(seed)
    module = DQN()
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(STATES, (4000,), generator=generator)
    action = torch.randint(2, (4000,), generator=generator)
    after = (place + 2 * action - 1).clamp(0, STATES - 1)
    reward = 10.0 * (after == STATES - 1)
    states = torch.eye(STATES)
    batches = served((states[place], action, reward, states[after]), 800, 32, seed)

    def score() -> float:
        with torch.no_grad():
            return float((module.net(states).argmax(1) == 1).float().mean())

    return Program(module, batches, score)


class PolicyGradient(pl.LightningModule):
    """REINFORCE: the best of four arms depends on the context; rewards are noisy."""

    def __init__(self, best: Tensor) -> None:
        super().__init__()
        self.net = mlp(8, 32, 4)
        self.best = best

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        context, noise = batch
        policy = torch.distributions.Categorical(logits=self.net(context))
        arm = policy.sample()
        reward = (arm == (context @ self.best).argmax(1)).float() + 0.5 * noise
        return -(policy.log_prob(arm) * (reward - reward.mean())).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), 0.01)


def policy_gradient(seed: int) -> Program:
    """Returns a policy gradient; the score is the share of contexts with the best arm."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    best = torch.randn(8, 4, generator=generator)
    module = PolicyGradient(best)
    batches = [
        (torch.randn(64, 8, generator=generator), torch.randn(64, generator=generator)) for _ in range(400)
    ]
    context = torch.randn(500, 8, generator=generator)

    def score() -> float:
        with torch.no_grad():
            return float((module.net(context).argmax(1) == (context @ best).argmax(1)).float().mean())

    return Program(module, batches, score)
