"""The networks of the scenarios, a few thousand parameters each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.programs import CONTEXT

SYMBOLS = 96


class RecurrentLM(nn.Module):
    """A recurrent language model by character."""

    def __init__(self, cell: type[nn.RNNBase] = nn.GRU, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 32)
        self.cell = cell(32, width, batch_first=True)  # type: ignore[call-arg, arg-type]
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, symbols: Tensor) -> Any:
        return self.head(self.cell(self.embedding(symbols))[0])


class Block(nn.Module):
    """Attention and a feed-forward layer, normalized before (or after, as in 2017)."""

    def __init__(self, width: int, *, causal: bool, post_norm: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.causal = causal
        self.post_norm = post_norm

    def _attend(self, x: Tensor) -> Any:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))

    def forward(self, x: Tensor) -> Any:
        if self.post_norm:
            x = self.norms[0](x + self._attend(x))
            return self.norms[1](x + self.feed(x))
        x = x + self._attend(self.norms[0](x))
        return x + self.feed(self.norms[1](x))


class GPT(nn.Module):
    """A small transformer language model by character."""

    def __init__(self, width: int = 48, depth: int = 2, *, post_norm: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, width)
        self.place = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.Sequential(
            *(Block(width, causal=True, post_norm=post_norm) for _ in range(depth)), nn.LayerNorm(width)
        )
        self.head = nn.Linear(width, SYMBOLS)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, symbols: Tensor) -> Any:
        return self.head(self.blocks(self.embedding(symbols) + self.place[: symbols.shape[1]]))


class ViT(nn.Module):
    """A small vision transformer for 8 x 8 images."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Linear(4, width)
        self.place = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Any:
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.blocks(self.patch(patches) + self.place).mean(1))


class ResNet(nn.Module):
    """A small residual network with batch normalization, for 8 x 8 images."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Any:
        x = self.stem(images.view(-1, 1, 8, 8)).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean((2, 3)))


class CNN(nn.Module):
    """Two convolutions without normalization, for 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(96, 10),
        )

    def forward(self, images: Tensor) -> Any:
        return self.net(images.view(-1, 1, 8, 8))


class VAE(nn.Module):
    """A variational autoencoder of digits; returns reconstruction, mean and log variance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, 1)
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance


class Flow(nn.Module):
    """Affine couplings of two numbers; returns the negative log likelihood of each point."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2)) for _ in range(depth)
        )

    def forward(self, points: Tensor) -> Tensor:
        a, b = points.chunk(2, 1)
        log_determinant = torch.zeros(len(points))
        for net in self.nets:
            shift, scale = net(a).chunk(2, 1)
            b = b * scale.tanh().exp() + shift
            log_determinant = log_determinant + scale.tanh()[:, 0]
            a, b = b, a
        return 0.5 * (a.square() + b.square())[:, 0] - log_determinant + 1.8379
