"""Networks and data of the second collection: real tables and digits, text, sequences, graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional

LICENSE = Path(__file__).parents[2] / "LICENSE"


@cache
def _table(name: str) -> tuple[Tensor, Tensor]:
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)


def table(n: int, name: str = "wine", size: int = 48, scaled: bool = True) -> list[Any]:
    """Rows of a table with labels, or with a target of unit variance for `diabetes`."""
    x, y = _table(name)
    x = (x - x.mean(0)) / (x.std(0) + 1e-6) if scaled else x
    y = ((y.float() - y.float().mean()) / y.float().std())[:, None] if name == "diabetes" else y.long()
    g = torch.Generator().manual_seed(11)
    chosen = [torch.randint(len(x), (size,), generator=g) for _ in range(n)]
    return [(x[i], y[i]) for i in chosen]


def digits(n: int, size: int = 48, scale: float = 1.0, flat: bool = False) -> list[Any]:
    """Digits of 8 x 8 pixels, about unit scale, with their classes."""
    found = table(n, "digits", size, scaled=False)
    return [((x / 8 - 0.6).reshape(-1, *((64,) if flat else (1, 8, 8))) * scale, y) for x, y in found]


def characters(n: int, length: int = 24, size: int = 16) -> list[Any]:
    """Characters of a licence, and the next ones."""
    codes = torch.tensor([ord(c) % 96 for c in LICENSE.read_text(encoding="utf-8")])
    g = torch.Generator().manual_seed(12)
    starts = [torch.randint(len(codes) - length - 1, (size, 1), generator=g) for _ in range(n)]
    found = [codes[s + torch.arange(length + 1)] for s in starts]
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in found]


def adding(n: int, times: int = 60, size: int = 32) -> list[Any]:
    """The adding problem: the sum of the two marked numbers, both early in the sequence."""
    g = torch.Generator().manual_seed(13)
    found = []
    for _ in range(n):
        x = torch.rand(size, times, 2, generator=g)
        x[..., 1] = 0
        rows, first = torch.arange(size), torch.randint(5, (size,), generator=g)
        x[rows, first, 1] = x[rows, first + 5, 1] = 1
        found.append((x, (x[..., 0] * x[..., 1]).sum(1, keepdim=True) - 1))
    return found


def waves(n: int, times: int = 20, size: int = 32) -> list[Any]:
    """Noisy sine waves, and their next values at each time."""
    g = torch.Generator().manual_seed(14)
    found = []
    for _ in range(n):
        phase, speed = torch.rand(2, size, 1, generator=g)
        t = torch.arange(times + 1)
        x = (6.3 * phase + (0.2 + 0.6 * speed) * t).sin() + 0.05 * torch.randn(size, times + 1, generator=g)
        found.append((x[:, :-1, None].contiguous(), x[:, 1:, None].contiguous()))
    return found


def graph(n: int, nodes: int = 48) -> list[Any]:
    """One random graph of two communities: features, edges of shape `(2, e)`, communities."""
    g = torch.Generator().manual_seed(15)
    y = torch.arange(nodes) % 2
    near = torch.rand(nodes, nodes, generator=g) < torch.where(y[:, None] == y, 0.2, 0.03)
    edges = (near | near.T | torch.eye(nodes, dtype=torch.bool)).nonzero().T.contiguous()
    teacher = torch.randn(2, 8, generator=g) * 0.5
    return [(teacher[y] + torch.randn(nodes, 8, generator=g), edges, y) for _ in range(n)]


def net(
    *widths: int, act: Callable[[], nn.Module] = nn.ReLU, norm: Callable[[int], nn.Module] | None = None
) -> nn.Sequential:
    """Linear layers of the widths, with an activation in between."""
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), *([] if norm is None else [norm(b)]), act()]
    return nn.Sequential(*layers[: -1 if norm is None else -2])


def conv(
    depth: int,
    act: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[int], nn.Module] | None = None,
    width: int = 16,
    n_out: int = 10,
) -> nn.Sequential:
    """Convolutions on digits, pooled to classes."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(width if i else 1, width, 3, padding=1)]
        layers += [*([] if norm is None else [norm(width)]), act()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, n_out))


class Residual(nn.Module):
    """A block whose input is added, by a factor."""

    def __init__(self, body: nn.Module, scale: float = 1.0, skip: float = 1.0) -> None:
        super().__init__()
        self.body, self.scale, self.skip = body, scale, skip

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum."""
        out: Tensor = self.skip * x + self.scale * self.body(x)
        return out


class Attention(nn.Module):
    """Causal self-attention that is written by hand; queries are scaled."""

    def __init__(self, width: int, heads: int = 4, scale: float = 1.0) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mixed values."""
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = self.scale * q @ k.transpose(-1, -2) / (width / self.heads) ** 0.5
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
        out: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, width))
        return out


