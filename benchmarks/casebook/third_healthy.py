"""The third collection of healthy programs: own loops, functional code, uncommon networks and losses."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from benchmarks.casebook import parts
from benchmarks.casebook.parts import Residual, classify, conv, net
from benchmarks.casebook.programs import Case, adam, case, changed, sgd
from benchmarks.casebook.second_failing import DIABETES, DIGITS, FLAT, SUMS, WAVES, WINE
from benchmarks.casebook.third_failing import (
    CANCER,
    FIRST,
    FRIEDMAN,
    IRIS,
    MOONS,
    SOURCE,
    Encoder,
    Functional,
    Highway,
    Mixer,
    Scores,
    Separable,
    Tagger,
    Tcn,
    Trained,
    adamw,
    every,
    init_all,
    rmsprop,
    scheduled,
)


class Dense(nn.Module):
    """Each convolution sees the outputs of all before it."""

    def __init__(self, depth: int = 5, growth: int = 8) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(1 + i * growth, growth, 3, padding=1) for i in range(depth))
        self.fc = nn.Linear(1 + depth * growth, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = torch.cat([x, functional.elu(layer(x))], 1)
        return self.fc(x.mean((2, 3)))


class Seq2Seq(nn.Module):
    """Copies a sequence: an encoder, and a decoder that attends to its states."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.enc = nn.Embedding(9, 24), nn.GRU(24, 32, batch_first=True)
        self.dec, self.attend = (
            nn.GRU(24, 32, batch_first=True),
            nn.MultiheadAttention(32, 4, batch_first=True),
        )
        self.out = nn.Linear(64, 9)

    def loss(self, x: Tensor, _: Tensor) -> Tensor:
        states, h = self.enc(self.emb(x))
        given = torch.cat([torch.full_like(x[:, :1], 8), x[:, :-1]], 1)
        d, _h = self.dec(self.emb(given), h)
        mixed, _w = self.attend(d, states, states)
        return functional.cross_entropy(self.out(torch.cat([d, mixed], 2)).flatten(0, 1), x.flatten())


class Siren(nn.Module):
    """A network of sines that learns a picture from coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(2, 48), nn.Linear(48, 48), nn.Linear(48, 1)
        nn.init.uniform_(self.one.weight, -0.5, 0.5)
        nn.init.uniform_(self.two.weight, -math.sqrt(6 / 48) / 10, math.sqrt(6 / 48) / 10)

    def loss(self, x: Tensor, _: Tensor) -> Tensor:
        goal = torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])
        return functional.mse_loss(self.out((10 * self.two((10 * self.one(x)).sin())).sin()), goal)


class Sets(nn.Module):
    """The sum over elements of a set, and a network behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.phi, self.rho = net(4, 32, 32), net(32, 32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rho(self.phi(x).mean(1))


class ActorCritic(nn.Module):
    """A bandit with states: policy and value share a body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pi, self.v = net(4, 32, 32), nn.Linear(32, 3), nn.Linear(32, 1)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.body(x).relu()
        policy = torch.distributions.Categorical(logits=self.pi(h))
        action = policy.sample()
        reward = (action == y).float()
        value = self.v(h).squeeze(1)
        advantage = (reward - value).detach()
        return (
            -(policy.log_prob(action) * advantage).mean()
            + (value - reward).square().mean()
            - 0.01 * policy.entropy().mean()
        )


class Vector(nn.Module):
    """An autoencoder whose codes are the nearest of a codebook, straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = net(64, 48, 8), net(8, 48, 64)
        self.codes = nn.Embedding(32, 8)

    def loss(self, x: Tensor, _: Tensor) -> Tensor:
        z = self.encoder(x)
        e = self.codes(torch.cdist(z, self.codes.weight).argmin(1))
        out = self.decoder(z + (e - z).detach())
        return (
            functional.mse_loss(out, x)
            + functional.mse_loss(e, z.detach())
            + 0.25 * functional.mse_loss(z, e.detach())
        )


class Simsiam(nn.Module):
    """Two views, a predictor, and a branch without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.predictor = net(64, 48, 32, norm=nn.BatchNorm1d), net(32, 16, 32)

    def loss(self, x: Tensor, _: Tensor) -> Tensor:
        a, b = (self.encoder(x + 0.1 * torch.randn_like(x)) for _ in range(2))
        both = [
            functional.cosine_similarity(self.predictor(p), z.detach()).mean() for p, z in ((a, b), (b, a))
        ]
        return -torch.stack(both).mean()


class Wasserstein(pl.LightningModule):
    """A critic with a gradient penalty, and a generator every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.g, self.d = net(6, 32, 13), net(13, 32, 1, act=nn.LeakyReLU)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0]
        on_d, on_g = self.optimizers()
        fake = self.g(torch.randn(len(x), 6))
        mid = (0.5 * (x + fake)).detach().requires_grad_()
        slope = torch.autograd.grad(self.d(mid).sum(), mid, create_graph=True)[0].norm(dim=1)
        loss = self.d(fake.detach()).mean() - self.d(x).mean() + 10 * (slope - 1).square().mean()
        on_d.zero_grad()
        self.manual_backward(loss)
        on_d.step()
        self.log("critic", loss)
        if batch_idx % 2:
            loss = -self.d(self.g(torch.randn(len(x), 6))).mean()
            on_g.zero_grad()
            self.manual_backward(loss)
            on_g.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(m.parameters(), 1e-3, betas=(0.5, 0.9)) for m in (self.d, self.g)]


