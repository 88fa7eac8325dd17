"""The second collection of failing programs: other networks, data and combinations, with cured twins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

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
from benchmarks.casebook.parts import Gcn, Gpt, HandLstm, HandRnn, Sequence, Unet, conv, net
from benchmarks.casebook.programs import Case, adam, changed, sgd

DIGITS: dict[str, Any] = {"data": parts.digits, "step": parts.classify}
FLAT: dict[str, Any] = {"data": partial(parts.digits, flat=True), "step": parts.classify}
TEXT: dict[str, Any] = {"data": parts.characters, "step": parts.spell}
SUMS: dict[str, Any] = {"data": parts.adding, "step": parts.regress}
WAVES: dict[str, Any] = {"data": parts.waves, "step": parts.regress}
GRAPH: dict[str, Any] = {"data": parts.graph, "step": parts.nodes}
WINE: dict[str, Any] = {"data": parts.table, "step": parts.classify}
DIABETES: dict[str, Any] = {"data": partial(parts.table, name="diabetes"), "step": parts.regress}
MASKS: dict[str, Any] = {"data": parts.masks, "step": parts.segment}


def lstm(forget: float = 0.0, **more: Any) -> nn.Module:
    """An LSTM with a bias of its forget gates."""
    model = Sequence(nn.LSTM(2, 24, batch_first=True), **more)
    with torch.no_grad():
        model.encoder.bias_ih_l0[24:48] = forget
    return model


def gru(update: float = 0.0) -> nn.Module:
    """A GRU with a bias of its update gates."""
    model = Sequence(nn.GRU(1, 24, batch_first=True), last=False)
    with torch.no_grad():
        model.encoder.bias_ih_l0[24:48] = update
    return model


def rnn(gain: float, kind: str = "tanh", n_in: int = 2) -> nn.Module:
    """A plain recurrent network of a gain."""
    model = Sequence(nn.RNN(n_in, 32, nonlinearity=kind, batch_first=True))
    nn.init.orthogonal_(model.encoder.weight_hh_l0, gain)
    return model


class Looped(nn.Module):
    """One layer that is called many times."""

    def __init__(self, gain: float, times: int) -> None:
        super().__init__()
        self.enter, self.shared, self.out = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        nn.init.orthogonal_(self.shared.weight, gain)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).tanh()
        for _ in range(self.times):
            h = self.shared(h).tanh()
        return self.out(h)


class ByHand(nn.Module):
    """A network whose activation is written by hand."""

    def __init__(self, act: Callable[[Tensor], Tensor], bias: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 48), nn.Linear(48, 48), nn.Linear(48, 10)
        self.act = act
        with torch.no_grad():
            self.second.bias.add_(bias)
            self.second.weight.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.act(self.second(self.act(self.first(x)))))


class Checkpointed(nn.Module):
    """Blocks that are computed again in the backward pass."""

    def __init__(self, depth: int, std: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64 if i == 0 else 48, 48), nn.ReLU()) for i in range(depth)
        )
        self.out = nn.Linear(48, 10)
        parts.filled(std)(self)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.out(x)


def residual(depth: int, scale: float = 1.0, gain: float = 1.0) -> nn.Module:
    """Residual blocks without normalization, on digits."""
    blocks = [parts.Residual(net(48, 48, 48), scale) for _ in range(depth)]
    model = nn.Sequential(nn.Linear(64, 48), *blocks, nn.Linear(48, 10))
    with torch.no_grad():
        for block in blocks:
            block.body[-1].weight.mul_(gain)
    return model


def depth() -> list[Pair]:
    """Gradients that vanish or grow in deep stacks and through time."""
    return [
        pair("deep convolutions, default weights", VANISHING,
             {"net": lambda: conv(16), **DIGITS, "optimizer": sgd(0.02)},
             {"net": lambda: conv(16, norm=nn.BatchNorm2d), "optimizer": sgd(0.02)}),
        pair("post-norm transformer of 12 layers", (*VANISHING, *EXPLODING, *STUCK),
             {"net": lambda: Gpt(12, place="post"), **TEXT, "optimizer": adam(1e-2)},
             {"net": lambda: Gpt(12), "optimizer": adam(1e-3)}),
        pair("LSTM, forget bias of -6", VANISHING, {"net": lambda: lstm(-6), **SUMS, "where": ("net.encoder",)},
             {"net": lambda: lstm(1.0), "data": partial(parts.adding, times=12), "optimizer": adam(1e-2)}),
        pair("plain RNN over 200 times", VANISHING,
             {"net": lambda: rnn(0.8), **SUMS, "data": partial(parts.adding, times=200), "where": ("net.encoder",)},
             {"net": lambda: rnn(1.0), "data": partial(parts.adding, times=12), "optimizer": adam(3e-3)}),
        pair("recurrence of linear layers", VANISHING,
             {"net": lambda: HandRnn(0.5), **SUMS, "where": ("net.again", "net.enter")},
             {"net": lambda: HandRnn(1.0), "data": partial(parts.adding, times=12), "optimizer": adam(3e-3)}),
        pair("mlp of 24 layers, default weights", VANISHING,
             {"net": lambda: net(64, *[64] * 24, 10), **FLAT},
             {"net": lambda: residual(12, 0.3)}),
        pair("transformer without skips", (*VANISHING, *STUCK),
             {"net": lambda: Gpt(6, place="none"), **TEXT}, {"net": lambda: Gpt(6), "optimizer": adam(3e-3)}),
        pair("SiLU, weights of 0.02", VANISHING,
             {"net": lambda: changed(net(64, *[48] * 7, 10, act=nn.SiLU), parts.filled(0.02)), **FLAT},
             {"net": lambda: changed(net(64, *[48] * 7, 10, act=nn.SiLU), parts.filled(0.2))}),
        pair("hard sigmoid, 8 layers", (*VANISHING, *SATURATED),
             {"net": lambda: net(64, *[48] * 8, 10, act=nn.Hardsigmoid), **FLAT},
             {"net": lambda: net(64, *[48] * 3, 10, act=nn.Hardswish)}),
        pair("graph network of 14 rounds, sigmoid", (*VANISHING, *STUCK),
             {"net": lambda: Gcn(14, act=torch.sigmoid), **GRAPH}, {"net": lambda: Gcn(2), "optimizer": adam(1e-2)}),
        pair("graph network of tiny weights", VANISHING,
             {"net": lambda: changed(Gcn(6), parts.filled(0.01)), **GRAPH},
             {"net": lambda: Gcn(2), "optimizer": adam(1e-2)}),
        pair("one layer called 40 times", VANISHING, {"net": lambda: Looped(0.5, 40), **FLAT},
             {"net": lambda: Looped(1.0, 4)}),
        pair("checkpointed blocks of 0.03", VANISHING, {"net": lambda: Checkpointed(8, 0.03), **FLAT},
             {"net": lambda: Checkpointed(4, 0.18)}),
        pair("relu recurrence of gain 1.5", EXPLODING,
             {"net": lambda: rnn(1.5, "relu"), **SUMS, "optimizer": sgd(1e-3), "where": ("net.encoder",)},
             {"net": lambda: rnn(0.9, "relu"), "data": partial(parts.adding, times=12)}),
        pair("residual blocks that double", EXPLODING,
             {"net": lambda: residual(24, 1.0, 8.0), **FLAT, "optimizer": sgd(1e-3)},
             {"net": lambda: residual(8, 0.3)}),
        pair("transformer, weights of 2", (*EXPLODING, *SATURATED),
             {"net": lambda: changed(Gpt(4), parts.filled(2.0)), **TEXT, "optimizer": adam(1e-3)},
             {"net": lambda: Gpt(4), "optimizer": adam(3e-3)}),
        pair("bidirectional LSTM of tiny weights", VANISHING,
             {"net": lambda: changed(Sequence(nn.LSTM(2, 24, 3, batch_first=True, bidirectional=True)),
                                     parts.filled(0.01)), **SUMS, "where": ("net.encoder",)},
             {"net": lambda: Sequence(nn.LSTM(2, 24, 1, batch_first=True, bidirectional=True)),
              "data": partial(parts.adding, times=12), "optimizer": adam(1e-2)}),
        pair("recurrence of gain 3, tanh", (*EXPLODING, *SATURATED, *VANISHING),
             {"net": lambda: HandRnn(3.0), **SUMS, "optimizer": sgd(0.05)},
             {"net": lambda: HandRnn(1.0), "data": partial(parts.adding, times=12), "optimizer": adam(3e-3)}),
    ]  # fmt: skip


class Gan(pl.LightningModule):
    """Two optimizers by hand, with a rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic, self.rate = net(8, 32, 13), net(13, 32, 1, act=nn.LeakyReLU), rate

    def training_step(self, batch: Any, batch_idx: int) -> None:
        on_critic, on_generator = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 8))
        loss = (
            functional.softplus(-self.critic(batch[0])).mean()
            + functional.softplus(self.critic(fake.detach())).mean()
        )
        on_critic.zero_grad()
        self.manual_backward(loss)
        on_critic.step()
        loss = functional.softplus(-self.critic(fake)).mean()
        on_generator.zero_grad()
        self.manual_backward(loss)
        on_generator.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(m.parameters(), self.rate) for m in (self.critic, self.generator)]


