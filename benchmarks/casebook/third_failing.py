"""The third collection of failing programs: functional code, own blocks and losses, lists of layers, own loops."""

from __future__ import annotations

import inspect
import textwrap
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.casebook import parts
from benchmarks.casebook.failing import (
    DEAD,
    EXPLODING,
    SATURATED,
    STAGNATION,
    STUCK,
    VANISHING,
    Pair,
    pair,
)
from benchmarks.casebook.parts import Residual, Sequence, classify, conv, net, regress
from benchmarks.casebook.programs import adam, changed, sgd
from benchmarks.casebook.second_failing import DIABETES, DIGITS, FLAT, SUMS, WAVES, WINE, modules

POOR = ("poor_initialization",)
NONFINITE = ("nonfinite_loss", "nonfinite_gradient")
SPIKE = ("loss_spike",)
IRIS: dict[str, Any] = {"data": partial(parts.table, name="iris"), "step": classify}
CANCER: dict[str, Any] = {"data": partial(parts.table, name="breast_cancer"), "step": classify}


def adamw(rate: float = 1e-3, decay: float = 0.01) -> Any:
    return lambda m: torch.optim.AdamW(m.parameters(), rate, weight_decay=decay)


def rmsprop(rate: float = 1e-3) -> Any:
    return lambda m: torch.optim.RMSprop(m.parameters(), rate)


def scheduled(rate: float, factor: Any, make: Any = sgd) -> Any:
    """An optimizer whose rate is multiplied by a function of the step."""

    def optimizers(model: nn.Module) -> Any:
        optimizer = make(rate)(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    return optimizers


def source(n: int, length: int = 32, size: int = 16) -> list[Any]:
    """Characters of a module of the standard library, and the next ones."""
    codes = torch.tensor([ord(c) % 96 for c in inspect.getsource(textwrap)])
    g = torch.Generator().manual_seed(31)
    starts = [torch.randint(len(codes) - length - 1, (size, 1), generator=g) for _ in range(n)]
    found = [codes[s + torch.arange(length + 1)] for s in starts]
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in found]


def first_token(n: int, times: int = 30, size: int = 32) -> list[Any]:
    """Sequences of eight tokens, of which the first is the class."""
    g = torch.Generator().manual_seed(32)
    found = [torch.randint(8, (size, times), generator=g) for _ in range(n)]
    return [(x, x[:, 0].clone()) for x in found]


def moons(n: int, size: int = 64) -> list[Any]:
    """Two half circles in the plane."""
    found = [datasets.make_moons(size, noise=0.1, random_state=i) for i in range(n)]
    return [(torch.tensor(x, dtype=torch.float32), torch.tensor(y)) for x, y in found]


def friedman(n: int, size: int = 64, scale: float = 0.2, shift: float = -14.0) -> list[Any]:
    """A nonlinear function of ten numbers."""
    found = [datasets.make_friedman1(size, noise=0.1, random_state=i) for i in range(n)]
    return [
        (torch.tensor(x * 2 - 1, dtype=torch.float32), (torch.tensor(y).float()[:, None] + shift) * scale)
        for x, y in found
    ]


SOURCE: dict[str, Any] = {
    "data": source,
    "step": lambda m, b: functional.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()),
}
FIRST: dict[str, Any] = {"data": first_token, "step": classify}
MOONS: dict[str, Any] = {"data": moons, "step": classify}
FRIEDMAN: dict[str, Any] = {"data": friedman, "step": regress}


class Functional(nn.Module):
    """Matrices in a list, and `functional.linear`."""

    def __init__(self, *widths: int, act: Any = torch.relu, gain: float | None = None) -> None:
        super().__init__()
        self.act = act
        self.weights = nn.ParameterList(torch.empty(b, a) for a, b in zip(widths, widths[1:], strict=False))
        for w in self.weights:
            nn.init.xavier_uniform_(w) if gain is None else nn.init.normal_(w, 0, gain / w.shape[1] ** 0.5)
        self.biases = nn.ParameterList(torch.zeros(b) for b in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.weights) - 1
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = functional.linear(x, w, b)
            x = x if i == last else self.act(x)
        return x


class Mixer(nn.Module):
    """Rows of a digit as tokens, mixed over tokens and over channels."""

    def __init__(self, depth: int, skip: bool = True) -> None:
        super().__init__()
        self.embed, self.skip = nn.Linear(8, 24), skip
        self.tokens = nn.ModuleList(net(8, 16, 8, act=nn.GELU) for _ in range(depth))
        self.channels = nn.ModuleList(net(24, 48, 24, act=nn.GELU) for _ in range(depth))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.view(-1, 8, 8))
        for tokens, channels in zip(self.tokens, self.channels, strict=True):
            mixed = tokens(x.transpose(1, 2)).transpose(1, 2)
            x = x + mixed if self.skip else mixed
            x = x + channels(x) if self.skip else channels(x)
        return self.head(x.mean(1))


class Tcn(nn.Module):
    """Causal convolutions with growing dilation."""

    def __init__(self, depth: int, std: float | None = None, act: Any = torch.tanh) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(16 if i else 1, 16, 2, dilation=2 ** (i % 4)) for i in range(depth)
        )
        self.out, self.act = nn.Conv1d(16, 1, 1), act
        if std is not None:
            parts.filled(std)(self)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for layer in self.convs:
            x = self.act(layer(functional.pad(x, (layer.dilation[0], 0))))
        return self.out(x).transpose(1, 2)


