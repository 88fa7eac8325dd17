"""Healthy programs of usual kinds: language models, vision, generative models, graphs, reinforcement, ..."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.casebook.programs import (
    Case,
    CellLoop,
    Recurrent,
    Transformer,
    adam,
    averages,
    case,
    classes,
    cnn,
    cross_entropy,
    he,
    images,
    mlp,
    next_token,
    sgd,
    squared,
    text,
    values,
)


class Residual(nn.Module):
    """A block with a skip connection."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum of input and block."""
        out: Tensor = x + self.body(x)
        return out


def resnet() -> nn.Module:
    """Four residual blocks with batch normalization."""
    blocks = [
        Residual(
            nn.Sequential(
                nn.Conv2d(12, 12, 3, padding=1, bias=False),
                nn.BatchNorm2d(12),
                nn.ReLU(),
                nn.Conv2d(12, 12, 3, padding=1, bias=False),
                nn.BatchNorm2d(12),
            )
        )
        for _ in range(4)
    ]
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
    )


class Vit(nn.Module):
    """Patches of 4 x 4, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 32, 4, 4)
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, 0.1, batch_first=True, norm_first=True, activation="gelu"
        )
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits."""
        out: Tensor = self.head(self.body(self.patch(x).flatten(2).transpose(1, 2)).mean(1))
        return out


class Unet(nn.Module):
    """One level down and up."""

    def __init__(self, n_in: int = 1) -> None:
        super().__init__()
        self.down, self.mid = nn.Conv2d(n_in, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8 + n_in, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns an image."""
        h = self.mid(self.down(x).relu()).relu()
        out: Tensor = self.out(torch.cat([self.up(h).relu(), x], 1))
        return out


def masks(n: int) -> list[Any]:
    """Images, and where they are bright."""
    return [(x, (x > 0.5).float()) for x, _ in images(n)]


class Vae(nn.Module):
    """Encoder and decoder of 20 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (
            mlp(2, n_out=8),
            nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 20)),
        )


def vae_loss(net: Any, batch: Any) -> Tensor:
    """Reconstruction and divergence."""
    x = batch[0]
    mean, log_var = net.encoder(x).chunk(2, 1)
    z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
    loss = functional.mse_loss(net.decoder(z), x, reduction="sum") / len(x)
    return loss - 0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1).mean()


class Coupling(nn.Module):
    """Four affine couplings."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 20)) for _ in range(4)
        )

    def loss(self, x: Tensor) -> Tensor:
        """Negative log-likelihood."""
        total = x.new_zeros(len(x))
        for net in self.nets:
            a, b = x.chunk(2, 1)
            scale, shift = net(a).chunk(2, 1)
            b = b * scale.tanh().exp() + shift
            total = total + scale.tanh().sum(1)
            x = torch.cat([b, a], 1)
        return (0.5 * x.square().sum(1) - total).mean()


class TwoTimescale(pl.LightningModule):
    """A GAN, by manual optimization."""

    def __init__(self, hinge: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 20))
        self.critic = nn.Sequential(nn.Linear(20, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
        self.hinge = hinge

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Trains the critic, then the generator."""
        first, second = self.optimizers()  # type: ignore[misc]
        real, z = batch[0], torch.randn(len(batch[0]), 8)
        bce = functional.binary_cross_entropy_with_logits
        on_real, on_fake = self.critic(real), self.critic(self.generator(z).detach())
        if self.hinge:
            loss = functional.relu(1 - on_real).mean() + functional.relu(1 + on_fake).mean()
        else:
            loss = bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        fooled = self.critic(self.generator(z))
        loss = -fooled.mean() if self.hinge else bce(fooled, torch.ones_like(fooled))
        second.zero_grad()
        self.manual_backward(loss)
        second.step()

    def configure_optimizers(self) -> Any:
        """Returns two optimizers."""
        return [
            torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999))
            for net in (self.critic, self.generator)
        ]


def diffusion_loss(net: Any, batch: Any) -> Tensor:
    """Noise is predicted from a noisy image and its level."""
    x = batch[0]
    t, noise = torch.rand(len(x), 1, 1, 1), torch.randn_like(x)
    noisy = (1 - t).sqrt() * x + t.sqrt() * noise
    return functional.mse_loss(net(torch.cat([noisy, t.expand_as(x)], 1)), noise)


class Graph(nn.Module):
    """Two rounds of messages on a ring of 16 nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 32), nn.Linear(32, 32)])
        self.head = nn.Linear(32, 2)
        ring = torch.eye(16) + torch.eye(16).roll(1, 0) + torch.eye(16).roll(-1, 0)
        self.register_buffer("ring", ring / 3)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits for each node."""
        for layer in self.layers:
            x = (self.ring @ layer(x)).relu()
        out: Tensor = self.head(x)
        return out


