"""What is computed over another dimension than is meant is named, what looks like it or is meant never."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.callbacks.test_training_diagnosis import Task, diagnosed
from tests.tasks import batches

Batches = list[tuple[Tensor, Tensor]]


class Sequences(nn.Module):
    """A recurrent or an attention layer over sequences of eight numbers."""

    def __init__(self, layer: nn.Module, transposed: bool = False) -> None:
        super().__init__()
        self.layer, self.head, self.transposed = layer, nn.Linear(8, 4), transposed

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x.transpose(0, 1) if self.transposed else x)
        out = out[0] if isinstance(out, tuple) else out
        logits: Tensor = self.head(out[-1] if self.transposed else out[:, -1])
        return logits


class Tokens(nn.Module):
    """One layer of attention over tokens, of which 0 is padding."""

    def __init__(self, mask: Tensor | None = None, ignores: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mask, self.ignores = mask, ignores

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        padding = None if self.ignores is None else self.ignores(tokens)
        out: Tensor = self.head(x + self.attend(x, x, x, key_padding_mask=padding, attn_mask=self.mask)[0])
        return out


class Relative(Tokens):
    """Attention whose scores are of distances, by the shift of Transformer-XL."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        values, (n, length) = self.head(x), tokens.shape
        distances = functional.pad(x @ self.head.weight[:length].T, (1, 0))
        scores = distances.view(n, length + 1, length)[:, 1:].view(n, length, length)
        out: Tensor = scores.masked_fill(LATER.T, -1e9).softmax(-1) @ values
        return out


class ByHand(Tokens):
    """The same by a softmax of masked scores."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        scores = x @ x.transpose(1, 2)
        weights = scores.masked_fill(self.mask, -1e9).softmax(-1)
        out: Tensor = self.head(x + weights @ x)
        return out


class BothWays(Tokens):
    """Reads in both directions, by attention to earlier tokens and by one to later ones."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        ways = [self.attend(x, x, x, attn_mask=mask)[0] for mask in (LATER, LATER.T)]
        out: Tensor = self.head(x + ways[0] + ways[1])
        return out


class Tabular(nn.Module):
    """A table of which one column has a branch of its own, with a normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.hidden, self.head = nn.LayerNorm(1), nn.Linear(20, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(torch.cat([self.norm(x[:, :1]), x[:, 1:]], 1)).relu())
        return logits


class Channels(nn.Module):
    """A convolution of images whose channels come last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(x.view(len(x), 3, 5, 6)).mean((2, 3)))
        return logits


def images() -> Batches:
    return [(torch.randn(16, 5, 6, 3), torch.randint(4, (16,))) for _ in range(4)]


def sequences(transposed: bool = False) -> Batches:
    found = [(torch.randn(16, 6, 8), torch.randint(4, (16,))) for _ in range(4)]
    return [(x.transpose(0, 1) if transposed else x, y) for x, y in found]


def texts(backwards: bool = False) -> Batches:
    found = [torch.randint(1, 12, (16, 7)) for _ in range(4)]
    if backwards:  # each text counts
        found = [(t[:, :1] + torch.arange(7)) % 11 + 1 for t in found]
    return [(t[:, 1:], t[:, :-1]) if backwards else (t[:, :-1], t[:, 1:]) for t in found]


def windows() -> Batches:
    """Windows of one text in the order of their starts, with the time first."""
    text = torch.randint(12, (100,))
    places = torch.arange(6)[:, None] + torch.arange(16)
    return [(text[places + i * 16], text[places + i * 16 + 1]) for i in range(4)]


def padded() -> Batches:
    generator = torch.Generator().manual_seed(0)  # of one data set in eight the loss falls by chance
    found = [torch.randint(1, 12, (16, 6), generator=generator) for _ in range(30)]
    return [(t * (torch.arange(6) < 4), t[:, 2]) for t in found]


def of_tokens(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def by_class(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.transpose(1, 2).reshape(16, 12, 6), target)


def of_first(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, 0], target)


def over_batch(logits: Tensor, target: Tensor) -> Tensor:
    return -logits.softmax(0).log().gather(1, target[:, None]).mean()


def over_batch_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    shares = logits.exp() / logits.exp().sum(0)
    return (shares - functional.one_hot(target, 4)).square().mean()


def balanced(logits: Tensor, target: Tensor) -> Tensor:
    """Gives each class as many samples, by the iterations of Sinkhorn."""
    shares = logits.softmax(1)
    for _ in range(3):
        shares = shares / shares.sum(0)
        shares = shares / shares.sum(1, keepdim=True)
    return -shares.gather(1, target[:, None]).log().mean()


def _adam(net: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), 0.03)


def slow(net: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 1e-4)


def normalized(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 16), norm, nn.ReLU(), nn.Linear(16, 4))


