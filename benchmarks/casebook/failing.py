"""Failing programs, each with its cured twin."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
    changed,
    classes,
    cnn,
    cross_entropy,
    he,
    images,
    mlp,
    next_token,
    normal,
    recall,
    sgd,
    squared,
    text,
    values,
)

Pair = tuple[Case, Case]
VANISHING = ("vanishing_gradient",)
EXPLODING = ("exploding_gradient",)
STUCK = ("stuck_loss",)
DEAD = ("dead_units",)
SATURATED = ("saturated_units",)
STAGNATION = ("weight_stagnation",)


def pair(name: str, kinds: tuple[str, ...], failing: dict[str, Any], cured: dict[str, Any]) -> Pair:
    """Returns a failing program and its twin, which has the other arguments."""
    where = failing.pop("where", ())
    twin = {**failing, **cured}
    return (
        case(name, **failing, kinds=kinds, where=where),
        case(f"{name}, cured", **twin),
    )


def vanishing() -> list[Pair]:
    """Gradients that do not reach the first layers."""
    cured: dict[str, Any] = {"net": lambda: mlp(3, nn.ReLU, he)}
    deep = {"net": lambda: mlp(12, nn.ReLU, he)}
    small_cnn = {"net": lambda: cnn(3)}
    pairs = [
        pair("sigmoid, 10 layers", VANISHING, {"net": lambda: mlp(10, nn.Sigmoid)}, cured),
        pair(
            "sigmoid, 8 layers, SGD",
            VANISHING,
            {"net": lambda: mlp(8, nn.Sigmoid), "optimizer": sgd()},
            cured,
        ),
        pair("relu, weights of 0.03", VANISHING, {"net": lambda: mlp(8, nn.ReLU, normal(0.03))}, deep),
        pair("tanh, weights of 0.02", VANISHING, {"net": lambda: mlp(10, nn.Tanh, normal(0.02))}, deep),
        pair("gelu, weights of 0.02", VANISHING, {"net": lambda: mlp(10, nn.GELU, normal(0.02))}, deep),
        pair(
            "sigmoid convolutions", VANISHING, {"net": lambda: cnn(8, nn.Sigmoid), "data": images}, small_cnn
        ),
        pair(
            "convolutions of 0.01",
            VANISHING,
            {"net": lambda: cnn(6, nn.ReLU, normal(0.01)), "data": images},
            {"net": lambda: cnn(6, nn.ReLU, he)},
        ),
        pair(
            "one tiny layer",
            VANISHING,
            {
                "net": lambda: changed(mlp(6, nn.Tanh), lambda n: n[6].weight.mul_(1e-4)),
                "optimizer": sgd(0.05, 0),
                "where": ("net.6", "net.4"),
            },
            {"net": lambda: mlp(6, nn.Tanh)},
        ),
    ]
    rnn = {"data": partial(averages, times=10)}
    for name, kind, gain, times in (
        ("rnn", nn.RNN, 0.5, 40),
        ("gru", nn.GRU, 0.3, 60),
        ("lstm", nn.LSTM, 0.3, 60),
    ):
        pairs.append(
            pair(
                f"{name}, recall over {times}",
                VANISHING,
                {
                    "net": partial(_recurrent, kind, gain),
                    "data": partial(recall, times=times),
                    "where": ("net.rnn",),
                },
                {"net": partial(_recurrent, kind, 1.0), **rnn},
            )
        )
    cell = {"net": lambda: CellLoop(nn.RNNCell(4, 24), 0.4), "data": partial(recall, times=40)}
    cured_cell = {"net": lambda: CellLoop(nn.RNNCell(4, 24), 1.0), **rnn}
    pairs.append(pair("cell in a loop", VANISHING, {**cell, "where": ("net.cell",)}, cured_cell))
    return pairs


def _recurrent(kind: Callable[..., nn.RNNBase], gain: float) -> nn.Module:
    net = Recurrent(kind(4, 24, batch_first=True))
    for name, weight in net.rnn.named_parameters():
        if "weight_hh" in name:
            for block in weight.data.split(24):
                nn.init.orthogonal_(block, gain)
    return net


def exploding() -> list[Pair]:
    """Gradients that grow, and updates too large for the weights."""
    pairs = [
        pair(
            "relu, gain of 4",
            EXPLODING,
            {"net": lambda: mlp(10, nn.ReLU, normal(4 / 48**0.5)), "optimizer": sgd(1e-3)},
            {"net": lambda: mlp(10, nn.ReLU, he), "optimizer": sgd(1e-2)},
        ),
        pair(
            "convolutions, gain of 5",
            EXPLODING,
            {"net": lambda: cnn(6, nn.ReLU, normal(0.5)), "data": images, "optimizer": sgd(1e-2)},
            {"net": lambda: cnn(6, nn.ReLU, he), "optimizer": sgd(1e-2)},
        ),
        pair(
            "batch normalization, 30 layers",
            EXPLODING,
            {"net": lambda: mlp(30, nn.ReLU, norm=True), "optimizer": sgd(1e-2)},
            {"net": lambda: mlp(4, nn.ReLU, norm=True)},
        ),
        pair(
            "recurrent weights of 2",
            EXPLODING,
            {"net": lambda: _relu_rnn(1.8), "data": partial(averages, times=40), "optimizer": sgd(1e-2)},
            {"net": lambda: _relu_rnn(0.9), "data": partial(averages, times=10)},
        ),
    ]
    for name, bad, good in (
        ("SGD, rate of 20", sgd(20, 0), sgd(0.1, 0)),
        ("momentum, rate of 5", sgd(5), sgd(0.02)),
        ("Adam, rate of 1", adam(1.0), adam(1e-3)),
        ("Adam, rate of 0.3", adam(0.3), adam(3e-3)),
        ("RMSprop, rate of 0.5", _rmsprop(0.5), _rmsprop(1e-3)),
    ):
        pairs.append(pair(name, EXPLODING, {"net": lambda: mlp(4), "optimizer": bad}, {"optimizer": good}))
    pairs += [
        pair(
            "summed loss",
            EXPLODING,
            {
                "net": lambda: mlp(3, n_out=1),
                "data": values,
                "optimizer": sgd(0.05),
                "step": lambda net, b: functional.mse_loss(net(b[0]), b[1], reduction="sum"),
            },
            {"step": squared},
        ),
        pair(
            "targets of 1000",
            EXPLODING,
            {
                "net": lambda: mlp(3, n_out=1),
                "data": partial(values, scale=1000),
                "step": squared,
                "optimizer": sgd(),
            },
            {"data": values},
        ),
        pair(
            "inputs of 100",
            EXPLODING,
            {"net": lambda: mlp(3), "data": partial(classes, scale=100), "optimizer": sgd(0.1)},
            {"data": classes},
        ),
        pair(
            "transformer, rate of 0.3",
            EXPLODING,
            {"net": Transformer, "data": text, "step": next_token, "optimizer": adam(0.3)},
            {"optimizer": adam(3e-3)},
        ),
    ]
    return pairs


def _rmsprop(rate: float) -> Callable[[nn.Module], Any]:
    return lambda net: torch.optim.RMSprop(net.parameters(), rate)


def _relu_rnn(gain: float) -> nn.Module:
    net = Recurrent(nn.RNN(4, 24, nonlinearity="relu", batch_first=True))
    nn.init.orthogonal_(net.rnn.weight_hh_l0, gain)
    return net


def contract() -> list[Pair]:
    """Losses that are called with what they do not expect."""

    def on(change: Callable[[Tensor], Tensor], loss: Any = functional.cross_entropy) -> Any:
        return lambda net, b: loss(change(net(b[0])), b[1])

    log_softmax = partial(functional.log_softmax, dim=1)
    good = {"step": cross_entropy}
    one = {"net": lambda: mlp(3, n_out=1), "data": _binary}
    logits = {"step": lambda net, b: functional.binary_cross_entropy_with_logits(net(b[0]), b[1])}
    value: dict[str, Any] = {"net": lambda: mlp(3, n_out=1), "data": values, "step": squared}

    def head(module: nn.Module, **more: Any) -> dict[str, Any]:
        return {**value, "net": lambda: mlp(3, n_out=1, head=module), **more}

    linear = {"net": lambda: mlp(3, n_out=1), "data": values}
    bce = functional.binary_cross_entropy
    return [
        pair(
            "softmax, mlp", STUCK, {"net": mlp, "step": on(lambda z: z.softmax(1)), "where": ("net.6",)}, good
        ),
        pair(
            "softmax, convolutions",
            STUCK,
            {"net": cnn, "data": images, "step": on(lambda z: z.softmax(1))},
            good,
        ),
        pair(
            "nll of logits",
            STUCK,
            {"net": mlp, "step": on(lambda z: z, functional.nll_loss)},
            {"step": on(log_softmax, functional.nll_loss)},
        ),
        pair(
            "nll of probabilities",
            STUCK,
            {
                "net": partial(_recurrent, nn.GRU, 1.0),
                "data": averages,
                "step": on(lambda z: z.softmax(1), functional.nll_loss),
            },
            {"step": on(log_softmax, functional.nll_loss)},
        ),
        pair(
            "softmax over one unit",
            STUCK,
            {**one, "step": lambda n, b: bce(n(b[0]).softmax(1), b[1])},
            logits,
        ),
        pair(
            "softmax over one unit, by hand",
            STUCK,
            {**one, "step": lambda n, b: (n(b[0]).softmax(1) - b[1]).square().mean()},
            logits,
        ),
        pair(
            "sigmoid before logits",
            STUCK,
            {
                **one,
                "step": lambda n, b: functional.binary_cross_entropy_with_logits(n(b[0]).sigmoid(), b[1]),
            },
            logits,
        ),
        pair(
            "broadcast, mse_loss",
            STUCK,
            {**value, "data": partial(values, flat=True), "step": _ignoring(squared)},
            {"data": values},
        ),
        pair(
            "broadcast, by hand",
            STUCK,
            {
                **value,
                "data": partial(values, flat=True),
                "step": lambda n, b: (n(b[0]) - b[1]).square().mean(),
            },
            {"data": values},
        ),
        pair(
            "sigmoid head, targets of 10", STUCK, head(nn.Sigmoid(), data=partial(values, scale=10)), linear
        ),
        pair("tanh head, targets of 20", STUCK, head(nn.Tanh(), data=partial(values, scale=20)), linear),
        pair(
            "relu head, negative targets",
            STUCK,
            head(nn.ReLU(), data=lambda n: [(x, -y.abs() - 1) for x, y in values(n)]),
            linear,
        ),
        pair(
            "sigmoid head, by hand",
            STUCK,
            head(
                nn.Sigmoid(),
                data=lambda n: [(x, y - 5) for x, y in values(n)],
                step=lambda n, b: (n(b[0]) - b[1]).abs().mean(),
            ),
            linear,
        ),
        pair("targets of another batch", STUCK, {"net": mlp, "data": _shifted}, {"data": classes}),
        pair("permuted regression targets", STUCK, {**value, "data": _shuffled}, {"data": values}),
        pair(
            "permuted targets, loss by hand",
            STUCK,
            {"net": mlp, "data": _shifted, "step": _nll_by_hand},
            {"data": classes},
        ),
        pair("inputs of zero", STUCK, {"net": mlp, "data": partial(classes, scale=0.0)}, {"data": classes}),
        pair(
            "labels ignored",
            STUCK,
            {
                "net": mlp,
                "data": lambda n: [(x, torch.full_like(y, -100)) for x, y in classes(n)],
                "step": lambda n, b: functional.cross_entropy(n(b[0]), b[1], reduction="sum") / 64,
            },
            {"data": classes},
        ),
        pair(
            "weights of zero",
            (*STUCK, *VANISHING, *STAGNATION, *DEAD),
            {"net": lambda: mlp(4, nn.ReLU, nn.init.zeros_)},
            {"net": lambda: mlp(4)},
        ),
        pair(
            "kl_div of probabilities",
            STUCK,
            {
                "net": mlp,
                "data": _soft,
                "step": lambda n, b: functional.kl_div(n(b[0]).softmax(1), b[1], reduction="batchmean"),
            },
            {"step": lambda n, b: functional.kl_div(n(b[0]).log_softmax(1), b[1], reduction="batchmean")},
        ),
    ]


def _ignoring(step: Any) -> Any:
    import warnings

    def quiet(net: Any, batch: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return step(net, batch)

    return quiet


def _binary(n: int) -> list[Any]:
    return [(x, (y > 1).float().unsqueeze(1)) for x, y in classes(n)]


def _soft(n: int) -> list[Any]:
    return [(x, functional.one_hot(y, 4).float() * 0.9 + 0.025) for x, y in classes(n)]


def _shifted(n: int) -> list[Any]:
    found = classes(n)
    return [(x, y.roll(1)) for x, y in found]


def _shuffled(n: int) -> list[Any]:
    return [(x, y.roll(1, 0)) for x, y in values(n)]


def _nll_by_hand(net: Any, batch: Any) -> Tensor:
    x, y = batch
    return -net(x).log_softmax(1)[torch.arange(len(y)), y].mean()


def units() -> list[Pair]:
    """Units that are dead or saturated."""
    tanh = {"net": lambda: mlp(4, nn.Tanh)}
    wide = normal(3.0)
    return [
        pair(
            "relu, one bias of -20",
            DEAD,
            {"net": lambda: changed(mlp(4), lambda n: n[2].bias.sub_(20)), "where": ("net.2", "net.3")},
            {"net": lambda: mlp(4)},
        ),
        pair(
            "relu convolutions, one bias of -20",
            DEAD,
            {
                "net": lambda: changed(cnn(4), lambda n: n[4].bias.sub_(20)),
                "data": images,
                "where": ("net.4", "net.5"),
            },
            {"net": lambda: cnn(4)},
        ),
        pair(
            "gelu, one bias of -20",
            DEAD,
            {"net": lambda: changed(mlp(4, nn.GELU), lambda n: n[2].bias.sub_(20)), "where": ("net.2",)},
            {"net": lambda: mlp(4, nn.GELU)},
        ),
        pair(
            "relu, inputs of -50",
            DEAD,
            {
                "net": lambda: changed(mlp(4), lambda n: n[0].weight.abs_()),
                "data": partial(classes, shift=-50.0),
                "where": ("net.0", "net.1"),
            },
            {"net": lambda: mlp(4), "data": classes},
        ),
        pair(
            "relu head, bias of -10",
            (*DEAD, *STUCK),
            {
                "net": lambda: changed(mlp(3, n_out=1, head=nn.ReLU()), lambda n: n[6].bias.sub_(10)),
                "data": lambda n: [(x, y.abs()) for x, y in values(n)],
                "step": squared,
            },
            {"net": lambda: mlp(3, n_out=1)},
        ),
        pair("tanh, weights of 3", SATURATED, {"net": lambda: mlp(4, nn.Tanh, wide)}, tanh),
        pair("sigmoid, weights of 6", SATURATED, {"net": lambda: mlp(3, nn.Sigmoid, normal(6.0))}, tanh),
        pair(
            "tanh, inputs of 200",
            SATURATED,
            {"net": lambda: mlp(4, nn.Tanh), "data": partial(classes, scale=200)},
            {"data": classes},
        ),
        pair(
            "tanh, one bias of 20",
            SATURATED,
            {
                "net": lambda: changed(mlp(4, nn.Tanh), lambda n: n[4].bias.add_(20)),
                "where": ("net.4", "net.5"),
            },
            tanh,
        ),
        pair(
            "rnn, weights of 5",
            SATURATED,
            {
                "net": lambda: changed(_recurrent(nn.RNN, 1.0), lambda n: n.rnn.bias_hh_l0.add_(10)),
                "data": averages,
                "where": ("net.rnn",),
            },
            {"net": partial(_recurrent, nn.RNN, 1.0)},
        ),
    ]


class _Detached(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.head, self.how = mlp(3, n_out=32), nn.Linear(32, 4), how

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        if self.how == "no_grad":
            with torch.no_grad():
                hidden = self.body(x)
        out: Tensor = self.head(hidden.detach() if self.how == "detach" else hidden.relu())
        return out


def stagnation() -> list[Pair]:
    """Weights that do not move."""

    def replaced(net: nn.Module) -> Any:
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        net[0] = nn.Linear(20, 48)  # type: ignore[operator]
        return optimizer

    def groups(first: float) -> Any:
        return lambda net: torch.optim.Adam(
            [{"params": net[:4].parameters(), "lr": first}, {"params": net[4:].parameters()}], 1e-3
        )

    good = {"optimizer": adam()}
    whole = {"net": lambda: _Detached("")}
    low = (*STAGNATION, *STUCK)
    return [
        pair(
            "first half in no optimizer",
            STAGNATION,
            {
                "net": mlp,
                "optimizer": lambda n: torch.optim.Adam(n[4:].parameters()),
                "where": ("net.0", "net.2"),
            },
            good,
        ),
        pair(
            "head in no optimizer",
            STAGNATION,
            {
                "net": cnn,
                "data": images,
                "optimizer": lambda n: torch.optim.Adam(n[:-1].parameters()),
                "where": ("net.8",),
            },
            good,
        ),
        pair("replaced layer", STAGNATION, {"net": mlp, "optimizer": replaced, "where": ("net.0",)}, good),
        pair(
            "detached body", STAGNATION, {"net": lambda: _Detached("detach"), "where": ("net.body",)}, whole
        ),
        pair(
            "body without gradient",
            STAGNATION,
            {"net": lambda: _Detached("no_grad"), "where": ("net.body",)},
            whole,
        ),
        pair("Adam, rate of 1e-8", low, {"net": mlp, "optimizer": adam(1e-8)}, good),
        pair("SGD, rate of 1e-6", low, {"net": mlp, "optimizer": sgd(1e-6)}, {"optimizer": sgd()}),
        pair("rate of 0", low, {"net": mlp, "optimizer": sgd(0.0)}, {"optimizer": sgd()}),
        pair(
            "first half at a rate of 1e-11",
            STAGNATION,
            {"net": mlp, "optimizer": groups(1e-11), "where": ("net.0", "net.2")},
            {"optimizer": groups(3e-4)},
        ),
    ]


def pairs() -> list[Pair]:
    """Returns all of them."""
    return [*vanishing(), *exploding(), *contract(), *units(), *stagnation()]