def unscaled(n: int) -> list[Any]:
    """A column of the table in other units."""
    return [(torch.cat([x[:, :-1], 1e4 * x[:, -1:]], 1), y) for x, y in parts.table(n, "diabetes")]


def rates() -> list[Pair]:
    """Updates that are too large, by rate, loss, targets or inputs."""
    good = {"optimizer": sgd(0.05)}
    return [
        pair("LSTM, SGD, rate of 30", EXPLODING, {"net": lambda: lstm(last=False, n_out=2), **SUMS, **{
            "data": lambda n: [(x, x.roll(1, 1)) for x, _ in parts.adding(n, 20)], "optimizer": sgd(30)}},
            {"optimizer": sgd(0.05)}),
        pair("convolutions with batch normalization, rate of 30", EXPLODING,
             {"net": lambda: conv(4, norm=nn.BatchNorm2d), **DIGITS, "optimizer": sgd(30)}, good),
        pair("summed loss on digits", EXPLODING,
             {"net": lambda: conv(3), **DIGITS, "data": partial(parts.digits, size=128), "optimizer": sgd(0.1),
              "step": lambda m, b: functional.cross_entropy(m(b[0]), b[1], reduction="sum")},
             {"step": parts.classify}),
        pair("a column of 10,000", (*EXPLODING, *DEAD, *SATURATED, *STUCK),
             {"net": lambda: net(10, 32, 32, 1), **DIABETES, "data": unscaled, "optimizer": sgd(0.01)},
             {"data": partial(parts.table, name="diabetes")}),
        pair("Adam, rate of 10, transformer", (*EXPLODING, *SATURATED, *DEAD),
             {"net": lambda: Gpt(2), **TEXT, "optimizer": adam(10.0)}, {"optimizer": adam(3e-3)}),
        pair("AdamW, weight decay of 1 at a rate of 0.3", EXPLODING,
             {"net": lambda: net(13, 48, 48, 3), **WINE,
              "optimizer": lambda m: torch.optim.AdamW(m.parameters(), 0.3, weight_decay=1.0)},
             {"optimizer": lambda m: torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=0.01)}),
        modules("GAN, rate of 20", EXPLODING, lambda: Gan(20.0), lambda: Gan(0.02), parts.table),
        pair("loss times 10,000", EXPLODING,
             {"net": lambda: net(10, 32, 32, 1), **DIABETES, "optimizer": sgd(0.02),
              "step": lambda m, b: 1e4 * parts.regress(m, b)}, {"step": parts.regress}),
        pair("bf16, rate of 10", EXPLODING,
             {"net": lambda: conv(3), **DIGITS, "optimizer": sgd(10), "precision": "bf16-mixed"}, good),
        pair("accumulated, rate of 10", EXPLODING,
             {"net": lambda: conv(3), **DIGITS, "optimizer": sgd(10, 0), "accumulate_grad_batches": 2}, good),
        pair("clipped at 1, rate of 10", EXPLODING,
             {"net": lambda: net(64, 64, 64, 10), **FLAT, "optimizer": sgd(10), "gradient_clip_val": 1.0}, good),
        pair("targets of 100,000", EXPLODING,
             {"net": lambda: net(10, 32, 32, 1), **DIABETES, "optimizer": sgd(0.01),
              "data": lambda n: [(x, 1e5 * y) for x, y in parts.table(n, "diabetes")]},
             {"data": partial(parts.table, name="diabetes")}),
        pair("graph network, Adagrad, rate of 3", EXPLODING,
             {"net": lambda: Gcn(3), **GRAPH, "optimizer": lambda m: torch.optim.Adagrad(m.parameters(), 3.0)},
             {"optimizer": adam(1e-2)}),
    ]  # fmt: skip