def rings(n: int) -> list[Any]:
    """Nodes, and if the mean of their neighbours is positive."""
    g = torch.Generator().manual_seed(6)
    xs = [torch.randn(16, 16, 4, generator=g) for _ in range(n)]
    return [(x, ((x + x.roll(1, 1) + x.roll(-1, 1)).sum(2) > 0).long()) for x in xs]


class Dqn(nn.Module):
    """Values of four actions, and a target network that is copied to."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = mlp(2), mlp(2)
        self.target.load_state_dict(self.online.state_dict())
        self.steps = 0

    def loss(self, x: Tensor, action: Tensor) -> Tensor:
        """Temporal-difference error with a reward for the right action."""
        self.steps += 1
        if self.steps % 20 == 0:
            self.target.load_state_dict(self.online.state_dict())
        reward = (x[:, :4].argmax(1) == action).float()
        with torch.no_grad():
            goal = reward + 0.9 * self.target(x.roll(1, 0)).amax(1)
        return functional.smooth_l1_loss(self.online(x).gather(1, action[:, None]).squeeze(1), goal)


def policy_loss(net: Any, batch: Any) -> Tensor:
    """Policy gradient with a baseline."""
    x, right = batch
    chosen = torch.distributions.Categorical(logits=net(x))
    action = chosen.sample()
    reward = (action == right).float()
    return -(chosen.log_prob(action) * (reward - reward.mean())).mean()


class Adapter(nn.Module):
    """A frozen layer with a low-rank addition whose second factor is zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Linear(layer.in_features, 4, bias=False)
        self.b = nn.Linear(4, layer.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum."""
        out: Tensor = self.layer(x) + self.b(self.a(x))
        return out


def adapted() -> nn.Module:
    """A network of adapters."""
    net = mlp(4, nn.ReLU, he)
    return nn.Sequential(*(Adapter(m) if isinstance(m, nn.Linear) else m for m in net))


def frozen() -> nn.Module:
    """A frozen body and a head."""
    net = cnn(3)
    net[:-1].requires_grad_(False)
    return net


def contrastive(net: Any, batch: Any) -> Tensor:
    """Two views of the same inputs are told from others."""
    x = batch[0]
    a, b = (functional.normalize(net(x + 0.1 * torch.randn_like(x)), dim=1) for _ in range(2))
    return functional.cross_entropy(a @ b.T / 0.2, torch.arange(len(x)))


def triplet(net: Any, batch: Any) -> Tensor:
    """Triplets of inputs, near and far."""
    x = batch[0]
    return functional.triplet_margin_loss(net(x), net(x + 0.1 * torch.randn_like(x)), net(x.roll(1, 0)))


class Tasks(nn.Module):
    """A body with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = mlp(2, n_out=32), nn.Linear(32, 4), nn.Linear(32, 1)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Classes and values."""
        h = self.body(x).relu()
        return functional.cross_entropy(self.one(h), y) + functional.mse_loss(self.two(h), x[:, :1])


class Experts(nn.Module):
    """The best of four experts, weighted by its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(20, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits."""
        weight, chosen = self.gate(x).softmax(1).max(1)
        out = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out[chosen == i] = expert(x[chosen == i])
        return out * weight[:, None] * 4


class Averaged(nn.Module):
    """A teacher that is the moving average of its student, which predicts it from another view."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.predictor, self.teacher = mlp(2, n_out=16), nn.Linear(16, 16), mlp(2, n_out=16)

    def loss(self, x: Tensor) -> Tensor:
        """Distance of the views."""
        with torch.no_grad():
            for p, q in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                q.lerp_(p, 0.02)
            goal = functional.normalize(self.teacher(x + 0.1 * torch.randn_like(x)), dim=1)
        return (functional.normalize(self.predictor(self.student(x)), dim=1) - goal).square().sum(1).mean()


def distilled(net: Any, batch: Any) -> Tensor:
    """A student learns from a teacher's probabilities."""
    x, y = batch
    soft = functional.one_hot(y, 4).float() * 0.8 + 0.05
    return functional.kl_div(net(x).log_softmax(1), soft, reduction="batchmean")


def multilabel(n: int) -> list[Any]:
    """Signs of linear functions."""
    return [(x, (y > 0).float()) for x, y in values(n, columns=5)]


def with_bce(net: Any, batch: Any) -> Tensor:
    """Binary cross-entropy of logits."""
    return functional.binary_cross_entropy_with_logits(net(batch[0]), batch[1])


def autoencoder(net: Any, batch: Any) -> Tensor:
    """Reconstruction."""
    return functional.mse_loss(net(batch[0]), batch[0])


def of_loss(net: Any, batch: Any) -> Tensor:
    """The network's own loss of the inputs."""
    return net.loss(batch[0])


def of_pair(net: Any, batch: Any) -> Tensor:
    """The network's own loss of inputs and targets."""
    return net.loss(*batch)


def per_step(net: Any, batch: Any) -> Tensor:
    """A class at each time, of the running mean."""
    x = batch[0]
    means = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
    return functional.cross_entropy(net.head(net.rnn(x)[0]).flatten(0, 1), means.argmax(2).flatten())


def warmed_up(net: nn.Module) -> Any:
    """Adam whose rate rises from 0, and falls."""
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(s / 50, max(0.0, (200 - s) / 150)))
    return [optimizer], [{"scheduler": rate, "interval": "step"}]


def deep_residual() -> nn.Module:
    """Thirty residual blocks with layer normalization first."""
    blocks = [
        Residual(nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 48)))
        for _ in range(20)
    ]
    return nn.Sequential(nn.Linear(20, 48), *blocks, nn.Linear(48, 4))