LATER = torch.ones(6, 6, dtype=torch.bool).tril(-1)
FAULTY: dict[str, tuple[str, str, Callable[[], Any], Batches | None]] = {
    "one channel in a group": ("single_value", "net.1", lambda: Task(normalized(nn.GroupNorm(16, 16))), None),
    "one number": ("single_value", "net.2",
                   lambda: Task(nn.Sequential(nn.Linear(20, 1), nn.Flatten(), nn.LayerNorm(1)),
                                functional.mse_loss),
                   [(x, x[:, :1]) for x, _ in batches(4)]),
    "batches of two": ("single_value", "net.1", lambda: Task(normalized(nn.BatchNorm1d(16))),
                       [(x[:2], torch.tensor([i % 4, i // 4 % 4])) for i, (x, _) in enumerate(batches(30))]),
    "softmax": ("softmax_over_batch", "net.6", lambda: Task(loss=over_batch), None),
    "softmax by hand": ("softmax_over_batch", "net.6", lambda: Task(loss=over_batch_by_hand), None),
    "dropout": ("dropout", "net.1",
                lambda: Task(nn.Sequential(nn.Linear(20, 16), nn.Dropout(0.95), nn.Linear(16, 4)),
                             optimizer=slow), None),
    "recurrent": ("batch_as_time", "net.layer", lambda: Task(Sequences(nn.LSTM(8, 8))), sequences()),
    "transformer": ("batch_as_time", "net.layer.self_attn",
                    lambda: Task(Sequences(nn.TransformerEncoderLayer(8, 2, 8))), sequences()),
    "text": ("batch_as_time", "net.1", lambda: Task(nn.Sequential(nn.Embedding(12, 8), nn.RNN(8, 12)),
                                                    lambda out, y: of_tokens(out[0], y)), texts()),
    "classes": ("view_for_transpose", "net.1",
                lambda: Task(nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12)),
                             lambda out, y: functional.cross_entropy(out.view(16, 12, 6), y)), texts()),
    "channels": ("view_for_transpose", "net.conv", lambda: Task(Channels()), images()),
    "padding": ("inverted_mask", "net.attend",
                lambda: Task(Tokens(ignores=lambda t: t > 0), of_first), padded()),
    "later steps": ("inverted_mask", "net.attend", lambda: Task(Tokens(LATER), of_tokens), texts()),
    "later steps by hand": ("inverted_mask", "net.embed", lambda: Task(ByHand(LATER), of_tokens), texts()),
}  # fmt: skip
HEALTHY: dict[str, tuple[Callable[[], Any], Batches | None]] = {
    "two samples, by channels": (
        lambda: Task(nn.Sequential(nn.Unflatten(1, (4, 5)), nn.BatchNorm1d(4), nn.Flatten(),
                                   nn.Linear(20, 4)), optimizer=slow),
        [(x[:2], y[:2]) for x, y in batches(4)]),
    "two channels in a group": (lambda: Task(normalized(nn.GroupNorm(8, 16))), None),
    "transposed": (lambda: Task(Sequences(nn.LSTM(8, 8), transposed=True)), sequences()),
    "between samples": (lambda: Task(nn.Sequential(nn.Unflatten(0, (1, -1)), nn.TransformerEncoderLayer(
        20, 2, 8, batch_first=True), nn.Flatten(0, 1), nn.Linear(20, 4))), None),
    "text": (lambda: Task(nn.Sequential(nn.Embedding(12, 8), nn.RNN(8, 12)),
                          lambda out, y: of_tokens(out[0], y)),
             [(x.T, y.T) for x, y in texts()]),
    "windows": (lambda: Task(nn.Sequential(nn.Embedding(12, 8), nn.RNN(8, 12)),
                             lambda out, y: of_tokens(out[0], y)), windows()),
    "distances": (lambda: Task(Relative(), of_tokens), texts()),
    "padding": (lambda: Task(Tokens(ignores=lambda t: t == 0), of_first), padded()),
    "earlier steps": (lambda: Task(Tokens(LATER.T), of_tokens), texts()),
    "transposed classes": (lambda: Task(nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12)), by_class),
                           texts()),
    "backwards": (lambda: Task(Tokens(LATER), of_tokens, _adam), texts(backwards=True)),
    "both ways": (lambda: Task(BothWays(), of_tokens), texts()),
    "usual dropout": (lambda: Task(nn.Sequential(nn.Linear(20, 16), nn.Dropout(0.8), nn.Linear(16, 4)),
                                   optimizer=slow), None),
    "side branch": (lambda: Task(Tabular(), optimizer=slow), None),
    "balanced": (lambda: Task(loss=balanced, optimizer=slow), None),
    "pairs": (lambda: Task(loss=lambda z, y: -(z @ z.T).softmax(0).log().diag().mean()), None),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTY)
def test_wrong_dimension_is_named_with_the_layer(name: str) -> None:
    cause, where, make, data = FAULTY[name]
    may_be_meant = cause in ("single_value", "softmax_over_batch", "dropout") or name == "padding"
    torch.manual_seed(0)
    first, *_ = diagnosed(make(), 30, (data or batches(4)) * 8, max_steps=30)
    step = 25 if may_be_meant else 1
    assert (first.kind, first.step, first.cause, first.where) == ("stuck_loss", step, cause, (where,))


@pytest.mark.parametrize("name", HEALTHY)
def test_right_dimension_is_not_named(name: str) -> None:
    make, data = HEALTHY[name]
    torch.manual_seed(0)
    assert diagnosed(make(), 30, (data or batches(4)) * 8, max_steps=30) == []