def modules(
    name: str,
    kinds: tuple[str, ...],
    failing: Any,
    cured: Any,
    data: Any,
    where: tuple[str, ...] = (),
    **more: Any,
) -> Pair:
    """A pair of programs with a training step of their own."""
    return Case(name, failing, data, frozenset(kinds), where, more), Case(
        f"{name}, cured", cured, data, trainer=more
    )


def _focal(p: Tensor, y: Tensor) -> Tensor:
    log_p = p.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    return -((1 - log_p.exp()).square() * log_p).mean()


def _ctc(model: Any, batch: Any, wrong: bool) -> Tensor:
    x, y = batch
    z = model(x.reshape(-1, 8, 8)).transpose(0, 1)  # (time, n, classes)
    p = z.softmax(0) if wrong else z.log_softmax(2)
    full = torch.full((len(y),), 8), torch.ones(len(y), dtype=torch.long)
    return functional.ctc_loss(p, y[:, None] + 1, *full)


def _views(model: Any, batch: Any, temperature: float) -> Tensor:
    x = batch[0]
    a, b = (functional.normalize(model(x + 0.1 * torch.randn_like(x)), dim=1) for _ in range(2))
    return functional.cross_entropy(a @ b.T / temperature, torch.arange(len(x)))


class Vae(nn.Module):
    """An autoencoder of digits whose divergence has a weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.encoder, self.decoder, self.weight = net(64, 48, 16), net(8, 48, 64), weight

    def loss(self, x: Tensor) -> Tensor:
        mean, log_var = self.encoder(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        kl = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1).mean()
        return functional.mse_loss(self.decoder(z), x, reduction="sum") / len(x) + self.weight * kl


def losses() -> list[Pair]:
    """Losses that do not fall: heads, labels, targets."""
    ce, bce = functional.cross_entropy, functional.binary_cross_entropy_with_logits
    several: Any = {"net": lambda: net(13, 48, 48, 3), **WINE}
    hot = lambda y: functional.one_hot(y, 3).float()  # noqa: E731
    kl = partial(functional.kl_div, reduction="batchmean")
    return [
        pair("softmax module, then cross-entropy", STUCK,
             {"net": lambda: nn.Sequential(conv(3), nn.Softmax(1)), **DIGITS, "optimizer": sgd(0.05)},
             {"net": lambda: conv(3)}),
        pair("sigmoid, then logits, several labels", STUCK,
             {**several, "step": lambda m, b: bce(m(b[0]).sigmoid(), hot(b[1]))},
             {"step": lambda m, b: bce(m(b[0]), hot(b[1]))}),
        pair("columns of targets shuffled", STUCK,
             {"net": lambda: net(10, 48, 48, 3), **DIABETES, "data": _shuffled_columns},
             {"data": lambda n: [(x, x[:, :3]) for x, _ in parts.table(n, "diabetes")]}),
        pair("focal loss, shuffled labels", STUCK,
             {"net": lambda: conv(3), **DIGITS, "step": lambda m, b: _focal(m(b[0]), b[1].roll(1))},
             {"step": lambda m, b: _focal(m(b[0]), b[1])}),
        pair("CTC of probabilities over time", STUCK,
             {"net": lambda: Sequence(nn.GRU(8, 32, batch_first=True), 11, last=False), **FLAT,
              "step": partial(_ctc, wrong=True), "optimizer": adam(3e-3)},
             {"step": partial(_ctc, wrong=False)}),
        pair("kl_div of log targets", (*STUCK, "nonfinite_loss"),
             {**several, "step": lambda m, b: kl(m(b[0]).log_softmax(1), (hot(b[1]) * 0.9 + 1 / 30).log())},
             {"step": lambda m, b: kl(m(b[0]).log_softmax(1), hot(b[1]) * 0.9 + 1 / 30)}),
        pair("huber, targets of 10,000", STUCK,
             {"net": lambda: net(10, 32, 32, 1), **DIABETES, "step": lambda m, b: functional.huber_loss(m(b[0]), b[1]),
              "data": lambda n: [(x, 1e4 * y) for x, y in parts.table(n, "diabetes")]},
             {"data": partial(parts.table, name="diabetes")}),
        pair("contrastive, temperature of 1,000", STUCK,
             {"net": lambda: net(64, 48, 16), **FLAT, "step": partial(_views, temperature=1e3)},
             {"step": partial(_views, temperature=0.2)}),
        pair("divergence of a VAE times 200", STUCK,
             {"net": lambda: Vae(200.0), **FLAT, "step": lambda m, b: m.loss(b[0])}, {"net": lambda: Vae(1.0)}),
        pair("rounded output", STUCK,
             {"net": lambda: net(10, 32, 32, 1), **DIABETES, "step": lambda m, b: functional.mse_loss(m(b[0]).round(), b[1])},
             {"step": parts.regress}),
        pair("dropout of 0.99", STUCK,
             {"net": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.99), nn.Linear(64, 64), nn.ReLU(),
                                           nn.Dropout(0.99), nn.Linear(64, 10)), **FLAT},
             {"net": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))}),
        pair("frozen statistics of 1e8", (*STUCK, *VANISHING),
             {"net": lambda: FrozenStatistics(1e8), **DIGITS}, {"net": lambda: FrozenStatistics(1.0)}),
        pair("all weights equal", (*STUCK, "poor_initialization"),
             {"net": lambda: changed(net(64, 48, 48, 10), lambda m: [p.fill_(0.01) for p in m.parameters()]), **FLAT},
             {"net": lambda: net(64, 48, 48, 10)}),
        pair("relu head, standardized targets", (*STUCK, *DEAD),
             {"net": lambda: nn.Sequential(net(10, 32, 32, 1), nn.ReLU()), **DIABETES,
              "data": lambda n: [(x, y - 2) for x, y in parts.table(n, "diabetes")]},
             {"net": lambda: net(10, 32, 32, 1)}),
        pair("labels of one less, ignored", STUCK,
             {**several, "step": lambda m, b: ce(m(b[0]), torch.zeros_like(b[1]), ignore_index=0, reduction="sum")},
             {"step": parts.classify}),
        pair("predictions averaged over the batch", STUCK,
             {**several, "step": lambda m, b: ce(m(b[0]).mean(0).expand(len(b[0]), 3), b[1])}, {"step": parts.classify}),
        pair("flat targets, l1", STUCK,
             {"net": lambda: net(10, 32, 32, 1), **DIABETES, "optimizer": adam(3e-3),
              "step": lambda m, b: (m(b[0]) - b[1].squeeze(1)).abs().mean()},
             {"step": lambda m, b: (m(b[0]) - b[1]).abs().mean()}),
    ]  # fmt: skip


def _shuffled_columns(n: int) -> list[Any]:
    g = torch.Generator().manual_seed(16)
    found = []
    for x, _ in parts.table(n, "diabetes"):
        columns = [x[torch.randperm(len(x), generator=g), i] for i in range(3)]
        found.append((x, torch.stack(columns, 1)))
    return found


class FrozenStatistics(nn.Module):
    def __init__(self, variance: float) -> None:
        super().__init__()
        self.body = conv(4, norm=nn.BatchNorm2d)
        for module in self.body:
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(variance)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.body:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self.body(x)


def units() -> list[Pair]:
    """Units that are dead or saturated."""
    shift = lambda at, by: lambda m: m[at].bias.add_(by)  # noqa: E731
    hand = {"net": lambda: ByHand(torch.relu)}
    silu = lambda: net(64, 48, 48, 10, act=nn.SiLU)  # noqa: E731
    return [
        pair("relu6 convolutions, bias of -15", DEAD,
             {"net": lambda: changed(conv(4, nn.ReLU6), shift(2, -15.0)), **DIGITS, "where": ("net.2", "net.3")},
             {"net": lambda: conv(4, nn.ReLU6)}),
        pair("SiLU, bias of -25", DEAD,
             {"net": lambda: changed(silu(), shift(2, -25.0)), **FLAT, "where": ("net.2", "net.3")}, {"net": silu}),
        pair("clamped by hand, bias of -15", DEAD,
             {"net": lambda: ByHand(lambda x: x.clamp(min=0), -15.0), **FLAT, "where": ("net.second",)}, hand),
        pair("squared relu, bias of -15", DEAD,
             {"net": lambda: ByHand(lambda x: x.relu().square(), -15.0), **FLAT, "where": ("net.second",)}, hand),
        pair("masked by hand, bias of -15", DEAD,
             {"net": lambda: ByHand(lambda x: x * (x > 0), -15.0), **FLAT, "where": ("net.second",)}, hand),
        pair("relu, Adam, rate of 0.7", (*DEAD, *EXPLODING),
             {"net": lambda: net(13, 48, 48, 48, 3), **WINE, "optimizer": adam(0.7)}, {"optimizer": adam(3e-3)}),
        pair("feed-forward of a transformer, bias of -30", DEAD,
             {"net": lambda: changed(Gpt(3, act=nn.ReLU), lambda m: [f[0].bias.sub_(30) for f in m.feed]), **TEXT,
              "where": ("net.feed",)},
             {"net": lambda: Gpt(3, act=nn.ReLU), "optimizer": adam(3e-3)}),
        pair("GRU, update bias of 40", (*SATURATED, *VANISHING, *STUCK),
             {"net": lambda: gru(40.0), **WAVES, "where": ("net.encoder",)}, {"net": gru, "optimizer": adam(5e-3)}),
        pair("LSTM by hand, inputs times 500", SATURATED,
             {"net": lambda: HandLstm(500.0), **SUMS, "data": partial(parts.adding, times=20), "where": ("net.gates",)},
             {"net": HandLstm, "data": partial(parts.adding, times=12), "optimizer": adam(1e-2)}),
        pair("softsign, weights of 8", SATURATED,
             {"net": lambda: changed(net(64, 48, 48, 48, 10, act=nn.Softsign), parts.filled(8.0)), **FLAT},
             {"net": lambda: net(64, 48, 48, 10, act=nn.Softsign)}),
        pair("hardtanh, weights of 5", SATURATED,
             {"net": lambda: changed(net(64, 48, 48, 48, 10, act=nn.Hardtanh), parts.filled(5.0)), **FLAT},
             {"net": lambda: net(64, 48, 48, 10, act=nn.Hardtanh)}),
        pair("sigmoid by hand, weights times 60", SATURATED,
             {"net": lambda: ByHand(lambda x: 1 / (1 + (-x).exp()), 30.0, 60.0), **FLAT, "where": ("net.second",)},
             {"net": lambda: ByHand(lambda x: 1 / (1 + (-x).exp()))}),
        pair("attention, queries times 500", SATURATED,
             {"net": lambda: Gpt(2, scale=500.0), **TEXT, "where": ("net.mix",)},
             {"net": lambda: Gpt(2), "optimizer": adam(3e-3)}),
        pair("LSTM, weights of 4", SATURATED,
             {"net": lambda: changed(Sequence(nn.LSTM(1, 24, batch_first=True), last=False), parts.filled(6.0)), **WAVES,
              "where": ("net.encoder",)},
             {"net": lambda: Sequence(nn.LSTM(1, 24, batch_first=True), last=False), "optimizer": adam(5e-3)}),
    ]  # fmt: skip


class Manual(pl.LightningModule):
    """A body and a head with optimizers of their own, that are stepped by hand, with a mistake."""

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.body, self.head, self.mistake = net(64, 48, 48), net(48, 32, 10), mistake

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        loss = functional.cross_entropy(self.head(self.body(batch[0]).relu()), batch[1])
        if self.mistake != "zero":
            first.zero_grad()
            second.zero_grad()
        self.manual_backward(loss)
        if self.mistake == "zero":
            first.zero_grad()
        first.step()
        if self.mistake != "forgotten":
            second.step()
        if self.mistake == "zero":
            second.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(m.parameters(), 1e-3) for m in (self.body, self.head)]


def stagnation() -> list[Pair]:
    """Weights that do not move."""
    good = {"optimizer": adam()}
    small = {"net": lambda: net(64, 48, 48, 10), **FLAT}

    def falling(model: nn.Module) -> Any:
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        rate = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.3)
        return [optimizer], [{"scheduler": rate, "interval": "step"}]

    def copied(model: nn.Module) -> Any:
        twin = net(64, 48, 48, 10)
        return torch.optim.Adam(twin.parameters(), 1e-3)

    def replaced(model: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        model.head = nn.Linear(32, 96, bias=False)
        return optimizer

    return [
        pair("optimizer of a copy", STAGNATION, {**small, "optimizer": copied}, good),
        pair("head of a transformer replaced", STAGNATION,
             {"net": Gpt, **TEXT, "optimizer": replaced, "where": ("net.head",)}, {"optimizer": sgd(0.05)}),
        modules("second optimizer never stepped", STAGNATION, lambda: Manual("forgotten"), lambda: Manual(""),
                        partial(parts.digits, flat=True), ("head",)),
        modules("zeroed before the step", STAGNATION, lambda: Manual("zero"), lambda: Manual(""),
                        partial(parts.digits, flat=True), ("body",)),
        pair("U-Net, detached on the way down", STAGNATION,
             {"net": lambda: Unet(cut=True), **MASKS, "where": ("net.down", "net.middle")}, {"net": Unet}),
        pair("transformer, rate of 1e-8", (*STAGNATION, *STUCK),
             {"net": Gpt, **TEXT, "optimizer": adam(1e-8)}, {"optimizer": adam(3e-3)}),
        pair("rate that falls by 0.3 each step", (*STAGNATION, *STUCK), {**small, "optimizer": falling}, good),
        pair("clipped at 1e-7, SGD", (*STAGNATION, *STUCK),
             {**small, "optimizer": sgd(0.05), "gradient_clip_val": 1e-7}, {"gradient_clip_val": 1.0}),
        pair("weights in bf16, rate of 1e-6", (*STAGNATION, *STUCK),
             {**small, "optimizer": sgd(1e-5, 0), "precision": "bf16-true"}, {"optimizer": sgd(0.05)}),
        pair("encoder of an RNN in no optimizer", STAGNATION,
             {"net": lambda: lstm(last=False, n_out=2), **SUMS, "where": ("net.encoder",),
              "data": lambda n: [(x, x.roll(1, 1)) for x, _ in parts.adding(n, 20)],
              "optimizer": lambda m: torch.optim.Adam(m.readout.parameters(), 1e-2)}, {"optimizer": adam(1e-2)}),
        pair("gradients of a layer times 0", STAGNATION,
             {"net": lambda: _hooked(), **FLAT, "where": ("net.2",)}, {"net": lambda: net(64, 48, 48, 10)}),
    ]  # fmt: skip


def _hooked() -> nn.Module:
    model = net(64, 48, 48, 10)
    for parameter in model[2].parameters():
        parameter.register_hook(lambda gradient: 0 * gradient)
    return model


def pairs() -> list[Pair]:
    """Returns all of them."""
    return [*depth(), *rates(), *losses(), *units(), *stagnation()]