class Tagger(nn.Module):
    """Tokens through an embedding and a recurrent network; the last state, or all, are classified."""

    def __init__(
        self, rnn: Any, n_in: int = 8, n_out: int = 8, *, last: bool = True, std: float = 1.0
    ) -> None:
        super().__init__()
        self.emb, self.rnn, self.last = nn.Embedding(n_in, 24), rnn, last
        nn.init.normal_(self.emb.weight, 0, std)
        self.fc = nn.Linear(rnn.hidden_size, n_out)

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.rnn(self.emb(tokens))
        return self.fc(h[:, -1] if self.last else h)


class Encoder(nn.Module):
    """`nn.TransformerEncoder` over rows of digits, mean pooled."""

    def __init__(self, depth: int, norm_first: bool = True, width: int = 32) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 64, 0.0, batch_first=True, norm_first=norm_first)
        self.proj, self.pos = nn.Linear(8, width), nn.Parameter(torch.randn(8, width) * 0.1)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.encoder(self.proj(x.view(-1, 8, 8)) + self.pos, src_key_padding_mask=mask)
        return self.classifier(h.mean(1))


class Gated(nn.Module):
    """A layer whose output is multiplied by a learned gate for each unit."""

    def __init__(self, width: int, gate: float) -> None:
        super().__init__()
        self.lin, self.gate = nn.Linear(width, width), nn.Parameter(torch.full((width,), gate))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate) * functional.relu(self.lin(x))


class Highway(nn.Module):
    """A gate chooses, for each unit, between a transformed input and the input."""

    def __init__(self, width: int, bias: float) -> None:
        super().__init__()
        self.h, self.t = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.constant_(self.t.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.t(x))
        return t * torch.tanh(self.h(x)) + (1 - t) * x


class Separable(nn.Module):
    """Depthwise and pointwise convolutions."""

    def __init__(self, depth: int, norm: bool = False, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 1)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            layers = [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, width, 1)]
            self.blocks.append(nn.Sequential(*layers, nn.BatchNorm2d(width) if norm else nn.Identity()))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = functional.relu(block(x))
        return self.fc(x.mean((2, 3)))


class Unregistered(nn.Module):
    """Hidden layers in a list of Python, which no module knows."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        layers = [nn.Linear(64, 64), nn.Linear(64, 64)]
        self.layers = nn.ModuleList(layers) if kept else layers
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = functional.relu(layer(x))
        return self.out(x)


class TwoStage(nn.Module):
    """An encoder and a classifier, which may be cut in between."""

    def __init__(self, cut: str = "") -> None:
        super().__init__()
        self.encoder, self.classifier, self.cut = net(64, 64, 32), net(32, 32, 10), cut

    def forward(self, x: Tensor) -> Tensor:
        if self.cut == "no_grad":
            with torch.no_grad():
                h = self.encoder(x)
        else:
            h = self.encoder(x)
        h = torch.from_numpy(h.detach().numpy()) if self.cut == "numpy" else h
        return self.classifier(functional.relu(h))


class Scores(nn.Module):
    """One head of attention over rows of a digit, whose scores have a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.factor, self.out = factor, nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.view(-1, 8, 8))
        weights = torch.softmax(self.factor * self.query(h) @ self.key(h).mT, -1)
        return self.out((weights @ self.value(h)).mean(1))


class Trained(pl.LightningModule):
    """A network that is stepped by hand, with logging; mistakes by name."""

    def __init__(self, mistake: str = "", rate: float = 0.02) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.mistake, self.rate = net(64, 64, 64, 10), mistake, rate

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = functional.cross_entropy(self.model(batch[0]), batch[1])
        if self.mistake == "early":
            optimizer.zero_grad()
            optimizer.step()
        if self.mistake == "":
            optimizer.zero_grad()
        self.manual_backward(loss)
        if self.mistake != "early":
            optimizer.step()
        self.log("train/ce", loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), self.rate, momentum=0.9)