class Finetuned(pl.LightningModule):
    """A head is trained first, then the body at a lower rate."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv(3, n_out=32), nn.Linear(32, 10)
        self.body.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 60:
            self.body.requires_grad_(True)
            self.optimizers().add_param_group({"params": list(self.body.parameters()), "lr": 3e-4})
        return functional.cross_entropy(self.head(self.body(batch[0]).relu()), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.head.parameters(), 3e-3)


class Quantile(nn.Module):
    """Three quantiles of the target."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net(10, 32, 32, 3, act=nn.Mish)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        q = torch.tensor([0.1, 0.5, 0.9])
        e = y - self.body(x)
        return torch.maximum(q * e, (q - 1) * e).mean()


def normed() -> nn.Module:
    """Linear layers of weight and spectral normalization."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(64, 48)), nn.ReLU(),
        parametrizations.spectral_norm(nn.Linear(48, 48)), nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip


def truncated(m: Any, b: Any) -> Tensor:
    """Two stretches of a sequence; the state is passed on without its history."""
    x, y = b
    h, losses = None, []
    for part, goal in zip(x.chunk(2, 1), y.chunk(2, 1), strict=True):
        out, h = m.rnn(m.emb(part), h)
        h = tuple(s.detach() for s in h) if isinstance(h, tuple) else h.detach()
        losses.append(functional.cross_entropy(m.fc(out).flatten(0, 1), goal.flatten()))
    return torch.stack(losses).mean()


def mixed_up(m: Any, b: Any) -> Tensor:
    """Two batches and their labels, mixed."""
    share = torch.distributions.Beta(0.4, 0.4).sample()
    out = m(share * b[0] + (1 - share) * b[0].flip(0))
    return share * functional.cross_entropy(out, b[1]) + (1 - share) * functional.cross_entropy(
        out, b[1].flip(0)
    )


def cases() -> list[Case]:
    """Returns those that rules were set on."""
    of_pair = lambda m, b: m.loss(*b)
    he = init_all(lambda m: nn.init.kaiming_normal_(m.weight))
    cosine = lambda i: 0.5 * (1 + math.cos(math.pi * i / 200))
    return [
        case("matrices in a list", lambda: Functional(30, 48, 48, 2), **CANCER, optimizer=sgd(0.05)),
        case("mixer", lambda: Mixer(3), **DIGITS, optimizer=adamw(3e-3)),
        case("separable convolutions", lambda: Separable(5, norm=True), **DIGITS, optimizer=rmsprop(3e-3)),
        case("dense convolutions", Dense, **DIGITS, optimizer=adam(3e-3)),
        case("sequence to sequence with attention", Seq2Seq, of_pair, data=partial(FIRST["data"], times=10), optimizer=adam(5e-3)),
        case("network of sines", Siren, of_pair, data=MOONS["data"], optimizer=adam(1e-3)),
        case("mean of a set", Sets, classify, data=lambda n: [(x, x.mean(1).argmax(1)) for x, _ in _sets(n)], optimizer=adam(5e-3)),
        case("actor and critic", ActorCritic, of_pair, data=IRIS["data"], optimizer=adam(3e-3)),
        case("codebook, straight through", Vector, of_pair, data=FLAT["data"], optimizer=adam(2e-3)),
        case("two views without negatives", Simsiam, of_pair, data=FLAT["data"], optimizer=sgd(0.05)),
        Case("critic with a gradient penalty", Wasserstein, parts.table),
        Case("body released later", Finetuned, parts.digits),
        case("quantiles", Quantile, of_pair, data=FRIEDMAN["data"], optimizer=adamw(3e-3)),
        case("weight and spectral normalization", normed, **FLAT, optimizer=sgd(0.1)),
        case("truncated through time", lambda: Tagger(nn.LSTM(24, 32, batch_first=True), 96, 96, last=False), truncated,
             data=SOURCE["data"], optimizer=adam(5e-3)),
        case("mixed-up digits, cosine", lambda: changed(conv(4, nn.SiLU), he), mixed_up, data=DIGITS["data"],
             optimizer=scheduled(0.05, cosine)),
        case("causal convolutions", lambda: Tcn(4, act=functional.leaky_relu), **WAVES, optimizer=adam(3e-3)),
        case("highway of 8 layers", lambda: nn.Sequential(nn.Linear(64, 32), *(Highway(32, -1.0) for _ in range(8)), nn.Linear(32, 10)),
             **FLAT, optimizer=adam(3e-3)),
        case("label smoothing and class weights", lambda: net(30, 48, 2, act=nn.PReLU), **{**CANCER, "step": lambda m, b:
             functional.cross_entropy(m(b[0]), b[1], torch.tensor([2.0, 1.0]), label_smoothing=0.1)}, optimizer=adamw()),
        Case("by hand, logged under another name", lambda: Trained(""), FLAT["data"]),
    ]  # fmt: skip


def _sets(n: int) -> list[Any]:
    g = torch.Generator().manual_seed(34)
    return [(torch.randn(32, 12, 4, generator=g), None) for _ in range(n)]


class Bilinear(nn.Module):
    """Factors of users and items, and their product."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(8, 12), nn.Embedding(8, 12)
        nn.init.normal_(self.users.weight, 0, 0.3)
        nn.init.normal_(self.items.weight, 0, 0.3)
        self.bias = nn.Parameter(torch.zeros(()))

    def loss(self, x: Tensor, _: Tensor) -> Tensor:
        u, i = x[:, 0], x[:, 1]
        goal = ((u + i) % 3 == 0).float()
        return functional.binary_cross_entropy_with_logits(
            (self.users(u) * self.items(i)).sum(1) + self.bias, goal
        )


