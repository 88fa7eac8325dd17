"""The second collection of healthy programs: other networks, data and ways to train."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.casebook import parts
from benchmarks.casebook.parts import Gcn, Gpt, HandLstm, Residual, Sequence, Unet, conv, net
from benchmarks.casebook.programs import Case, adam, case, sgd
from benchmarks.casebook.second_failing import (
    DIABETES,
    DIGITS,
    FLAT,
    GRAPH,
    MASKS,
    SUMS,
    TEXT,
    WAVES,
    WINE,
    Gan,
    Manual,
    Vae,
)


class Basic(nn.Module):
    """A residual block that halves the image and doubles the channels."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(a, b, 1, 2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _ in range(3))
        nn.init.zeros_(self.norms[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[1](self.two(self.norms[0](self.one(x)).relu()))
        return (h + self.norms[2](self.skip(x))).relu()


def resnet() -> nn.Module:
    """Strided residual blocks whose last normalization begins at zero."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), Basic(16, 32), Basic(32, 64), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Vit(nn.Module):
    """Patches of 2 x 2 with a class token, post-norm."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(1, 32, 2, 2), nn.Parameter(torch.zeros(1, 1, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, "gelu", batch_first=True)
        self.body, self.head = (
            nn.TransformerEncoder(layer, depth, enable_nested_tensor=False),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.body(torch.cat([self.token.expand(len(x), 1, 32), patches], 1))[:, 0])


class Mixture(nn.Module):
    """Soft top-2 of four experts with a load-balancing term."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(64, 4), nn.ModuleList(net(64, 32, 10) for _ in range(4))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        p = self.gate(x).softmax(1)
        top = p.topk(2, 1)
        weight = torch.zeros_like(p).scatter(1, top.indices, top.values)
        out = sum(weight[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return functional.cross_entropy(out, y) + 0.01 * 4 * p.mean(0).square().sum()


class DoubleQ(nn.Module):
    """Double Q-learning with a target network that follows slowly."""

    def __init__(self) -> None:
        super().__init__()
        self.policy_net, self.target_net = net(13, 48, 48, 3), net(13, 48, 48, 3)
        self.target_net.load_state_dict(self.policy_net.state_dict())

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            for p, q in zip(self.policy_net.parameters(), self.target_net.parameters(), strict=True):
                q.lerp_(p, 0.05)
            following = x.roll(1, 0)
            best = self.policy_net(following).argmax(1, keepdim=True)
            action = torch.randint(3, (len(x), 1))
            goal = (action.squeeze(1) == y).float() + 0.9 * self.target_net(following).gather(
                1, best
            ).squeeze(1)
        return functional.smooth_l1_loss(self.policy_net(x).gather(1, action).squeeze(1), goal)


class Lora(nn.Module):
    """A frozen linear layer and a low-rank addition as bare parameters."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base = layer.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(4, layer.in_features) / 8)
        self.lora_b = nn.Parameter(torch.zeros(layer.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_a.T @ self.lora_b.T


def lora() -> nn.Module:
    """A network of frozen layers with additions, and a trained head."""
    body = net(64, 64, 64, 10)
    return nn.Sequential(*(Lora(m) if isinstance(m, nn.Linear) and m.out_features != 10 else m for m in body))


class Averaged(pl.LightningModule):
    """A network with an exponential average of its weights as a frozen copy."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.ema = conv(3), conv(3).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for p, q in zip(self.model.parameters(), self.ema.parameters(), strict=True):
            q.data.lerp_(p.data, 0.01)
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Accumulating(pl.LightningModule):
    """Accumulates by hand over four batches, with a scheduler of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = net(64, 48, 10)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(functional.cross_entropy(self.model(batch[0]), batch[1]) / 4)
        if batch_idx % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.2, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)]


class Spline(nn.Module):
    """An affine flow with batch statistics of its own, on a table."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(net(6, 32, 14, act=nn.Tanh) for _ in range(4))

    def loss(self, x: Tensor) -> Tensor:
        x, total = x[:, :13], 0
        for one in self.nets:
            a, b = x[:, :6], x[:, 6:]
            scale, shift = one(a).chunk(2, 1)
            total = total + scale.tanh().sum(1)
            x = torch.cat([b * scale.tanh().exp() + shift, a], 1)
        return (0.5 * x.square().sum(1) - total).mean() / 13


def noise(model: Any, batch: Any) -> Tensor:
    """Noise is predicted, weighted by its level."""
    x = batch[0]
    level = torch.rand(len(x), 1, 1, 1)
    eps = torch.randn_like(x)
    return ((model((1 - level).sqrt() * x + level.sqrt() * eps) - eps).square() * (0.5 + level)).mean()


def pairs_of_digits(model: Any, batch: Any) -> Tensor:
    """A siamese network with a margin."""
    x, y = batch
    a, b = model(x), model(x.roll(1, 0))
    same, distance = (y == y.roll(1)).float(), (a - b).square().sum(1)
    return (same * distance + (1 - same) * functional.relu(1 - (distance + 1e-6).sqrt()).square()).mean()


class Tasks(nn.Module):
    """One body for classes, brightness and the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes = net(64, 48, 48), nn.Linear(48, 10)
        self.bright, self.image = nn.Linear(48, 1), nn.Linear(48, 64)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.body(x).relu()
        loss = functional.cross_entropy(self.classes(h), y) + functional.mse_loss(
            self.bright(h), x.mean(1, True)
        )
        return loss + 0.1 * functional.l1_loss(self.image(h), x)


def heavy(n: int) -> list[Any]:
    """Targets with heavy tails."""
    g = torch.Generator().manual_seed(17)
    found = []
    for x, y in parts.table(n, "diabetes"):
        u = torch.rand(y.shape, generator=g) - 0.5
        found.append((x, y + 0.3 * torch.tan(2.5 * u)))
    return found


def warmed(model: nn.Module) -> Any:
    """AdamW with one cycle of its rate."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=201)
    return [optimizer], [{"scheduler": rate, "interval": "step"}]


def ctc(model: Any, batch: Any) -> Tensor:
    """CTC of the rows of digits."""
    x, y = batch
    z = model(x.reshape(-1, 8, 8)).transpose(0, 1).log_softmax(2)
    return functional.ctc_loss(
        z, y[:, None] + 1, torch.full((len(y),), 8), torch.ones(len(y), dtype=torch.long)
    )


def masked(model: Any, batch: Any) -> Tensor:
    """A masked language model: one character of five is hidden, others are ignored."""
    tokens = batch[0]
    hidden = torch.rand(tokens.shape) < 0.2
    logits = model(tokens.masked_fill(hidden, 95))
    return functional.cross_entropy(logits.flatten(0, 1), tokens.masked_fill(~hidden, -100).flatten())


def counts(n: int) -> list[Any]:
    """Counts whose rate is log-linear."""
    g = torch.Generator().manual_seed(18)
    return [
        (x, torch.poisson((0.4 * x[:, :3].sum(1, True)).clamp(-2, 2).exp(), generator=g))
        for x, _ in parts.table(n)
    ]


def likelihood(model: Any, batch: Any) -> Tensor:
    """Gaussian likelihood with a variance for each row."""
    mean, log_var = model(batch[0]).chunk(2, 1)
    return functional.gaussian_nll_loss(mean, batch[1], log_var.exp())


def imbalanced(n: int) -> list[Any]:
    """One class in twenty."""
    return [
        (x, ((y == 3) & (x[:, :8].sum(1) > x[:, :8].sum(1).median())).float()[:, None])
        for x, y in parts.digits(n, flat=True)
    ]


def residual_mlp() -> nn.Module:
    """Residual blocks with batch normalization before each layer."""
    blocks = [Residual(nn.Sequential(nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48))) for _ in range(10)]
    return nn.Sequential(nn.Linear(64, 48), *blocks, nn.BatchNorm1d(48), nn.Linear(48, 10))


def selu() -> nn.Module:
    """Self-normalizing layers."""
    model = net(64, *[48] * 6, 10, act=nn.SELU)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    return model


def bottleneck(model: Any, batch: Any) -> Tensor:
    """A denoising autoencoder."""
    x = batch[0]
    return functional.mse_loss(model(x + 0.3 * torch.randn_like(x)), x)


def head_first(model: nn.Module) -> Any:
    """Rates that are lower for early layers."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    groups = [{"params": m.parameters(), "lr": 1e-3 * 0.5**i} for i, m in enumerate(reversed(layers))]
    return torch.optim.Adam(groups)


def cases() -> list[Case]:
    """Returns all of them."""
    of_x, of_pair = lambda m, b: m.loss(b[0]), lambda m, b: m.loss(*b)
    row = lambda n, m: Sequence(n, m, last=False)  # noqa: E731
    return [
        case("GPT, tied embeddings", lambda: Gpt(3, tied=True), optimizer=warmed, **TEXT),
        case("GPT, ReLU, plain SGD", lambda: Gpt(2, act=nn.ReLU), optimizer=sgd(0.1), **TEXT),
        case("character LSTM", lambda: nn.Sequential(nn.Embedding(96, 32), row(nn.LSTM(32, 48, batch_first=True), 96)),
             optimizer=adam(5e-3), **TEXT),
        case("masked language model", lambda: Gpt(2), masked, optimizer=adam(3e-3), data=parts.characters),
        case("ViT, post-norm, class token", Vit, optimizer=warmed, **DIGITS),
        case("ResNet, strided, zero gamma", resnet, optimizer=sgd(0.05), **DIGITS),
        case("convolutions, group normalization", lambda: conv(5, norm=lambda n: nn.GroupNorm(4, n)), **DIGITS),
        case("convolutions, dropout, bf16", lambda: nn.Sequential(nn.Dropout(0.1), conv(3, nn.GELU)), **DIGITS,
             precision="bf16-mixed"),
        case("U-Net of two levels", Unet, **MASKS),
        case("diffusion of digits", Unet, noise, data=parts.digits),
        case("VAE of digits", lambda: Vae(1.0), of_x, data=FLAT["data"]),
        case("flow of a table", Spline, of_x, data=parts.table),
        Case("GAN by hand, SGD", lambda: Gan(0.02), parts.table),
        Case("two optimizers by hand", lambda: Manual(""), FLAT["data"]),
        Case("accumulated by hand, cosine", Accumulating, FLAT["data"]),
        Case("frozen average in the optimizer", Averaged, parts.digits),
        case("graph network", lambda: Gcn(2), optimizer=adam(1e-2), **GRAPH),
        case("double Q-learning, slow target", DoubleQ, of_pair, optimizer=adam(3e-3), data=parts.table),
        case("LoRA of bare parameters", lora, optimizer=adam(3e-3), **FLAT),
        case("siamese with a margin", lambda: net(64, 48, 16), pairs_of_digits, data=FLAT["data"]),
        case("three tasks", Tasks, of_pair, data=FLAT["data"]),
        case("mixture of experts, top 2", Mixture, of_pair, data=FLAT["data"]),
        case("denoising autoencoder", lambda: net(64, 32, 8, 32, 64), bottleneck, data=FLAT["data"]),
        case("batch of 4", lambda: net(13, 32, 3), data=partial(parts.table, size=4), step=parts.classify),
        case("heavy-tailed targets", lambda: net(10, 32, 32, 1), parts.regress, data=heavy, optimizer=adam(3e-3)),
        case("huber of a table, SGD", lambda: net(10, 32, 1), lambda m, b: functional.huber_loss(m(b[0]), b[1]),
             data=DIABETES["data"], optimizer=sgd(0.05)),
        case("poisson counts", lambda: net(13, 32, 1), lambda m, b: functional.poisson_nll_loss(m(b[0]), b[1]), data=counts),
        case("gaussian likelihood", lambda: net(10, 32, 2), likelihood, data=DIABETES["data"]),
        case("one class in twenty", lambda: net(64, 48, 1), parts.segment, data=imbalanced),
        case("residual batch normalization", residual_mlp, optimizer=sgd(0.1), **FLAT),
        case("self-normalizing, 6 layers", selu, **FLAT),
        case("CTC of rows", lambda: row(nn.GRU(8, 32, batch_first=True), 11), ctc, data=FLAT["data"], optimizer=adam(5e-3)),
        case("waves, GRU of two layers", lambda: row(nn.GRU(1, 24, 2, batch_first=True), 1), optimizer=adam(5e-3), **WAVES),
        case("adding, LSTM by hand", HandLstm, optimizer=adam(1e-2), **{**SUMS, "data": partial(parts.adding, times=12)}),
        case("unscaled table, batch normalization first",
             lambda: nn.Sequential(nn.BatchNorm1d(13), net(13, 48, 3)), step=parts.classify,
             data=partial(parts.table, scaled=False)),
        case("rates that fall with depth", lambda: net(64, 48, 48, 10), optimizer=head_first, **FLAT),
        case("weight averaging, large batch", lambda: net(13, 32, 32, 3), optimizer=sgd(0.1), step=parts.classify,
             data=partial(parts.table, size=160)),
        case("RMSprop, tanh", lambda: net(13, 32, 32, 3, act=nn.Tanh),
             optimizer=lambda m: torch.optim.RMSprop(m.parameters(), 1e-3), **WINE),
        case("summed loss at a fitting rate", lambda: net(64, 48, 10), optimizer=sgd(5e-4), data=FLAT["data"],
             step=lambda m, b: functional.cross_entropy(m(b[0]), b[1], reduction="sum")),
        case("transformer of bf16, clipped", lambda: Gpt(2), optimizer=adam(3e-3), **TEXT, precision="bf16-mixed",
             gradient_clip_val=1.0),
    ]  # fmt: skip