class Clipped(pl.LightningModule):
    """A network whose gradients are clipped by value in a hook."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.model, self.limit = net(30, 32, 32, 2, act=nn.Tanh), limit

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        logits = self.model(batch[0])
        return {
            "loss": functional.cross_entropy(logits, batch[1]),
            "acc": (logits.argmax(1) == batch[1]).float().mean(),
        }

    def on_after_backward(self) -> None:
        torch.nn.utils.clip_grad_value_(self.parameters(), self.limit)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def every(n: int, change: Any, data: Any) -> Any:
    """Data of which every n-th batch is changed, from batch 60 on."""
    return lambda count: [change(*b) if i >= 60 and i % n == 0 else b for i, b in enumerate(data(count))]


def on_x(change: Any, data: Any) -> Any:
    """Data whose inputs are changed."""
    return lambda count: [(change(x), *rest) for x, *rest in data(count)]


def init_all(change: Any) -> Any:
    """A change of all weights of linear and convolutional layers, as `model.apply` does it."""

    def init(m: nn.Module) -> None:
        if isinstance(m, nn.Linear | nn.Conv2d):
            change(m)

    return lambda model: model.apply(init)


def gru(gain: float, times_in: int = 1) -> nn.Module:
    model = Sequence(nn.GRU(times_in, 32, batch_first=True), last=False)
    with torch.no_grad():
        model.encoder.weight_hh_l0.mul_(gain)
    return model


def depth() -> list[Pair]:
    """Gradients that vanish, or grow, on their way."""
    xavier = init_all(lambda m: nn.init.xavier_normal_(m.weight, 0.25))
    text_lstm = lambda layers, std: changed(
        Tagger(nn.LSTM(24, 32, layers, batch_first=True), 96, 96, last=False),
        lambda m: [nn.init.uniform_(p, -std, std) for p in m.rnn.parameters()],
    )
    return [
        pair("matrices in a list, sigmoid", VANISHING,
             {"net": lambda: Functional(13, *[32] * 9, 3, act=torch.sigmoid), **WINE, "optimizer": sgd(0.05)},
             {"net": lambda: Functional(13, 32, 32, 3, act=torch.relu)}),
        pair("mixer of 12 blocks without skips", (*VANISHING, *STUCK, *POOR),
             {"net": lambda: Mixer(12, False), **DIGITS, "optimizer": adamw()},
             {"net": lambda: Mixer(4), "optimizer": adamw(3e-3)}),
        pair("dilated convolutions, weights of 0.05", (*VANISHING, *POOR),
             {"net": lambda: Tcn(8, 0.05), **WAVES, "optimizer": rmsprop()},
             {"net": lambda: Tcn(3, act=torch.relu), "optimizer": rmsprop(3e-3)}),
        pair("GRU that recalls over 150 tokens", (*VANISHING, *STUCK, *POOR),
             {"net": lambda: Tagger(nn.GRU(24, 32, batch_first=True)), **FIRST, "data": partial(first_token, times=150),
              "where": ("net.rnn",), "optimizer": adam(3e-3)}, {"data": partial(first_token, times=4), "optimizer": adam(1e-2)}),
        pair("leaky relu, 10 layers, a quarter of Xavier", (*VANISHING, *POOR),
             {"net": lambda: changed(net(30, *[48] * 10, 2, act=partial(nn.LeakyReLU, 0.01)), xavier), **CANCER,
              "optimizer": adamw()},
             {"net": lambda: net(30, 48, 48, 2, act=partial(nn.LeakyReLU, 0.01)), "optimizer": adamw(3e-3)}),
        pair("LSTM of 6 layers, uniform weights of 0.02", (*VANISHING, *STUCK, *POOR),
             {"net": lambda: text_lstm(6, 0.02), **SOURCE, "optimizer": adam(2e-3), "where": ("net.rnn",)},
             {"net": lambda: text_lstm(1, 0.15), "optimizer": adam(1e-2)}),
        pair("separable convolutions, 16 blocks", (*VANISHING, *POOR),
             {"net": lambda: Separable(16), **DIGITS, "optimizer": sgd(0.05)},
             {"net": lambda: Separable(4, norm=True)}),
        pair("closed gates of units", (*VANISHING, *POOR),
             {"net": lambda: nn.Sequential(nn.Linear(64, 48), *(Gated(48, -6.0) for _ in range(4)), nn.Linear(48, 10)),
              **FLAT, "optimizer": sgd(0.05)},
             {"net": lambda: nn.Sequential(nn.Linear(64, 48), *(Gated(48, 2.0) for _ in range(2)), nn.Linear(48, 10))}),
        pair("highway of 30 layers that transforms", (*VANISHING, *POOR),
             {"net": lambda: nn.Sequential(nn.Linear(64, 32), *(Highway(32, 8.0) for _ in range(30)), nn.Linear(32, 10)),
              **FLAT, "optimizer": adam()},
             {"net": lambda: nn.Sequential(nn.Linear(64, 32), *(Highway(32, -2.0) for _ in range(6)), nn.Linear(32, 10)),
              "optimizer": adam(3e-3)}),
        pair("GRU, recurrent weights times 12", (*EXPLODING, *SATURATED, *POOR),
             {"net": lambda: gru(12.0), **WAVES, "data": partial(parts.waves, times=40), "optimizer": adam(3e-3),
              "where": ("net.encoder",)}, {"net": lambda: gru(1.0)}),
        pair("uniform weights of 0 to 1", (*EXPLODING, *POOR, *SATURATED, *DEAD),
             {"net": lambda: changed(Functional(30, 64, 64, 64, 2), lambda m: [nn.init.uniform_(w) for w in m.weights]), **CANCER,
              "optimizer": sgd(0.01)}, {"net": lambda: Functional(30, 64, 64, 64, 2)}),
        pair("normal weights of 1, convolutions", (*EXPLODING, *POOR, *NONFINITE, *DEAD),
             {"net": lambda: changed(conv(6), init_all(lambda m: nn.init.normal_(m.weight))), **DIGITS, "optimizer": sgd(0.01)},
             {"net": lambda: changed(conv(6), init_all(lambda m: nn.init.kaiming_normal_(m.weight)))}),
        pair("30 residual blocks, all of Kaiming", (*EXPLODING, *POOR, *NONFINITE),
             {"net": lambda: changed(_residual(30), init_all(lambda m: nn.init.kaiming_normal_(m.weight))), **FLAT,
              "optimizer": sgd(0.01)},
             {"net": lambda: changed(_residual(30), lambda m: [nn.init.zeros_(b.body[2].weight) for b in m if isinstance(b, Residual)])}),
    ]  # fmt: skip


def _residual(depth: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 48), *(Residual(net(48, 48, 48)) for _ in range(depth)), nn.Linear(48, 10)
    )


def rates() -> list[Pair]:
    """Steps that are too large, or batches that make them so."""
    raw = lambda n: [(x, 77 * y + 152) for x, y in parts.table(n, "diabetes")]
    spiked = lambda x, y: (x * 1e3, y)
    return [
        pair("diabetes in raw units, SGD", (*EXPLODING, *NONFINITE),
             {"net": lambda: net(10, 64, 64, 1), **DIABETES, "data": raw, "optimizer": sgd(0.05)},
             {"data": partial(parts.table, name="diabetes"), "optimizer": sgd(0.02)}),
        pair("one cycle to a rate of 100", (*EXPLODING, *NONFINITE, *SPIKE),
             {"net": lambda: net(64, 64, 10, act=nn.GELU), **FLAT,
              "optimizer": scheduled(100.0, lambda i: min((i + 1) / 60, (200 - i) / 140))},
             {"optimizer": scheduled(0.1, lambda i: min((i + 1) / 60, (200 - i) / 140))}),
        pair("RMSprop, rate of 1", (*EXPLODING, *DEAD, *SPIKE),
             {"net": lambda: net(4, 32, 32, 3), **IRIS, "optimizer": rmsprop(1.0)}, {"optimizer": rmsprop(3e-3)}),
        pair("warm-up that never ends", (*EXPLODING, *NONFINITE, *SPIKE),
             {"net": lambda: net(64, 64, 64, 10), **FLAT, "optimizer": scheduled(0.02, lambda i: i + 1)},
             {"optimizer": scheduled(0.05, lambda i: min(1.0, (i + 1) / 30))}),
        pair("momentum of 0.99, rate of 0.8", (*EXPLODING, *SATURATED, *SPIKE),
             {"net": lambda: net(10, 48, 48, 1, act=nn.Tanh), **FRIEDMAN, "optimizer": sgd(0.8, 0.99)},
             {"optimizer": sgd(0.02, 0.9)}),
        pair("loss summed over characters", EXPLODING,
             {"net": lambda: Tagger(nn.GRU(24, 32, batch_first=True), 96, 96, last=False), **SOURCE, "optimizer": sgd(0.1),
              "step": lambda m, b: functional.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten(), reduction="sum")},
             {"step": SOURCE["step"]}),
        modules("gradients never zeroed", (*EXPLODING, *SPIKE, *DEAD), lambda: Trained("no zero", 0.1), lambda: Trained("", 0.1), FLAT["data"]),
        pair("a record times 1,000", SPIKE,
             {"net": lambda: net(10, 32, 32, 1), **FRIEDMAN, "data": every(40, spiked, friedman), "optimizer": sgd(0.02)},
             {"data": friedman}),
        pair("labels times 10,000 now and then", SPIKE,
             {"net": lambda: net(10, 32, 32, 1, act=nn.SiLU), **FRIEDMAN,
              "data": every(45, lambda x, y: (x, y * 1e4), friedman), "optimizer": adam(3e-3)}, {"data": friedman}),
    ]  # fmt: skip


def losses() -> list[Pair]:
    """Losses that say nothing, or cannot fall."""
    ce = functional.cross_entropy
    tiny = on_x(lambda x: (x + 0.6) * 8 / 255 / 255, FLAT["data"])

    def shuffled(n: int) -> list[Any]:
        g = torch.Generator().manual_seed(33)
        return [(x, y[torch.randperm(len(y), generator=g)]) for x, y in CANCER["data"](n)]

    def triplet(m: Any, b: Any, ok: bool) -> Tensor:
        z = m(b[0])
        order = b[1].argsort()
        positive, negative = (z[order], z[order].roll(len(z) // 2, 0)) if ok else (z, z)
        return functional.triplet_margin_loss(z[order].roll(1, 0) if ok else z, positive, negative)

    return [
        pair("rows and labels out of step", STUCK,
             {"net": lambda: net(30, 32, 2), **CANCER, "data": shuffled, "optimizer": sgd(0.05)}, {"data": CANCER["data"]}),
        pair("log-softmax over the batch", STUCK,
             {"net": lambda: net(13, 48, 3), **WINE, "step": lambda m, b: functional.nll_loss(m(b[0]).log_softmax(0), b[1])},
             {"step": lambda m, b: functional.nll_loss(m(b[0]).log_softmax(1), b[1])}),
        pair("three classes for one logit", STUCK,
             {"net": lambda: net(4, 32, 1), **IRIS,
              "step": lambda m, b: functional.binary_cross_entropy_with_logits(m(b[0]).squeeze(1), b[1].float())},
             {"net": lambda: net(4, 32, 3), "step": classify, "optimizer": adam(1e-2)}),
        pair("logits viewed instead of transposed", STUCK,
             {"net": lambda: parts.Gpt(1), **SOURCE, "optimizer": adamw(3e-3),
              "step": lambda m, b: ce(m(b[0]).reshape(len(b[0]), 96, -1), b[1])},
             {"step": lambda m, b: ce(m(b[0]).transpose(1, 2), b[1])}),
        pair("sigmoid head, targets of 25 to 346", STUCK,
             {"net": lambda: nn.Sequential(net(10, 32, 1), nn.Sigmoid()), **DIABETES,
              "data": lambda n: [(x, 77 * y + 152) for x, y in parts.table(n, "diabetes")], "optimizer": adam(1e-2)},
             {"net": lambda: net(10, 32, 1), "data": DIABETES["data"]}),
        pair("pixels divided by 255 twice", (*STUCK, *VANISHING, *POOR),
             {"net": lambda: net(64, 48, 48, 10), **FLAT, "data": tiny, "optimizer": sgd(0.05)}, {"data": FLAT["data"]}),
        pair("all tokens unknown", STUCK,
             {"net": lambda: Tagger(nn.LSTM(24, 32, batch_first=True), 96, 96, last=False), **SOURCE,
              "data": on_x(torch.zeros_like, source), "optimizer": adam(5e-3)}, {"data": source}),
        pair("a triplet of the same thing", (*STUCK, *STAGNATION, *VANISHING),
             {"net": lambda: net(64, 48, 16), **FLAT, "step": partial(triplet, ok=False)}, {"step": partial(triplet, ok=True)}),
        pair("squared difference of (n, 1) and (n,)", STUCK,
             {"net": lambda: net(10, 64, 64, 1, act=nn.GELU), **FRIEDMAN, "optimizer": adam(3e-3),
              "step": lambda m, b: ((m(b[0]) - b[1].squeeze(1)) ** 2).mean()},
             {"step": lambda m, b: ((m(b[0]).squeeze(1) - b[1].squeeze(1)) ** 2).mean()}),
        pair("everything dropped", (*STUCK, *DEAD, *STAGNATION),
             {"net": lambda: nn.Sequential(nn.Linear(13, 48), nn.ReLU(), nn.Dropout(1.0), nn.Linear(48, 3)), **WINE},
             {"net": lambda: nn.Sequential(nn.Linear(13, 48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 3))}),
        pair("weights decay by 1,000", (*STUCK, "vanishing_weights", *VANISHING, *EXPLODING),
             {"net": lambda: net(64, 48, 48, 10), **FLAT, "optimizer": adamw(1e-3, 1e3)}, {"optimizer": adamw(1e-3, 0.1)}),
    ]  # fmt: skip


def units() -> list[Pair]:
    """Units that are dead or saturated."""
    tanh = lambda std: (
        lambda: changed(
            net(64, 128, 128, 10, act=nn.Tanh), init_all(lambda m: nn.init.normal_(m.weight, 0, std))
        )
    )
    bias = init_all(lambda m: nn.init.constant_(m.bias, -5.0))
    hand = lambda b: changed(
        Functional(64, 48, 48, 10, act=lambda x: torch.maximum(x, torch.zeros(()))),
        lambda m: m.biases[1].fill_(b),
    )
    norm = lambda m: [(n.weight.fill_(0.1), n.bias.fill_(-1.0)) for n in m if isinstance(n, nn.BatchNorm2d)]
    return [
        pair("tanh on raw measurements", (*SATURATED, *POOR),
             {"net": lambda: net(30, 48, 48, 2, act=nn.Tanh), **CANCER, "data": partial(parts.table, name="breast_cancer", scaled=False),
              "optimizer": sgd(0.05)}, {"data": CANCER["data"]}),
        pair("tanh, weights of torch.randn", (*SATURATED, *POOR),
             {"net": tanh(1.0), **FLAT, "optimizer": sgd(0.02)}, {"net": tanh(0.1)}),
        pair("LSTM, embedding of 80", (*SATURATED, *POOR, *STUCK),
             {"net": lambda: Tagger(nn.LSTM(24, 32, batch_first=True), 96, 96, last=False, std=80.0), **SOURCE, "optimizer": adam()},
             {"net": lambda: Tagger(nn.LSTM(24, 32, batch_first=True), 96, 96, last=False), "optimizer": adam(5e-3)}),
        pair("convolutions, biases of -5", (*DEAD, *POOR),
             {"net": lambda: changed(conv(4), bias), **DIGITS, "optimizer": adam()}, {"net": lambda: conv(4)}),
        pair("relu of a negative softplus", (*DEAD, *STUCK),
             {"net": lambda: Functional(13, 32, 32, 3, act=lambda x: torch.relu(-functional.softplus(x))), **WINE, "optimizer": adam()},
             {"net": lambda: Functional(13, 32, 32, 3, act=functional.softplus), "optimizer": adam(3e-3)}),
        pair("maximum with 0, bias of -12", (*DEAD, *POOR), {"net": lambda: hand(-12.0), **FLAT}, {"net": lambda: hand(0.0)}),
        pair("relu, SGD, rate of 3", (*DEAD, *EXPLODING, *SPIKE),
             {"net": lambda: net(2, 64, 64, 64, 2), **MOONS, "optimizer": sgd(3.0)}, {"optimizer": sgd(0.1)}),
        pair("normalization with biases of -1", (*DEAD, *STUCK),
             {"net": lambda: changed(conv(4, norm=nn.BatchNorm2d), norm), **DIGITS, "optimizer": sgd(0.01)},
             {"net": lambda: conv(4, norm=nn.BatchNorm2d), "optimizer": sgd(0.05)}),
    ]  # fmt: skip


def stagnation() -> list[Pair]:
    """Weights that do not move."""
    by_name = lambda m: torch.optim.AdamW([p for n, p in m.named_parameters() if "classifier" in n], 3e-3)
    whole = lambda m: torch.optim.AdamW(m.parameters(), 3e-3)
    return [
        pair("layers in a list of Python", (*STAGNATION, *STUCK), {"net": lambda: Unregistered(False), **FLAT},
             {"net": lambda: Unregistered(True)}),
        pair("only the classifier in the optimizer", STAGNATION,
             {"net": lambda: Encoder(2), **DIGITS, "optimizer": by_name, "where": ("net.proj", "net.encoder", "net.pos")},
             {"optimizer": whole}),
        pair("encoder without gradients", STAGNATION,
             {"net": lambda: TwoStage("no_grad"), **FLAT, "where": ("net.encoder",), "optimizer": whole}, {"net": TwoStage}),
        pair("through NumPy and back", STAGNATION,
             {"net": lambda: TwoStage("numpy"), **FLAT, "where": ("net.encoder",), "optimizer": sgd(0.05)}, {"net": TwoStage}),
        pair("a factor of whole division", (*STAGNATION, *STUCK),
             {"net": lambda: conv(3), **DIGITS, "optimizer": scheduled(1e-3, lambda i: i // 1000, adam)},
             {"optimizer": scheduled(1e-3, lambda i: min(1.0, i / 20), adam)}),
        modules("stepped before backward, zeroed", (*STAGNATION, *STUCK), lambda: Trained("early"), lambda: Trained(""), FLAT["data"]),
        modules("clipped by value at 1e-8", (*STAGNATION, *STUCK), lambda: Clipped(1e-8), lambda: Clipped(1.0), CANCER["data"]),
    ]  # fmt: skip


def nonfinite() -> list[Pair]:
    """Numbers that are not finite."""
    mse = functional.mse_loss
    constant = lambda x: (x.flatten(1) - x.flatten(1).mean(0)) / x.flatten(1).std(0)
    padded = lambda x: torch.ones(len(x), 8, dtype=torch.bool)
    missing = lambda x: torch.where(torch.arange(x.shape[1]) == 2, torch.nan, x)
    return [
        pair("logarithm of a relu", NONFINITE,
             {"net": lambda: net(13, 32, 3), **WINE, "step": lambda m, b: -torch.log(torch.relu(m(b[0]))).gather(1, b[1][:, None]).mean()},
             {"step": classify}),
        pair("distance of equal vectors", NONFINITE,
             {"net": lambda: net(64, 48, 16), **FLAT,
              "step": lambda m, b: _distances(m(b[0]), b[1], 0.0)}, {"step": lambda m, b: _distances(m(b[0]), b[1], 1e-6)}),
        pair("a column without values", NONFINITE,
             {"net": lambda: net(10, 32, 1), **DIABETES, "data": on_x(missing, DIABETES["data"])}, {"data": DIABETES["data"]}),
        pair("pixels divided by a spread of zero", NONFINITE,
             {"net": lambda: net(64, 48, 10), **FLAT, "data": on_x(constant, FLAT["data"])}, {"data": FLAT["data"]}),
        pair("every row is padding", (*NONFINITE, *STAGNATION),  # zeros or NaN, by the version of torch
             {"net": lambda: Encoder(2), **DIGITS, "step": lambda m, b: functional.cross_entropy(m(b[0], padded(b[0])), b[1])},
             {"step": classify}),
        pair("softmax by hand of large inputs", NONFINITE,
             {"net": lambda: net(13, 32, 3), **WINE, "data": partial(parts.table, scaled=False),
              "step": lambda m, b: -(m(b[0]).mul(9).exp() / m(b[0]).mul(9).exp().sum(1, True)).gather(1, b[1][:, None]).log().mean()},
             {"data": WINE["data"], "step": classify}),
        pair("angle from a cosine", NONFINITE,
             {"net": lambda: net(10, 32, 4), **DIABETES,
              "step": lambda m, b: _angles(m(b[0])) + mse(m(b[0])[:, :1], b[1])},
             {"step": lambda m, b: mse(m(b[0])[:, :1], b[1])}),
    ]  # fmt: skip


def _distances(z: Tensor, y: Tensor, eps: float) -> Tensor:
    d = ((z[:, None] - z[None]).square().sum(-1) + eps).sqrt()
    same = y[:, None] == y[None]
    return torch.where(same, d, (1 - d).relu()).mean()


def _angles(z: Tensor) -> Tensor:
    a = functional.normalize(z, dim=1)
    return torch.acos((a * a).sum(1)).mean()


def initialization() -> list[Pair]:
    """Weights that a network cannot be trained from."""
    same = init_all(lambda m: nn.init.constant_(m.weight, 0.5))
    zero = init_all(lambda m: (nn.init.zeros_(m.weight), nn.init.zeros_(m.bias)))
    return [
        pair("weights of 0.5", (*POOR, *EXPLODING, *STUCK),
             {"net": lambda: changed(net(13, 32, 32, 3), same), **WINE, "optimizer": sgd(0.01)}, {"net": lambda: net(13, 32, 32, 3)}),
        pair("weights and biases of 0", (*POOR, *STUCK, *VANISHING, *DEAD, *STAGNATION),
             {"net": lambda: changed(conv(3), zero), **DIGITS, "optimizer": adam()}, {"net": lambda: conv(3)}),
    ]  # fmt: skip


def pairs() -> list[Pair]:
    """Returns the half that rules were set on."""
    return [*depth(), *rates(), *losses(), *units(), *stagnation(), *nonfinite(), *initialization()]


class Recurrence(nn.Module):
    """A recurrence of bare parameters."""

    def __init__(self, gain: float, act: Any = torch.tanh, width: int = 24) -> None:
        super().__init__()
        self.w_in, self.w_out = (
            nn.Parameter(torch.randn(2, width) * 0.5),
            nn.Parameter(torch.randn(width, 1) / width**0.5),
        )
        self.w_hh = nn.Parameter(nn.init.orthogonal_(torch.empty(width, width), gain))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.w_hh.shape[0])
        for t in range(x.shape[1]):
            h = self.act(x[:, t] @ self.w_in + h @ self.w_hh)
        return h @ self.w_out


class Reset(pl.LightningModule):
    """Loads the same weights before each batch, as from an average that is never updated."""

    def __init__(self, loads: bool) -> None:
        super().__init__()
        self.model, self.loads = net(13, 32, 3), loads
        self.kept = {k: v.clone() for k, v in self.model.state_dict().items()}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.loads:
            self.model.load_state_dict(self.kept)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("loss/fit", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.model.parameters(), 3e-3)


class Pooled(nn.Module):
    """Features of convolutions that are averaged over space, or over the batch."""

    def __init__(self, dim: Any) -> None:
        super().__init__()
        self.features, self.fc, self.dim = (
            nn.Sequential(nn.Conv2d(1, 32, 3, 2), nn.ReLU()),
            nn.Linear(32, 10),
            dim,
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        if self.dim == 0:
            h = h.mean(0, keepdim=True).expand_as(h)
        return self.fc(h.mean((2, 3)))


def held_out_pairs() -> list[Pair]:
    """Returns the half that was run once."""
    g = torch.Generator().manual_seed(35)
    bce = functional.binary_cross_entropy_with_logits
    noise = lambda n: [(x, torch.randn(len(x), 1, generator=g)) for x, _ in friedman(n)]
    right = lambda m, b: (m(b[0]).argmax(1) == b[1]).float().mean().requires_grad_()
    growing = scheduled(0.01, lambda i: 1.1**i)
    slow = lambda m: torch.optim.SGD(
        [{"params": m.encoder.parameters(), "lr": 0.0}, {"params": m.classifier.parameters()}], 0.05
    )
    short: dict[str, Any] = {"data": partial(parts.adding, times=12)}
    two = {**CANCER, "net": lambda: net(30, 32, 1)}
    spread = lambda z: (z.square().mean(0) - z.mean(0).square() - 1e-3).sqrt().sum()
    return [
        pair("encoder of 24 layers, post-norm", (*VANISHING, *STUCK, *EXPLODING, *POOR),
             {"net": lambda: Encoder(24, norm_first=False), **DIGITS, "optimizer": sgd(0.02)},
             {"net": lambda: Encoder(2), "optimizer": adam(1e-3)}),
        pair("dilated convolutions, sigmoid", (*VANISHING, *POOR),
             {"net": lambda: Tcn(9, act=torch.sigmoid), **WAVES, "optimizer": adam(1e-3)},
             {"net": lambda: Tcn(3, act=functional.silu), "optimizer": adam(3e-3)}),
        pair("recurrence of bare parameters", (*VANISHING, *POOR),
             {"net": lambda: Recurrence(0.4), **SUMS, "data": partial(parts.adding, times=80), "optimizer": adam(1e-3)},
             {"net": lambda: Recurrence(1.0), **short, "optimizer": adam(3e-3)}),
        pair("elu, weights of 0.01", (*VANISHING, *POOR),
             {"net": lambda: changed(net(10, *[40] * 6, 1, act=nn.ELU), parts.filled(0.01)), **FRIEDMAN, "optimizer": adamw()},
             {"net": lambda: changed(net(10, *[40] * 6, 1, act=nn.ELU), parts.filled(0.15)), "optimizer": adamw()}),
        pair("skips of 0.3", (*VANISHING, *POOR),
             {"net": lambda: nn.Sequential(nn.Linear(64, 32), *(Residual(net(32, 32, 32, act=nn.GELU), 0.1, 0.3) for _ in range(10)),
              nn.Linear(32, 10)), **FLAT, "optimizer": sgd(0.05)},
             {"net": lambda: nn.Sequential(nn.Linear(64, 32), *(Residual(net(32, 32, 32, act=nn.GELU), 0.1) for _ in range(10)),
              nn.Linear(32, 10))}),
        pair("matrices in a list, relu, gain of 4", (*EXPLODING, *POOR, *NONFINITE),
             {"net": lambda: Functional(64, *[48] * 8, 10, gain=4.0), **FLAT, "optimizer": sgd(1e-3)},
             {"net": lambda: Functional(64, *[48] * 8, 10, gain=2**0.5), "optimizer": sgd(0.01)}),
        pair("NAdam, rate of 5", (*EXPLODING, *DEAD, *SATURATED, *SPIKE),
             {"net": lambda: net(30, 48, 48, 2), **CANCER, "optimizer": lambda m: torch.optim.NAdam(m.parameters(), 5.0)},
             {"optimizer": lambda m: torch.optim.NAdam(m.parameters(), 2e-3)}),
        pair("rate that grows by a tenth each step", (*EXPLODING, *NONFINITE, *SPIKE),
             {"net": lambda: conv(3), **DIGITS, "optimizer": growing}, {"optimizer": scheduled(0.05, lambda i: 0.99**i)}),
        pair("linear recurrence of gain 1.3", (*EXPLODING, *NONFINITE, *POOR),
             {"net": lambda: Recurrence(1.3, act=lambda h: h), **SUMS, "data": partial(parts.adding, times=80), "optimizer": sgd(1e-3)},
             {"net": lambda: Recurrence(0.95, act=lambda h: h), **short, "optimizer": adam(3e-3)}),
        pair("targets of noise", STUCK,
             {"net": lambda: net(10, 24, 1), **FRIEDMAN, "data": noise, "optimizer": adam(3e-3)}, {"data": friedman}),
        pair("nll of probabilities", STUCK,
             {"net": lambda: conv(3), **DIGITS, "optimizer": adam(), "step": lambda m, b: functional.nll_loss(torch.softmax(m(b[0]), 1), b[1])},
             {"step": lambda m, b: functional.nll_loss(torch.log_softmax(m(b[0]), 1), b[1])}),
        pair("labels of -1 and 1 for a logit", (*STUCK, *EXPLODING),
             {**two, "step": lambda m, b: bce(m(b[0]).squeeze(1), 2.0 * b[1] - 1)},
             {"step": lambda m, b: bce(m(b[0]).squeeze(1), b[1].float())}),
        pair("mean over the batch, not over space", STUCK,
             {"net": lambda: Pooled(0), **DIGITS, "optimizer": adam(3e-3)}, {"net": lambda: Pooled((2, 3))}),
        pair("accuracy for a loss", (*STUCK, *STAGNATION),
             {"net": lambda: net(64, 48, 10), **FLAT, "step": right}, {"step": classify}),
        pair("GRU, inputs in milliseconds", (*SATURATED, *STUCK, *POOR),
             {"net": lambda: gru(1.0), **WAVES, "data": lambda n: [(1e4 * x, y) for x, y in parts.waves(n)], "optimizer": adam()},
             {"data": parts.waves, "optimizer": adam(5e-3)}),
        pair("matrices in a list, sigmoid, gain of 60", (*SATURATED, *POOR),
             {"net": lambda: Functional(13, 48, 48, 3, act=torch.sigmoid, gain=60.0), **WINE, "optimizer": sgd(0.02)},
             {"net": lambda: Functional(13, 48, 48, 3, act=torch.sigmoid, gain=2.0), "optimizer": adam(3e-3)}),
        pair("negative weights, positive inputs", (*DEAD, *POOR),
             {"net": lambda: changed(net(64, 48, 48, 10), lambda m: m[0].weight.uniform_(-0.3, 0)), **FLAT,
              "data": on_x(lambda x: (x + 0.6) / 2, FLAT["data"]), "where": ("net.0", "net.1")}, {"net": lambda: net(64, 48, 48, 10)}),
        pair("layer norm with biases of -6, relu", (*DEAD, *STUCK),
             {"net": lambda: changed(net(64, 48, 48, 10, norm=nn.LayerNorm), lambda m: m[4].bias.fill_(-6.0)), **FLAT},
             {"net": lambda: net(64, 48, 48, 10, norm=nn.LayerNorm)}),
        pair("a rate of 0 for the encoder", STAGNATION,
             {"net": TwoStage, **FLAT, "optimizer": slow, "where": ("net.encoder",)}, {"optimizer": sgd(0.05)}),
        modules("weights loaded before each batch", (*STAGNATION, *STUCK), lambda: Reset(True), lambda: Reset(False), WINE["data"]),
        pair("root of a negative spread", NONFINITE,
             {"net": lambda: net(10, 32, 4), **DIABETES, "step": lambda m, b: regress(m, b) + spread(0.01 * m(b[0]))},
             {"step": lambda m, b: regress(m, (b[0], b[1].expand(-1, 4)))}),
        pair("rate times 300 from step 100 on", (*EXPLODING, *SPIKE, *DEAD),
             {"net": lambda: net(64, 64, 10), **FLAT, "optimizer": scheduled(0.1, lambda i: 300.0 if i >= 100 else 1.0)},
             {"optimizer": scheduled(0.1, lambda i: 0.1 if i >= 100 else 1.0)}),
        pair("tied embedding of 6", (*POOR, *SATURATED, *EXPLODING),
             {"net": lambda: changed(parts.Gpt(2, tied=True), lambda m: m.embed.weight.normal_(0, 6)), **SOURCE, "optimizer": adam(1e-3)},
             {"net": lambda: parts.Gpt(2, tied=True), "optimizer": adam(3e-3)}),
        pair("loss times 1e-12, SGD", (*STAGNATION, *STUCK),
             {"net": lambda: net(4, 32, 3), **IRIS, "optimizer": sgd(0.05), "step": lambda m, b: 1e-12 * classify(m, b)},
             {"step": classify}),
    ]  # fmt: skip