def zero_residual() -> nn.Module:
    """Residual blocks that begin as the identity, and a head of zeros."""
    net = deep_residual()
    for block in list(net)[1:-1]:
        nn.init.zeros_(block.body[-1].weight)
    nn.init.zeros_(net[-1].weight)  # type: ignore[index]
    return net


def cases() -> list[Case]:
    """Returns all of them."""
    lm = {"data": text, "step": next_token}
    bf16 = {"precision": "bf16-mixed"}
    rare = lambda n: [(x, (y.squeeze(1) > 1.2).float()[:, None]) for x, y in values(n)]  # noqa: E731
    return [
        case("language model", Transformer, optimizer=adam(3e-3), **lm),
        case("language model, deeper", lambda: Transformer(4), optimizer=adam(1e-3), **lm),
        case("language model, post-norm, warm-up", lambda: Transformer(2, False), optimizer=warmed_up, **lm),
        case("language model, bf16", Transformer, optimizer=adam(3e-3), **lm, **bf16),
        case("ViT", Vit, data=images),
        case("ResNet", resnet, data=images, optimizer=sgd(0.05)),
        case("plain CNN", cnn, data=images),
        case("U-Net", Unet, with_bce, data=masks),
        case("diffusion", lambda: Unet(2), diffusion_loss, data=images),
        case("VAE", Vae, vae_loss),
        case("flow", Coupling, of_loss),
        Case("GAN", TwoTimescale, classes),
        Case("GAN, hinge", lambda: TwoTimescale(True), classes),
        case(
            "GNN",
            Graph,
            lambda n, b: functional.cross_entropy(n(b[0]).flatten(0, 1), b[1].flatten()),
            data=rings,
        ),
        case("DQN with target network", Dqn, of_pair),
        case("policy gradient", mlp, policy_loss, optimizer=adam(3e-3)),
        case("LoRA", adapted, optimizer=adam(3e-3)),
        case(
            "frozen backbone",
            frozen,
            data=images,
            optimizer=lambda n: torch.optim.Adam([p for p in n.parameters() if p.requires_grad], 1e-2),
        ),
        case("frozen backbone, all held", frozen, data=images, optimizer=adam(1e-2)),
        case("siamese", lambda: mlp(2, n_out=16), contrastive),
        case("triplets", lambda: mlp(2, n_out=16), triplet),
        case("multi-task", Tasks, of_pair),
        case("mixture of experts", Experts, optimizer=adam(3e-3)),
        case("moving average", Averaged, of_loss),
        case("distillation", mlp, distilled),
        case("multi-label", lambda: mlp(n_out=5), with_bce, data=multilabel),
        case("rare positives", lambda: mlp(n_out=1), with_bce, data=rare),
        case("autoencoder", lambda: mlp(n_out=20), autoencoder),
        case(
            "LSTM classifier",
            lambda: Recurrent(nn.LSTM(4, 24, batch_first=True)),
            data=averages,
            optimizer=adam(5e-3),
        ),
        case("GRU, per step", lambda: Recurrent(nn.GRU(4, 24, batch_first=True)), per_step, data=averages),
        case("GRU cell in a loop", lambda: CellLoop(nn.GRUCell(4, 24)), data=averages, optimizer=adam(5e-3)),
        case("warm-up and decay", mlp, optimizer=warmed_up),
        case("deep residual", deep_residual),
        case("zero-initialized residual", zero_residual),
        case(
            "label smoothing", mlp, lambda n, b: functional.cross_entropy(n(b[0]), b[1], label_smoothing=0.1)
        ),
        case(
            "class weights",
            mlp,
            lambda n, b: functional.cross_entropy(n(b[0]), b[1], torch.tensor([1.0, 2, 3, 4])),
        ),
        case("regression", lambda: mlp(n_out=1), squared, data=values),
        case(
            "huber, several columns",
            lambda: mlp(n_out=5),
            lambda n, b: functional.huber_loss(n(b[0]), b[1]),
            data=partial(values, columns=5),
            optimizer=sgd(0.05),
        ),
        case("accumulation", mlp, cross_entropy, optimizer=sgd(0.1), accumulate_grad_batches=4),
        case(
            "dropout, clipping by the Trainer",
            lambda: nn.Sequential(nn.Dropout(0.2), mlp(norm=True)),
            optimizer=sgd(0.1),
            gradient_clip_val=1.0,
        ),
    ]