class Gpt(nn.Module):
    """A character model of blocks that are written by hand, with tied embeddings if wanted."""

    def __init__(
        self,
        depth: int = 2,
        width: int = 32,
        *,
        place: str = "pre",
        scale: float = 1.0,
        tied: bool = False,
        act: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.place = place
        self.embed, self.position = nn.Embedding(96, width), nn.Parameter(0.02 * torch.randn(64, width))
        self.mix = nn.ModuleList(Attention(width, scale=scale) for _ in range(depth))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), act(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.head = nn.Linear(width, 96, bias=False)
        if tied:
            nn.init.normal_(self.embed.weight, 0, 0.02)
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits of shape `(n, time, 96)`."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for i, (mix, feed) in enumerate(zip(self.mix, self.feed, strict=True)):
            one, two = self.norms[2 * i], self.norms[2 * i + 1]
            if self.place == "pre":
                x = x + mix(one(x))
                x = x + feed(two(x))
            elif self.place == "post":
                x = two((h := one(x + mix(x))) + feed(h))
            else:  # no skip
                x = feed(mix(x))
        out: Tensor = self.head(self.norms[-1](x) if self.place == "pre" else x)
        return out


class Sequence(nn.Module):
    """A recurrent module and a head on its last output, or on all."""

    def __init__(self, rnn: nn.RNNBase, n_out: int = 1, last: bool = True) -> None:
        super().__init__()
        self.encoder, self.last = rnn, last
        self.readout = nn.Linear(rnn.hidden_size * (2 if rnn.bidirectional else 1), n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Returns answers."""
        h = self.encoder(x)[0]
        out: Tensor = self.readout(h[:, -1] if self.last else h)
        return out


class HandRnn(nn.Module):
    """A recurrence of two linear layers that are called at each time."""

    def __init__(self, gain: float, width: int = 24, act: Any = torch.tanh) -> None:
        super().__init__()
        self.width, self.act = width, act
        self.enter, self.again, self.leave = nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 1)
        nn.init.orthogonal_(self.again.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Returns one number for each sequence."""
        h = x.new_zeros(len(x), self.width)
        for t in range(x.shape[1]):
            h = self.act(self.enter(x[:, t]) + self.again(h))
        out: Tensor = self.leave(h)
        return out


class HandLstm(nn.Module):
    """An LSTM cell of one linear layer, by hand; its inputs are scaled."""

    def __init__(self, scale: float = 1.0, width: int = 24) -> None:
        super().__init__()
        self.scale, self.width = scale, width
        self.gates, self.leave = nn.Linear(2 + width, 4 * width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns one number for each sequence."""
        h = c = x.new_zeros(len(x), self.width)
        for t in range(x.shape[1]):
            i, f, g, o = self.gates(torch.cat([self.scale * x[:, t], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        out: Tensor = self.leave(h)
        return out


class Gcn(nn.Module):
    """Rounds of messages that are summed by `index_add`, divided by the degree."""

    def __init__(self, depth: int = 2, width: int = 24, act: Any = torch.relu) -> None:
        super().__init__()
        self.act = act
        self.rounds = nn.ModuleList(nn.Linear(8 if i == 0 else width, width) for i in range(depth))
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Returns logits for each node."""
        degree = torch.bincount(edges[0], minlength=len(x))[:, None]
        for layer in self.rounds:
            h = layer(x)
            x = self.act(h.new_zeros(h.shape).index_add(0, edges[0], h[edges[1]]) / degree)
        out: Tensor = self.out(x)
        return out


class Unet(nn.Module):
    """Two levels down and up."""

    def __init__(self, act: Any = torch.relu, cut: bool = False) -> None:
        super().__init__()
        self.act, self.cut = act, cut
        self.down1, self.down2 = nn.Conv2d(1, 12, 3, 1, 1), nn.Conv2d(12, 24, 3, 2, 1)
        self.middle = nn.Conv2d(24, 24, 3, 2, 1)
        self.up2, self.up1 = nn.ConvTranspose2d(24, 24, 2, 2), nn.ConvTranspose2d(48, 12, 2, 2)
        self.out = nn.Conv2d(24, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of logits."""
        a = self.act(self.down1(x))
        b = self.act(self.down2(a))
        c = self.act(self.middle(b))
        if self.cut:
            a, b, c = a.detach(), b.detach(), c.detach()
        d = self.act(self.up2(c))
        e = self.act(self.up1(torch.cat([d, b], 1)))
        out: Tensor = self.out(torch.cat([e, a], 1))
        return out


def masks(n: int) -> list[Any]:
    """Noisy digits, and where they are bright."""
    return [(x + 0.3 * torch.randn(x.shape), (x > 0).float()) for x, _ in digits(n, 24)]


def classify(model: Any, batch: Any) -> Tensor:
    """Cross-entropy of logits."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def regress(model: Any, batch: Any) -> Tensor:
    """Mean squared error."""
    return functional.mse_loss(model(batch[0]), batch[1])


def spell(model: Any, batch: Any) -> Tensor:
    """Cross-entropy of the next characters."""
    return functional.cross_entropy(model(batch[0]).transpose(1, 2), batch[1])


def nodes(model: Any, batch: Any) -> Tensor:
    """Cross-entropy of the nodes of a graph."""
    return functional.cross_entropy(model(batch[0], batch[1]), batch[2])


def segment(model: Any, batch: Any) -> Tensor:
    """Binary cross-entropy of each pixel."""
    return functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def filled(std: float) -> Callable[[nn.Module], None]:
    """Returns a change that draws each matrix from a normal distribution."""
    return partial(_fill, std)


def _fill(std: float, model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, std)
