"""The networks whose steps are metered and timed, with the data that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from torch import Tensor, nn

#: Elements of each tensor of the network whose operations are counted.
ELEMENTS = 16_384


class Network(pl.LightningModule):
    """A network, its one batch, and AdamW.

    Args:
        seed: Of weights and data.
        fused: True if AdamW steps in one kernel. Nothing is faster, which makes it the harshest to be
            compared with.
    """

    batch: Any = None

    def __init__(self, seed: int = 0, *, fused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fused = fused

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=self.fused)


class Block(nn.Module):
    """A transformer's block, normalized ahead of attention and of the MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attention(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        down: Tensor = self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return x + down


class GPT(Network):
    """A small GPT.

    Args:
        layers: Number of blocks.
        width: Of the residual stream.
        heads: Of attention.
        vocabulary: Number of tokens.
        batch: Shape of a batch, sequences and their length.
        seed: Of weights and data.
        fused: As above.
    """

    def __init__(
        self,
        layers: int = 12,
        width: int = 384,
        heads: int = 6,
        vocabulary: int = 10_240,
        batch: tuple[int, int] = (2, 128),
        seed: int = 0,
        *,
        fused: bool = True,
    ) -> None:
        super().__init__(seed, fused=fused)
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(batch[1], width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.batch = torch.randint(vocabulary, (batch[0], batch[1] + 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        x = self.tokens(inputs) + self.places.weight
        logits = self.head(self.norm(self.blocks(x)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Residual(nn.Module):
    """Two convolutions, and a way around them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        around = [nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
        self.around = nn.Sequential(*(around if stride > 1 else []))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


class ResNet(Network):
    """The 34-layer ResNet, on small images."""

    def __init__(self, seed: int = 0, *, fused: bool = True) -> None:
        super().__init__(seed, fused=fused)
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        blocks, channels = [], 64
        for out, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for i in range(depth):
                blocks.append(Residual(channels, out, stride=2 if i == 0 and out > 64 else 1))
                channels = out
        self.net = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
        self.batch = (torch.randn(4, 3, 64, 64), torch.randint(1000, (4,)))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Many(Network):
    """A thousand small layers, two thousand tensors: what costs something for each of them shows."""

    def __init__(self, seed: int = 0, *, fused: bool = True) -> None:
        super().__init__(seed, fused=fused)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(1000))
        self.batch = torch.randn(8, 32)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch
        for layer in self.layers:
            x = x + 0.1 * layer(x).relu()
        return x.square().mean()


class Boring(BoringModel):
    """Lightning's smallest module, whose step is all overhead."""

    def __init__(self, seed: int = 0, *, fused: bool = True) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.fused = fused
        self.batch = torch.randn(1, 32)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=self.fused)


class Counted(Network):
    """A number of tensors of the same size, each with a gradient from autograd.

    Args:
        tensors: Their number.
        seed: Of weights and data.
        fused: As above.
    """

    def __init__(self, tensors: int, seed: int = 0, *, fused: bool = True) -> None:
        super().__init__(seed, fused=fused)
        self.weights = nn.ParameterList(torch.randn(ELEMENTS // 64, 64) / 100 for _ in range(tensors))
        self.batch = torch.ones(())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.stack([(weight * weight).sum() for weight in self.weights]).sum() * batch


class Tensors:
    """Weights, gradients and the optimizer's state, for several networks to train in turn.

    Addresses of memory change the speed of kernels by more than the measured differences: all share them.

    Args:
        like: Makes a network with parameters of these shapes.
    """

    def __init__(self, like: Callable[[], nn.Module]) -> None:
        self.weights = [parameter.detach() for parameter in like().parameters()]
        self.averages = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in self.weights]
        self._gradients = [torch.empty_like(weight) for weight in self.weights]
        self._prepared = [torch.randn_like(weight) for weight in self.weights]
        torch._foreach_mul_(self._prepared, 2 / float(torch.nn.utils.get_total_norm(self._prepared)))

    def hand_out(self, weights: Iterable[nn.Parameter]) -> None:
        """Writes the gradients, in place of a backward pass."""
        torch._foreach_copy_(self._gradients, self._prepared)
        for weight, gradient in zip(weights, self._gradients, strict=True):
            weight.grad = gradient


class Prepared(Network):
    """A network whose gradients cost next to nothing.

    A step consists of Lightning, its hooks and the optimizer, so that additions to it show. The total
    norm of the gradients is 2, so that clipping at 1 takes effect.

    Args:
        tensors: The trained tensors.
        fused: As above.
    """

    def __init__(self, tensors: Tensors, *, fused: bool = True) -> None:
        super().__init__(fused=fused)
        self.weights = nn.ParameterList(nn.Parameter(weight) for weight in tensors.weights)
        self.batch = torch.ones(())
        self._tensors = tensors

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = _Handing.apply(self.weights[0], self)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        for weight, (mean, square) in zip(self.weights, self._tensors.averages, strict=True):
            optimizer.state[weight] = {"step": torch.zeros(()), "exp_avg": mean, "exp_avg_sq": square}
        return optimizer

    def hand_out(self) -> None:
        """Writes the gradients, in place of a backward pass."""
        self._tensors.hand_out(self.weights)


class _Handing(torch.autograd.Function):
    """A loss with prepared gradients."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, network: Prepared) -> Tensor:
        ctx.network = network
        return weight.new_ones(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        ctx.network.hand_out()
        return None, None


#: Those that are timed as a whole.
NETWORKS: dict[str, Callable[..., pl.LightningModule]] = {
    "GPT": GPT,
    "ResNet-34": ResNet,
    "2,000 small tensors": Many,
    "BoringModel": Boring,
}
#: Those large enough for the time of their tensors to matter.
LARGE = ("GPT", "ResNet-34", "2,000 small tensors")
