"""Five small networks of the fault campaign, which learn within a second."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

Batch: TypeAlias = dict[str, Tensor]

SIZE = 16
CLASSES = 4
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=2e-2),
}


class Task(pl.LightningModule):
    """A classifier with a loss that some batches make nonfinite.

    Args:
        optimizer: One of `OPTIMIZERS`.
        seed: Of the weights.
    """

    def __init__(self, optimizer: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.optimizer = optimizer
        self.build()

    def build(self) -> None:
        raise NotImplementedError

    def logits(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        logits = self.logits(batch)
        loss = nn.functional.cross_entropy(logits, batch["y"]) + faulty_terms(batch["bugs"], logits)
        loss = loss + reported_terms(batch, logits)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=SIZE)
        return loss

    def score(self, batch: Batch) -> float:
        """Loss on held-out data."""
        batch = {**batch, "x": batch["x"].to(next(self.parameters()).dtype)}
        with torch.no_grad():
            return float(nn.functional.cross_entropy(self.logits(batch), batch["y"]))

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class MLP(Task):
    """Batch normalization and dropout between three layers."""

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU()
        )
        self.head = nn.Linear(32, CLASSES)

    def logits(self, batch: Batch) -> Tensor:
        return self.head(self.net(batch["x"]))  # type: ignore[no-any-return]


class CNN(Task):
    """Two convolutions over the input as a picture of one row."""

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Conv1d(1, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 16, 5)
        )
        self.head = nn.Linear(16 * 6, CLASSES)

    def logits(self, batch: Batch) -> Tensor:
        return self.head(self.net(batch["x"].unsqueeze(1)).relu().flatten(1))  # type: ignore[no-any-return]


class RNN(Task):
    """A tanh network that reads the input number by number, with an orthogonal recurrent weight."""

    def build(self) -> None:
        self.cell = nn.RNNCell(4, 32)
        nn.init.orthogonal_(self.cell.weight_hh)
        self.head = nn.Linear(32, CLASSES)

    def logits(self, batch: Batch) -> Tensor:
        state = batch["x"].new_zeros(len(batch["x"]), 32)
        for numbers in batch["x"].view(-1, 5, 4).unbind(1):
            state = self.cell(numbers, state)
        return self.head(state)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention with one head and a mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        query, key, value = self.project(tokens).chunk(3, dim=-1)
        scores = (query @ key.transpose(1, 2)) / key.shape[-1] ** 0.5
        scores = scores.masked_fill(hidden.unsqueeze(1), -torch.inf)
        return self.out(scores.softmax(-1) @ value)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a feed-forward network, each beside a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm(tokens), hidden)
        return tokens + self.feed(tokens)  # type: ignore[no-any-return]


class Transformer(Task):
    """Two pre-norm blocks over five tokens."""

    def build(self) -> None:
        self.embed = nn.Linear(4, 16)
        self.places = nn.Parameter(torch.randn(5, 16) * 0.1)
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, CLASSES))

    def logits(self, batch: Batch) -> Tensor:
        tokens = self.embed(batch["x"].view(-1, 5, 4)) + self.places
        for block in self.blocks:
            tokens = block(tokens, batch["hidden"])
        return self.head(tokens.mean(1))  # type: ignore[no-any-return]


class GAN(Task):
    """Two networks with an optimizer each, stepped by hand; one has to find the mean of the data."""

    def build(self) -> None:
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 20))
        self.critic = nn.Sequential(nn.Linear(20, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
        self.head = self.critic[2]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        noise = torch.randn(len(batch["x"]), 4)
        for name, optimizer in zip(("critic", "generator"), optimizers, strict=True):
            self.toggle_optimizer(optimizer)
            made = self.generator(noise)
            if name == "critic":
                scores = self.critic(torch.cat([batch["x"], made.detach()])).squeeze(1)
                wanted = torch.cat([torch.ones(len(made)), torch.zeros(len(made))])
                wanted[: len(made)][batch["y"] == -100] = torch.nan
            else:
                scores, wanted = self.critic(made).squeeze(1), torch.ones(len(made))
            loss = nn.functional.binary_cross_entropy_with_logits(scores.float(), wanted)
            loss = loss + faulty_terms(batch["bugs"], scores) + reported_terms(batch, scores)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
            self.log(f"{name}_loss", loss, on_step=True, on_epoch=True, batch_size=SIZE)
        return None

    def score(self, batch: Batch) -> float:
        """Distance of the mean of generated samples from that of the data."""
        with torch.no_grad():
            noise = torch.randn(1000, 4, generator=torch.Generator().manual_seed(5))
            noise = noise.to(next(self.parameters()).dtype)
            return float((self.generator(noise).mean(0) - batch["x"].mean(0)).norm())

    def configure_optimizers(self) -> Any:
        optimizers = [
            OPTIMIZERS[self.optimizer](network.parameters()) for network in (self.critic, self.generator)
        ]
        for optimizer in optimizers:
            # two players: momentum overshoots at the rate that suits one
            optimizer.param_groups[0]["lr"] *= 0.06 if self.optimizer == "SGD" else 3
        return optimizers, []


MODELS: dict[str, type[Task]] = {
    "MLP": MLP,
    "CNN": CNN,
    "RNN": RNN,
    "transformer": Transformer,
    "GAN": GAN,
}

#: Places of `batch["bugs"]`: 1 there makes the term of that name go wrong.
BUGS = ("log(0)", "division by zero", "sqrt at 0")


def faulty_terms(bugs: Tensor, output: Tensor) -> Tensor:
    """Terms of a loss that are finite for most data, but not for all.

    Args:
        bugs: Shape `(3,)`, zeros; see `BUGS`.
        output: Of the network; its size is kept small.
    """
    log, division, root = (1 - bugs).unbind()
    size = (output.float().square().sum() * root).sqrt()
    return log.log() + (division / division - 1) + 1e-3 * size


def reported_terms(batch: Batch, output: Tensor) -> Tensor:
    """Terms of a loss that only the batch with the fault has."""
    total = output.new_zeros((), dtype=torch.float32)
    if "exponent" in batch:
        log_variance = batch["exponent"] + output.float().reshape(SIZE, -1).mean(1)
        total = total + 1e-3 * log_variance.exp().sum()
    if "location" in batch:
        total = total - torch.distributions.Normal(batch["location"], 1.0).log_prob(output.float().mean())
    if "compiled" in batch:
        total = total + _compiled(output.float().mean())
    return total


def _nan_backend(graph: Any, inputs: Any) -> Any:
    """A compiler that makes code with a fault."""
    return lambda *args: tuple(result * torch.nan for result in graph.forward(*args))


@torch.compile(backend=_nan_backend)
def _compiled(value: Tensor) -> Tensor:
    return value * 0.0


def batches(n: int, seed: int = 0) -> list[Batch]:
    """Four classes, each around a centre of its own, in twenty numbers."""
    centres = torch.randn(CLASSES, 20, generator=torch.Generator().manual_seed(99)) + 1
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(n):
        target = torch.randint(CLASSES, (SIZE,), generator=generator)
        inputs = centres[target] + torch.randn(SIZE, 20, generator=generator)
        found.append(
            {
                "ids": torch.arange(index * SIZE, (index + 1) * SIZE),
                "x": inputs,
                "y": target,
                "hidden": torch.zeros(SIZE, 5, dtype=torch.bool),
                "bugs": torch.zeros(len(BUGS)),
            }
        )
    return found