class Sarsa(nn.Module):
    """A value that is bootstrapped from itself, without a target network."""

    def __init__(self) -> None:
        super().__init__()
        self.q = net(10, 48, 1, act=nn.Tanh)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            goal = y + 0.5 * self.q(x.roll(1, 0))
        return functional.huber_loss(self.q(x), goal)


class Ensemble(nn.Module):
    """Five networks in one pass of `torch.bmm`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Parameter(torch.randn(5, 13, 32) / 13**0.5),
            nn.Parameter(torch.randn(5, 32, 3) / 32**0.5),
        )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        out = torch.bmm(torch.bmm(x.expand(5, *x.shape), self.one).relu(), self.two)
        return functional.cross_entropy(out.flatten(0, 1), y.repeat(5))


class Alternating(pl.LightningModule):
    """Two parts that are trained in turn, by toggled optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = net(64, 48, 32), net(32, 10)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx // 5 % 2]
        self.toggle_optimizer(optimizer)
        loss = functional.cross_entropy(self.b(self.a(batch[0]).relu()), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(m.parameters(), 3e-3) for m in (self.a, self.b)]


def held_out_cases() -> list[Case]:
    """Returns those that were run once."""
    of_pair = lambda m, b: m.loss(*b)
    noise = every(7, lambda x, y: (x + torch.randn_like(x), y), DIABETES["data"])
    return [
        case("factors of a matrix", Bilinear, of_pair, data=FIRST["data"], optimizer=adam(1e-2)),
        case("bootstrapped values", Sarsa, of_pair, data=FRIEDMAN["data"], optimizer=rmsprop(3e-3)),
        case("ensemble in one pass", Ensemble, of_pair, data=WINE["data"], optimizer=adamw(3e-3)),
        Case("parts in turn", Alternating, FLAT["data"]),
        case("transformer of rows, post-norm, warm-up", lambda: Encoder(2, norm_first=False), **DIGITS,
             optimizer=scheduled(2e-3, lambda i: min(1.0, (i + 1) / 40), adamw)),
        case("one head of attention", lambda: Scores(1 / 32**0.5), **DIGITS, optimizer=adam(3e-3)),
        case("residual of 10, small steps", lambda: nn.Sequential(nn.Linear(10, 32), *(Residual(net(32, 32, 32), 0.2) for _ in range(10)),
             nn.Linear(32, 1)), **FRIEDMAN, optimizer=sgd(0.02)),
        case("GRU that adds", lambda: parts.Sequence(nn.GRU(2, 32, batch_first=True)), optimizer=adam(1e-2),
             **{**SUMS, "data": partial(parts.adding, times=14)}),
        case("noisy batches, l1", lambda: net(10, 32, 1), lambda m, b: functional.l1_loss(m(b[0]), b[1]), data=noise,
             optimizer=adamw(3e-3)),
        case("groups of rates and decays", lambda: net(30, 48, 48, 2, norm=nn.LayerNorm), **CANCER,
             optimizer=lambda m: torch.optim.AdamW(
                 [{"params": [p for p in m.parameters() if p.ndim > 1], "weight_decay": 0.1},
                  {"params": [p for p in m.parameters() if p.ndim < 2], "weight_decay": 0.0, "lr": 1e-2}], 2e-3)),
    ]  # fmt: skip
