"""Failing programs are named with cause and layer, healthy ones never; nothing is written."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.checkpoint import checkpoint

from benchmarks.evidence.adversarial import gan
from lightning_gradguard import (
    AdaptiveGradientClipping,
    GlobalNormClipping,
    Incident,
    InitializationCheck,
    TrainingDiagnosis,
    Treatment,
    default_callbacks,
)
from lightning_gradguard.cli.main import main
from lightning_gradguard.core.detectors.diagnosis import (
    Diagnosis,
    LossBaselines,
    StepTrace,
    Symptom,
    TargetDependence,
)
from lightning_gradguard.core.detectors.diagnosis.sample import (
    LayerSignal,
    LossSignal,
    Sample,
    TimeSignal,
    UnitSignal,
    Update,
)
from lightning_gradguard.core.detectors.diagnosis.signals.recurrences import saturated_gates
from lightning_gradguard.core.detectors.diagnosis.signals.units import UnitGradients, extremes
from lightning_gradguard.core.incidents import CURE
from lightning_gradguard.core.initialization import Finding, frozen_layers
from lightning_gradguard.core.remedies import advice_for_cause
from lightning_gradguard.runtime.incidents.present import findings_of_check
from tests.launching import launch_on
from tests.runtime.logging.test_loggers import events_in
from tests.tasks import Classifier, Listener, ResumableLoader, batches, fit, optimizer_state, same, weights

Change = Callable[[Any], Any]


class Task(Classifier):
    """The classifier with another network, loss or optimizer."""

    def __init__(
        self, net: nn.Module | None = None, loss: Any = functional.cross_entropy, optimizer: Any = None
    ) -> None:
        super().__init__("adam")
        self.net = net or self.net  # type: ignore[assignment]
        self.loss, self.make = loss, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.loss(self.net(batch[0]), batch[1])
        return loss

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self.make is None else self.make(self.net)


def diagnosed(module: pl.LightningModule, n: int = 12, data: Any = None, **trainer: Any) -> list[Incident]:
    listener = Listener()
    fit(module, data or batches(n), [TrainingDiagnosis(), listener], **trainer)
    return listener.found


def deep(act: type[nn.Module], depth: int, std: float | None = None, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        linear = nn.Linear(20 if i == 0 else 32, 32)
        if std is not None:
            nn.init.normal_(linear.weight, 0, std)
        layers += [linear, *([nn.BatchNorm1d(32)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(32, 4))


def biased(net: nn.Sequential, layer: int, bias: float) -> nn.Sequential:
    nn.init.constant_(net[layer].bias, bias)  # type: ignore[arg-type]
    return net


def shifted(net: nn.Sequential, layer: int, by: float) -> nn.Sequential:
    with torch.no_grad():
        net[layer].bias.copy_(torch.tensor([by, -by]).repeat(16))  # type: ignore[operator]
    return net


def one_unit(*head: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1), *head)


def scaled(net: nn.Sequential, layer: int, by: float) -> nn.Sequential:
    with torch.no_grad():
        net[layer].weight.mul_(by)  # type: ignore[operator]
    return net


def attracted(embeddings: Tensor, labels: Tensor) -> Tensor:
    return -functional.cosine_similarity(embeddings, embeddings.flip(0)).mean()


def values(n: int = 12, scale: float = 1.0, shift: float = 0.0, flat: bool = False) -> Any:
    found = [(x, x[:, :1] * scale + shift) for x, _ in batches(n)]
    return [(x, y.squeeze(1)) for x, y in found] if flat else found


def raw(n: int) -> Any:
    return [(x * 300, y * 3000) for x, y in values(n)]


def by_hand(answer: Tensor, target: Tensor) -> Tensor:
    return (answer - target).square().mean()


def rate(lr: float) -> Change:
    return lambda net: torch.optim.SGD(net.parameters(), lr)


FAILING: dict[str, tuple[str, str, str, Callable[[], Any], Any]] = {
    "sigmoid": ("vanishing_gradient", "saturating_activations", "net.0",
                lambda: Task(deep(nn.Sigmoid, 10)), None),
    "tiny weights": ("vanishing_gradient", "", "net.0", lambda: Task(deep(nn.ReLU, 8, 0.03)), None),
    "large weights": ("exploding_gradient", "large_weights", "net.0",
                      lambda: Task(deep(nn.ReLU, 8, 0.9)), None),
    "large weights, many layers": ("exploding_gradient", "large_weights", "net.0",
                                   lambda: Task(deep(nn.LeakyReLU, 12, 2.0), optimizer=_adam), None),
    "rate": ("exploding_gradient", "update_too_large", "", lambda: Task(optimizer=rate(100.0)), None),
    "softmax": ("stuck_loss", "softmax_before_loss", "net.6",
                lambda: Task(loss=lambda z, y: functional.cross_entropy(z.softmax(1), y)), None),
    "sigmoids": ("stuck_loss", "softmax_before_loss", "net.6",
                 lambda: Task(loss=lambda z, y: functional.cross_entropy(z.sigmoid(), y)), None),
    "nll": ("stuck_loss", "not_log_probabilities", "net.6", lambda: Task(loss=functional.nll_loss), None),
    "one class": ("stuck_loss", "single_class", "net.2",
                  lambda: Task(one_unit(nn.Softmax(1)), by_hand), values()),
    "entropy of a regression": ("stuck_loss", "single_class", "net.2",
                                lambda: Task(one_unit(), functional.cross_entropy), values()),
    "broadcast": ("stuck_loss", "broadcast_targets", "net.2",
                  lambda: Task(one_unit(), by_hand), values(flat=True)),
    "out of reach": ("stuck_loss", "unreachable_targets", "net.2",
                     lambda: Task(one_unit(nn.Sigmoid()), functional.mse_loss), values(shift=-5.0)),
    "on the way": ("stuck_loss", "learning_rate_too_low", "net.2",
                   lambda: Task(one_unit(), functional.mse_loss, rate(1e-5)), values(180, shift=50.0)),
    "logits": ("stuck_loss", "softmax_before_loss", "net.2",
               lambda: Task(one_unit(nn.Sigmoid()), functional.binary_cross_entropy_with_logits),
               [(x, (y > 0).float()) for x, y in values()]),
    "sigmoid twice": ("stuck_loss", "unreachable_targets", "net.2",
                      lambda: Task(one_unit(nn.Sigmoid()), lambda p, y: functional.binary_cross_entropy(p.sigmoid(), y)),  # noqa: E501
                      [(x, (y > 0).float()) for x, y in values()]),
    "several labels": ("stuck_loss", "unreachable_targets", "net.3",
                       lambda: Task(one_unit(nn.Linear(1, 4), nn.Softmax(1)),
                                    functional.binary_cross_entropy),
                       [(x, (x[:, :4] > 0).float()) for x, _ in batches(12)]),
    "dead": ("dead_units", "", "net.2", lambda: Task(biased(deep(nn.ReLU, 4), 2, -20.0)), None),
    "saturated": ("saturated_units", "", "net.2", lambda: Task(biased(deep(nn.Tanh, 4), 2, 20.0)), None),
    "dead, by hand": ("dead_units", "", "net.2", lambda: Task(biased(deep(Clamped, 4), 2, -20.0)), None),
    "relu6": ("dead_units", "", "net.2", lambda: Task(biased(deep(nn.ReLU6, 4), 2, -20.0)), None),
    "saturated, by hand": ("saturated_units", "", "net.2", lambda: Task(deep(Bounded, 4, 900.0)), None),
    "softsign": ("saturated_units", "", "net.2", lambda: Task(deep(nn.Softsign, 4, 8.0)), None),
    "sigmoid, by hand": ("saturated_units", "", "net.2",
                         lambda: Task(shifted(deep(Logistic, 4), 2, 30.0)), None),
    "update gates": ("saturated_units", "", "rnn", lambda: gated(nn.GRU, slice(16, 32), 40.0), None),
    "input gates": ("saturated_units", "", "rnn", lambda: gated(nn.LSTM, slice(0, 16), -20.0), None),
    "gates of a stack": ("saturated_units", "", "rnn",
                         lambda: gated(nn.GRU, slice(16, 32), 40.0, num_layers=2), None),
    "attention": ("saturated_units", "large_logits", "attend", lambda: Attending(), None),
    "gates of experts": ("saturated_units", "", "net.gate", lambda: Task(Experts(1e4)), None),
    "targets": ("exploding_gradient", "target_scale", "net.2",
                lambda: Task(one_unit(), functional.mse_loss, rate(0.1)), values(scale=1e5)),
    "a copy is trained": ("weight_stagnation", "replaced_parameters", "net.0",
                          lambda: Task(optimizer=lambda n: torch.optim.Adam(deepcopy(n).parameters())), None),
    "forgotten": ("weight_stagnation", "not_in_optimizer", "net.0",
                  lambda: Task(optimizer=lambda net: torch.optim.Adam(net[4:].parameters())), None),
    "raw prices": ("stuck_loss", "target_scale", "net.2",
                   lambda: Task(one_unit(), functional.mse_loss, _adam), values(160, 1e4, 1e5)),
    "labels of one class": ("stuck_loss", "constant_target", "net.6", Task,
                            [(x, y * 0 + 2) for x, y in batches(101)]),
    "smoothed labels": ("stuck_loss", "constant_target", "net.6",
                        lambda: Task(loss=lambda p, y: functional.cross_entropy(p, y, label_smoothing=1.0)),
                        batches(51)),
    "large logits": ("exploding_gradient", "large_answers", "net.6",
                     lambda: Task(scaled(deep(nn.ReLU, 3), 6, 1e3), optimizer=_adam), batches(26)),
    "collapsed embeddings": ("stuck_loss", "same_answers", "net.3",
                             lambda: Task(one_unit(nn.Linear(1, 16)), attracted, _adam_at(0.01)),
                             batches(160)),
    "rate of 0": ("weight_stagnation", "learning_rate_too_low", "net.0",
                  lambda: Task(optimizer=rate(0.0)), batches(25)),
    "raw inputs and targets": ("exploding_gradient", "data_scale", "net.0",
                               lambda: Task(one_unit(), functional.mse_loss, rate(0.01)), raw(12)),
    "raw inputs and targets, slow": ("stuck_loss", "data_scale", "net.0",
                                     lambda: Task(one_unit(), functional.mse_loss, _adam_at(1e-5)), raw(160)),
    "tiny inputs": ("weight_stagnation", "input_scale", "net.0",
                    lambda: Task(optimizer=lambda n: torch.optim.SGD(n.parameters(), 0.1)),
                    [(x * 1e-5, y) for x, y in batches(26)]),
    "functional sigmoid": ("vanishing_gradient", "saturating_activations", "net.weights.0",
                           lambda: Task(Functional(10, torch.sigmoid)), None),
    "functional, dead": ("dead_units", "", "net.weights.0",
                         lambda: Task(Functional(3, lambda x: torch.relu(x - 20))), None),
    "a list of Python": ("weight_stagnation", "not_registered", "net.layers.0", lambda: Task(Listed()), None),
    "position beside layers": ("weight_stagnation", "not_in_optimizer", "net.inner.body.0",
                               lambda: Task(Positioned(), optimizer=lambda n: _adam(n.inner.head)), None),
    "the same inputs": ("stuck_loss", "constant_input", "net.0", Task,
                        [(torch.ones_like(x), y) for x, y in batches(12)]),
    "rounded code": ("weight_stagnation", "zero_gradient", "net.2",
                     lambda: Task(deep(nn.ReLU, 4).insert(4, Round())), None),
    "stack of tiny weights": ("vanishing_gradient", "small_weights", "rnn",
                              lambda: tiny(gated(nn.LSTM, slice(0), 0.0, num_layers=4)), None),
    "a triplet of one sample": ("weight_stagnation", "zero_gradient", "net.0", lambda: Triplets(), None),
    "labels of no class": ("stuck_loss", "labels_ignored", "net.6", Task,
                           [(x, torch.zeros(len(x), 4)) for x, _ in batches(12)]),
    "no gradient of any weight": ("weight_stagnation", "zero_gradient", "net.0",
                                  lambda: Task(nn.Sequential(nn.Linear(20, 32), nn.Dropout(1.0), nn.Linear(32, 4))),  # noqa: E501
                                  None),
}  # fmt: skip


def test_advice_beside_a_treatment_is_for_a_run_that_does_not_learn() -> None:
    listener = Listener()
    clipping = AdaptiveGradientClipping(GlobalNormClipping(1.0))
    fit(Task(optimizer=rate(100.0)), batches(12), [Treatment([]), clipping, TrainingDiagnosis(), listener])
    found = next(one for one in listener.found if one.kind == "exploding_gradient")
    assert found.advice.startswith("If the loss falls, the changes of the treatment suffice. If not: ")


def test_the_part_of_the_batch_that_is_huge_is_named() -> None:
    class Mixed(Classifier):
        def __init__(self) -> None:
            super().__init__("adam")
            self.embed, self.net = nn.Embedding(4, 8), nn.Sequential(nn.Linear(28, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            embedded = self.embed(batch["class"])
            return functional.cross_entropy(self.net(torch.cat([embedded, batch["age"]], 1)), batch["y"])

    data = [{"class": y, "age": x * 1e9, "y": y} for x, y in batches(30)]
    (incident,) = diagnosed(Mixed(), data=data)
    assert (incident.kind, incident.cause) == ("exploding_gradient", "input_scale")
    assert "inputs batch['age'] have an rms of" in incident.detail
    assert "Scale the inputs" in incident.advice


def test_inputs_are_normalized_before_the_layer_that_gets_them() -> None:
    net = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), deep(nn.Tanh, 3))
    (incident,) = diagnosed(Task(net), data=[(x * 1e4, y) for x, y in batches(26)])
    assert (incident.kind, incident.cause) == ("saturated_units", "input_scale")
    assert "100% of the units of net.2.0 are saturated" in incident.detail
    assert "a normalization layer before net.0." in incident.advice


class Triplets(Task):
    """Compares each sample with itself: what three passes give to a weight adds up to nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.triplet_margin_loss(*(self.net(batch[0]) for _ in range(3)))


class Round(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul(4).round()


class Functional(nn.Module):
    """Matrices in a list, and `functional.linear`."""

    def __init__(self, depth: int, act: Any) -> None:
        super().__init__()
        widths = [20, *[32] * depth, 4]
        torch.manual_seed(0)
        self.weights = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(b, a)) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights[:-1]:
            x = self.act(functional.linear(x, weight))
        out: Tensor = x @ self.weights[-1].T
        return out


class Experts(nn.Module):
    """A softmax over four networks."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.by = nn.Linear(20, 4), scale
        self.experts: Any = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        shares: Tensor = (self.by * self.gate(x)).softmax(1)
        out: Tensor = torch.stack([e(x) for e in self.experts], 2) @ shares[..., None]
        return out[..., 0]


class Gated(nn.Module):
    """A recurrence by hand; a bias of its gate keeps the state, or forgets it."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.reset, self.new = nn.Linear(33, 32), nn.Linear(33, 32), nn.Linear(33, 32)
        self.out, self.keeps = nn.Linear(32, 4), keeps
        nn.init.constant_(self.gate.bias, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 32)
        for t in range(x.shape[1]):
            now = torch.cat([x[:, t : t + 1], h], 1)
            z, r = self.gate(now).sigmoid(), self.reset(now).sigmoid()
            new = self.new(torch.cat([x[:, t : t + 1], r * h], 1)).tanh()
            h = z * h + (1 - z) * new if self.keeps else z * new + (1 - z) * h
        out: Tensor = self.out(h)
        return out


@pytest.mark.parametrize(("keeps", "found"), [(True, []), (False, ["vanishing_gradient"])])
def test_gates_by_hand_that_keep_the_state_are_no_fault(keeps: bool, found: list[str]) -> None:
    data = [(x, y.roll(1)) for x, y in batches(26)]  # nothing can be learned
    listener = Listener()
    callbacks = [InitializationCheck(), TrainingDiagnosis(), listener]
    fit(Task(Gated(keeps), optimizer=_adam), data, callbacks)
    assert [i.kind for i in listener.found if i.kind != "poor_initialization"] == found
    assert keeps is not any(i.kind == "poor_initialization" for i in listener.found)


class Highway(nn.Module):
    """A gate chooses between a transformed input and the input."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.h, self.t = nn.Linear(32, 32), nn.Linear(32, 32)
        nn.init.constant_(self.t.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        t: Tensor = self.t(x).sigmoid()
        out: Tensor = t * self.h(x).tanh() + (1 - t) * x
        return out


def test_gates_that_are_all_open_are_named_by_what_vanishes_behind_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), *(Highway(8.0) for _ in range(30)), nn.Linear(32, 4))
    (incident,) = diagnosed(Task(net))
    assert incident.kind == "vanishing_gradient"


class Scaled(nn.Module):
    """A residual branch that is scaled by a small number at the start."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b, self.head = (
            nn.Linear(n, m) for n, m in ((20, 32), (32, 64), (64, 32), (32, 4))
        )
        self.scale = nn.Parameter(torch.full((32,), scale))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head(x + self.scale * self.b(self.a(x).relu()))
        return out


class Listed(nn.Module):
    """Hidden layers that no module has registered."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(20, 32), nn.Linear(32, 32)]
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        out: Tensor = self.out(x)
        return out


class Positioned(nn.Module):
    """A parameter beside layers; `inner` for a path of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.position = nn.Parameter(torch.zeros(1, 32))
        self.inner.body, self.inner.head = nn.Sequential(nn.Linear(20, 32)), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = self.inner
        return inner.head((inner.body(x) + inner.position).relu())  # type: ignore[no-any-return]


def test_layers_outside_of_modules_that_an_optimizer_holds_are_trained() -> None:
    net = Listed()
    own = [p for layer in [*net.layers, net.out] for p in layer.parameters()]
    assert diagnosed(Task(net, optimizer=lambda _: torch.optim.Adam(own, 1e-3))) == []


def test_divergence_at_a_rate_is_an_explosion_once() -> None:
    def growing(net: nn.Module) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
        rising = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step + 1.0)
        return [optimizer], [{"scheduler": rising, "interval": "step"}]

    listener = Listener()
    torch.manual_seed(0)
    callbacks = [*default_callbacks(initialization_check=None), listener]
    fit(Task(optimizer=growing), batches(60), callbacks)
    kinds = [incident.kind for incident in listener.found]
    assert "divergence" in kinds
    assert kinds.count("exploding_gradient") == 1
    (incident,) = [i for i in listener.found if i.kind == "exploding_gradient"]
    assert incident.cause == "update_too_large"


@pytest.mark.parametrize("name", FAILING)
def test_failing_program_is_named_with_cause_and_layer(name: str) -> None:
    kind, cause, layer, make, data = FAILING[name]
    n = 12 if data is None else len(data)
    incident, *after = diagnosed(make(), n, data)
    assert {other.kind for other in after} <= {"nonfinite_gradient"}
    assert incident.kind == kind
    assert not cause or incident.cause == cause
    assert any(where.startswith(layer) for where in incident.where[:3])
    measured = incident.detail.partition(": ")[2]
    assert incident.detail.startswith("Since step ")
    assert measured.rstrip(".") in incident.describe()
    assert not incident.advice[1:].startswith(measured[1:20])
    assert incident.step < n
    assert "{code}" not in incident.advice


@pytest.mark.parametrize(
    ("mistake", "cause"), [("forgotten", "never_stepped"), ("cleared", "cleared_gradients")]
)
def test_optimizer_that_does_not_train_is_named(mistake: str, cause: str) -> None:
    (incident,) = diagnosed(Manual(mistake), 26)
    assert (incident.kind, incident.cause, incident.where) == ("weight_stagnation", cause, ("net.4", "net.6"))


def test_gradients_that_are_never_cleared_are_named() -> None:
    for module in (Manual("kept"), Keeping()):
        (incident,) = diagnosed(module)
        assert (incident.kind, incident.cause) == ("exploding_gradient", "gradients_not_cleared")
        assert incident.step <= 4
        assert "optimizer.zero_grad() before" in incident.advice


def test_a_backward_pass_may_return_no_gradient_for_a_weight() -> None:
    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor, keep: bool) -> Tensor:
            ctx.keep = keep
            return weight.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return (gradients[0] if ctx.keep else None), None

    class Dropping(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            layer: Any = self.net[4]
            weight = Dropped.apply(layer.weight, batch_idx % 3 > 0)
            hidden = functional.linear(self.net[:4](batch[0]), weight, layer.bias)
            return functional.cross_entropy(self.net[5:](hidden), batch[1])

    assert diagnosed(Dropping(), 30) == []


def test_gradients_that_accumulate_by_hand_are_not_named() -> None:
    class Accumulating(Manual):
        """The first optimizer steps every second batch, and gets what the loss of the other sends back."""

        def training_step(self, batch: Any, batch_idx: int) -> None:
            one, two = self.optimizers()  # type: ignore[attr-defined]
            two.zero_grad(set_to_none=False)
            self.manual_backward(functional.cross_entropy(self.net(batch[0]), batch[1]))
            two.step()
            if batch_idx % 2:
                one.step()
                one.zero_grad()

    assert diagnosed(Accumulating(), 30) == []


def test_weights_that_are_written_back_are_named() -> None:
    class Loading(Task):
        kept: Any = None

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.kept = self.kept or deepcopy(self.net.state_dict())
            self.net.load_state_dict(self.kept)

    class Averaging(Task):
        kept: Any = None

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.kept = self.kept or deepcopy(self.net.state_dict())
            for name, value in self.net.state_dict().items():
                self.kept[name].lerp_(value, 1e-3)
            self.net.load_state_dict(self.kept)

    for module in (Loading(), Averaging()):
        (incident,) = diagnosed(module, 30)
        assert (incident.kind, incident.cause) == ("weight_stagnation", "overwritten_weights")


def test_rate_that_falls_to_nothing_is_named() -> None:
    def falling(net: nn.Module) -> Any:
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.2), "interval": "step"}]

    (incident,) = diagnosed(Task(optimizer=falling), 40)
    assert (incident.kind, incident.cause) == ("weight_stagnation", "learning_rate_schedule")
    assert "a schedule has lowered the learning rate from 0.001 to" in incident.detail
    assert incident.advice.startswith("Give the schedule the length of the run")


@pytest.mark.parametrize(("decay", "is_named"), [(0.8, True), (0.97, False)])
def test_schedule_that_ends_where_half_of_the_loss_is_left_is_named(decay: float, is_named: bool) -> None:
    def make(net: nn.Module) -> Any:
        optimizer = torch.optim.Adam(net.parameters(), 0.03)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, decay), "interval": "step"}]

    found = diagnosed(Task(optimizer=make), 180, max_epochs=1)
    expected = [("weight_stagnation", "learning_rate_schedule")] if is_named else []
    assert [(incident.kind, incident.cause) for incident in found] == expected


def test_warm_up_that_begins_at_0_and_steps_once_an_epoch_is_told_to_step_once_a_batch() -> None:
    def warm_up(interval: str) -> Any:
        def make(net: nn.Module) -> Any:
            optimizer = torch.optim.Adam(net.parameters(), 1e-3)
            rising = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
            return [optimizer], [{"scheduler": rising, "interval": interval}]

        return make

    (incident,) = diagnosed(Task(optimizer=warm_up("epoch")), 40)
    assert (incident.kind, incident.cause) == ("weight_stagnation", "learning_rate_schedule")
    assert incident.detail.startswith(
        "Since step 0: the learning rate of every parameter group is 0, as the "
    )
    assert incident.detail.endswith("schedule of a learning rate of 0.001 begins at 0.")
    advice = "Let a warm-up over batches step once a batch, in configure_optimizers: return {'optimizer': "
    assert incident.advice.startswith(advice)
    assert "length of the run" not in incident.advice
    assert diagnosed(Task(optimizer=warm_up("step")), 40) == []


@pytest.mark.parametrize(
    ("length", "found"), [(1e7, [("weight_stagnation", "learning_rate_schedule", 25)]), (60, [])]
)
def test_warm_up_that_is_longer_than_the_run_is_named(
    length: float, found: list[tuple[str, str, int]]
) -> None:
    def warm_up(net: Any) -> Any:
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / length)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    incidents = diagnosed(Task(optimizer=warm_up), 60)
    assert [(i.kind, i.cause, i.step) for i in incidents] == found


def test_tiny_inputs_of_a_loss_that_does_not_fall_are_named_early() -> None:
    data = [(x / 3000, y) for x, y in batches(40)]
    (incident,) = diagnosed(Task(deep(nn.Tanh, 3), optimizer=_adam), data=data)
    assert (incident.kind, incident.cause, incident.step) == ("stuck_loss", "input_scale", 25)


@pytest.mark.parametrize(("last", "found"), [(0.01, ["same_answers"]), (0.2, [])])
def test_answers_that_become_one_are_named_early(last: float, found: list[str]) -> None:
    """As of views without negatives."""
    spreads = {0: 0.6, 10: 0.3, 20: last, 25: last}
    assert _found(Sample(s, -1.0, spread=spread) for s, spread in spreads.items()) == found


def test_small_outputs_are_no_dead_units_and_follow_from_the_initialization() -> None:
    listener = Listener()
    module = Task(deep(nn.GELU, 14, 0.02))
    fit(module, batches(12), [InitializationCheck(), TrainingDiagnosis(), listener])
    assert [i.kind for i in listener.found] == ["poor_initialization", "vanishing_gradient"]
    assert listener.found[1].detail.endswith(
        "It follows from the poor initialization that the check reports."
    )
    assert listener.found[1].advice == listener.found[0].advice
    (dead,) = diagnosed(Task(biased(deep(nn.GELU, 4), 2, -20.0)))
    assert dead.kind == "dead_units"
    assert "GELU" not in dead.advice
    assert "rate" not in dead.advice, "before the first update, it is not at fault"


@pytest.mark.parametrize(("ratio", "n_found"), [(21.5, 1), (1.3, 0)])
@pytest.mark.parametrize(("kind", "cause"), [("saturated_units", "large_logits"), ("stuck_loss", "unknown")])
def test_large_answers_at_the_start_explain_what_is_stuck(
    kind: Any, cause: Any, ratio: float, n_found: int
) -> None:
    check = InitializationCheck()
    check.findings = [Finding("loss_over_guessing", "head", ratio, "<= 1.2", "info", "code", is_tried=True)]
    trainer = pl.Trainer(callbacks=[check], logger=False, enable_checkpointing=False)
    symptom = Symptom(kind, cause, ("0",), 1.0, "", "stuck", since=100)
    assert len(findings_of_check(trainer, symptom)) == n_found
    assert findings_of_check(trainer, replace(symptom, cause="input_scale")) == []


class Averaging(nn.Module):
    """A layer of a graph in which each node is a neighbour of every other."""

    def __init__(self, n_inputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(n_inputs, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mean of the neighbours and the node itself."""
        y = self.lin(x)
        return torch.relu(0.3 * y + 0.7 * y.mean(0))


def test_residual_connections_are_advised_beside_the_cure_of_the_check() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(Averaging(20 if i == 0 else 32) for i in range(16)), nn.Linear(32, 4))
    listener = Listener()
    fit(Task(net), batches(12), [InitializationCheck(), TrainingDiagnosis(), listener])
    assert [(i.kind, i.cause) for i in listener.found[1:]] == [("vanishing_gradient", "depth")]
    assert listener.found[0].advice.startswith(CURE)
    assert listener.found[1].advice.startswith("Use residual connections")


def test_a_stuck_loss_has_what_the_check_has_found() -> None:
    """Gradients that vanish a little less than is named in training, and updates that are small for it."""
    listener = Listener()
    module = Task(deep(nn.Tanh, 10, 0.1), optimizer=lambda net: torch.optim.SGD(net.parameters(), 0.01))
    fit(module, batches(230), [InitializationCheck(), TrainingDiagnosis(), listener])
    assert [(i.kind, i.cause) for i in listener.found] == [("stuck_loss", "")]
    assert "The check of the initialization reports: gradient_gain of the network" in listener.found[0].detail
    assert listener.found[0].advice.startswith(f"{CURE}for i in range(")


def test_updates_that_are_lost_by_rounding_are_not_a_rate_that_is_too_low() -> None:
    module = Task(optimizer=rate(1e-4))
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(weight.sign())
    (incident,) = diagnosed(module, 12, precision="bf16-true")
    assert (incident.kind, incident.cause) == ("weight_stagnation", "rounded_updates")
    assert "bf16-mixed" in incident.advice


@pytest.mark.parametrize(
    ("factor", "make", "kind"),
    [
        (1e-12, rate(0.1), "weight_stagnation"),
        (1e-12, None, "weight_stagnation"),
        (1e-30, rate(0.1), "stuck_loss"),
        (1e-30, None, "stuck_loss"),
    ],
)
def test_a_gradient_that_a_factor_makes_tiny_is_no_rate_that_is_too_low(
    factor: float, make: Any, kind: str
) -> None:
    def loss(answer: Tensor, target: Tensor) -> Tensor:
        return factor * functional.cross_entropy(answer, target)

    (incident,) = diagnosed(Task(loss=loss, optimizer=make))
    assert (incident.kind, incident.cause) == (kind, "tiny_gradient")
    assert "multiply a tiny loss" in incident.advice
    assert "aise the learning rate" not in incident.advice


def test_loss_that_is_made_anew_does_not_depend_on_the_network() -> None:
    class Wrapped(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.tensor(super().training_step(batch, batch_idx).item(), requires_grad=True)

    (incident,) = diagnosed(Wrapped(), 26)
    assert (incident.kind, incident.cause) == ("weight_stagnation", "constant_loss")


@pytest.mark.parametrize(("size", "cause"), [(0.4, "small_weights"), (1.0, "depth")])
def test_small_weights_explain_a_gradient_that_vanishes_where_biases_keep_up_outputs(
    size: float, cause: str
) -> None:
    layers = [LayerSignal(f"net.{i}", False, 1.0, [10.0 ** (i - 4)], "relu") for i in range(5)]
    update = _update(names=["net.0.weight", "net.1.weight"], default_norms=[1.0 / size] * 2)
    assert _found(Sample(i, 1.0, layers, updates=[update]) for i in (1, 2)) == [cause]


def test_loss_that_falls_without_bound_is_named() -> None:
    def mean_likelihood(output: Tensor, target: Tensor) -> Tensor:
        spread = functional.softplus(output[:, 1]) + 1e-3
        likelihood: Tensor = torch.distributions.Normal(output[:, 0], spread).log_prob(target.float())
        return likelihood.mean()

    (incident,) = diagnosed(
        Task(loss=mean_likelihood, optimizer=lambda net: torch.optim.Adam(net.parameters(), 1e-2)), 60
    )
    assert (incident.kind, incident.cause) == ("exploding_gradient", "unbounded_loss")
    assert not diagnosed(Task(loss=lambda output, target: -mean_likelihood(output, target)), 60)


def test_loss_with_the_wrong_sign_is_named_long_before_it_is_far() -> None:
    def negated(output: Tensor, target: Tensor) -> Tensor:
        return -functional.cross_entropy(output, target)

    (incident,) = diagnosed(Task(loss=negated, optimizer=_adam_at(3e-2)), 60)
    assert (incident.kind, incident.cause) == ("exploding_gradient", "unbounded_loss")
    assert "the loss is minus cross_entropy, which rises" in incident.detail
    assert incident.step <= 25


class Block(nn.Module):
    """A block that loses most of the gradient, with its input added or not."""

    def __init__(self, is_residual: bool) -> None:
        super().__init__()
        self.inner, self.is_residual = nn.Linear(32, 32), is_residual

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x).relu()
        return (x + out if self.is_residual else out) * 0.05


@pytest.mark.parametrize("is_residual", [False, True])
def test_residual_connections_are_not_advised_where_blocks_have_them(is_residual: bool) -> None:
    torch.manual_seed(0)
    blocks = [Block(is_residual) for _ in range(5)]
    net = nn.Sequential(nn.Linear(20, 32), *blocks, nn.LayerNorm(32), nn.Linear(32, 4))
    listener = Listener()
    fit(Task(net, optimizer=rate(1e-3)), batches(30), [TrainingDiagnosis(), listener])
    found = next(incident for incident in listener.found if incident.kind == "vanishing_gradient")
    assert ("residual connections" in found.advice) is not is_residual, found


class _Cut(nn.Module):
    """A cell in a loop, whose state is detached after each step or not; the class is in the first symbol."""

    def __init__(self, is_cut: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head, self.is_cut = nn.GRUCell(2, 16), nn.Linear(16, 4), is_cut

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.new_zeros(len(inputs), 16)
        for part in inputs.chunk(10, 1):
            hidden = self.cell(part, hidden.detach() if self.is_cut else hidden)
        output: Tensor = self.head(hidden)
        return output


@pytest.mark.parametrize(("is_cut", "found"), [(True, [("vanishing_gradient", "detached")]), (False, [])])
def test_state_that_is_detached_after_each_step_is_named(is_cut: bool, found: list[tuple[str, str]]) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(32, 20), torch.randint(4, (32,))) for _ in range(80)]  # nothing to be learned
    incidents = [i for i in diagnosed(Task(_Cut(is_cut)), data=data) if i.kind != "stuck_loss"]
    assert [(i.kind, i.cause) for i in incidents] == found
    if found:
        assert incidents[0].where[0] == "net.cell"
        assert "of 10 calls of net.cell in one pass, 1 get a gradient" in incidents[0].detail


def test_a_call_whose_result_has_no_use_is_no_gradient_that_vanishes_through_time() -> None:
    class Extra(_Cut):
        def forward(self, inputs: Tensor) -> Tensor:
            output, unused = super().forward(inputs), self.cell(inputs[:, :2])
            result: Tensor = output + 0 * unused.sum()
            return result

    class First(_Cut):
        def forward(self, inputs: Tensor) -> Tensor:
            unused, output = self.cell(inputs[:, :2]), super().forward(inputs)
            result: Tensor = output + 0 * unused.sum()
            return result

    torch.manual_seed(0)
    data = [(torch.randn(32, 20), torch.randint(4, (32,))) for _ in range(80)]  # nothing to be learned
    for net in (Extra(False), First(False)):
        found = diagnosed(Task(net), data=data)
        assert [i.kind for i in found if i.kind != "stuck_loss"] == [], found


@pytest.mark.parametrize(("has_negatives", "found"), [(False, ["same_answers"]), (True, [])])
def test_distances_that_labels_select_let_all_answers_become_one(has_negatives: bool, found: Any) -> None:
    class Metric(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            embedded, same = self.net(batch[0]), (batch[1][:, None] == batch[1]).float()
            distances = (embedded[:, None] - embedded).square().mean(2)
            loss: Tensor = (same * distances).sum() / same.sum()
            if has_negatives:
                loss = loss + ((1 - same) * functional.relu(1 - distances)).mean()
            return loss

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16))
    module = Metric(net, optimizer=lambda m: torch.optim.Adam(m.parameters(), 1e-2))
    assert [incident.cause for incident in diagnosed(module, 80)] == found


def test_a_state_of_zeros_is_not_taken_for_inputs_of_as_many_numbers() -> None:
    class Recurrence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.enter, self.head = nn.Linear(20, 20), nn.Linear(4, 20), nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(len(x), 20)
            for now in x.view(len(x), 5, 4).unbind(1):
                state = torch.tanh(self.again(state) + self.enter(now))
            out: Tensor = self.head(state)
            return out

    torch.manual_seed(0)
    data = [(torch.randn(32, 20), torch.randint(4, (32,))) for _ in range(30)]
    assert diagnosed(Task(Recurrence()), data=data) == []


def test_flat_loss_without_a_target_is_stuck() -> None:
    def views(net: Any, batch: Any) -> Tensor:
        a, b = (functional.normalize(net(batch[0] + 0.1 * torch.randn_like(batch[0]))) for _ in range(2))
        return functional.cross_entropy(a @ b.T / 1e3, torch.arange(len(a)))

    class Contrastive(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return views(self.net, batch)

    (incident,) = diagnosed(Contrastive(optimizer=_adam), 60)
    assert (incident.kind, incident.step) == ("stuck_loss", 50)


def linear_values(n: int = 12) -> Any:
    return values(n, 0.5)


class Penalized(nn.Module):
    """A penalty x' A x of one number for the batch is computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.metric = deep(nn.ReLU, 2), nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out + 1e-3 * torch.einsum("bi,ij,bj->", out, self.metric, out)


def one_hot() -> list[tuple[Tensor, Tensor]]:
    """256 positions of 16 letters, of which the first is a padding that never occurs."""
    torch.manual_seed(0)
    letters = [torch.randint(1, 16, (32, 256)) for _ in range(12)]
    return [(functional.one_hot(x, 16).float().flatten(1), x[:, 0] % 4) for x in letters]


HEALTHY: dict[str, tuple[Callable[[], Any], Any]] = {
    "classifier": (Classifier, None),
    "batch normalization and dropout": (lambda: Classifier("adam", norm=True, dropout=0.2), None),
    "regression": (lambda: Task(one_unit(), functional.mse_loss), linear_values()),
    "bounded regression": (lambda: Task(one_unit(nn.Sigmoid()), functional.mse_loss),
                           [(x, y.sigmoid()) for x, y in values()]),
    "branch scaled by 1e-6": (lambda: Task(Scaled(1e-6)), None),
    "branch of zeros": (lambda: Task(Scaled(0.0)), None),
    "experts": (lambda: Task(Experts(1.0)), None),
    "log-softmax": (lambda: Task(loss=lambda z, y: functional.nll_loss(z.log_softmax(1), y)), None),
    "frozen body": (lambda: Task(_frozen(deep(nn.ReLU, 3))), None),
    "adversary that wins": (lambda: Task(loss=_and_against_an_adversary), batches(30)),
    "a number after the last layer": (lambda: Task(Penalized()), None),
    "one-hot columns": (lambda: Task(nn.Sequential(nn.Linear(4096, 32), nn.ReLU(), nn.Linear(32, 4))),
                        one_hot()),
}  # fmt: skip


def _and_against_an_adversary(output: Tensor, target: Tensor) -> Tensor:
    labels = torch.ones_like(target, dtype=torch.float)
    fooled = functional.binary_cross_entropy_with_logits(output[:, 0] - 8, labels)
    return functional.cross_entropy(output, target) + 1e-3 * fooled


def _frozen(net: nn.Sequential) -> nn.Sequential:
    net[:-1].requires_grad_(False)
    return net


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_program_has_no_incident(name: str) -> None:
    make, data = HEALTHY[name]
    assert diagnosed(make(), 60, data and data * 5) == []


class Autoencoder(Task):
    """A variational one."""

    def __init__(self, weight: float) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 20)), optimizer=_adam_at(3e-3)
        )
        self.encode, self.weight = nn.Linear(20, 16), weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0][:, :2].repeat(1, 10) + 1
        mean, log_variance = self.encode(x).chunk(2, 1)
        out = self.net(mean + torch.randn_like(mean) * (log_variance / 2).exp())
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean() / 2
        loss: Tensor = functional.mse_loss(out, x) + self.weight * divergence
        return loss

    def configure_optimizers(self) -> Any:
        return self.make(self)


@pytest.mark.parametrize(("weight", "found"), [(10.0, [("second_term", 50)]), (1e-3, [])])
def test_answers_of_an_autoencoder_that_are_all_the_mean_are_named(
    weight: float, found: list[tuple[str, int]]
) -> None:
    incidents = diagnosed(Autoencoder(weight), 226)
    assert [(i.cause, i.step) for i in incidents] == found
    for incident in incidents:
        assert re.search(r"the divergence at \S+\.py:\d+ in training_step weighs 200 times", incident.detail)
        assert "the divergence of a VAE is" in incident.advice


class Decayed(Task):
    """A classifier with a penalty on its weights within the loss."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        loss += self.weight * sum(p.square().sum() for p in self.parameters())
        return loss


@pytest.mark.parametrize(("weight", "found"), [(1.0, ["second_term"]), (1e-3, [])])
def test_a_penalty_that_outweighs_the_loss_is_named_and_no_autoencoder(
    weight: float, found: list[str]
) -> None:
    incidents = diagnosed(Decayed(weight), 126)
    assert [i.cause for i in incidents] == found
    assert "VAE" not in "".join(i.advice for i in incidents)


@pytest.mark.parametrize(
    ("reduction", "weight", "divergence"), [("mean", 3.0, 1.0), ("sum", 64 * 20 / 64 * 3.0, 20 * 3.0)]
)
def test_a_term_has_the_weight_that_it_has_in_the_loss(
    reduction: str, weight: float, divergence: float
) -> None:
    """Also where the loss is scaled, as for half precision, or added to in place."""
    x, encode = torch.randn(64, 20), nn.Linear(20, 40)
    trace = StepTrace(encode, (x,), LossBaselines())
    with trace:
        mean, log_variance = encode(x).chunk(2, 1)
        out = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        loss = 3 * functional.mse_loss(out, x, reduction=reduction) / (64 if reduction == "sum" else 1)
        of_rows = (mean.square() + log_variance.exp() - log_variance - 1).sum(1) / 2
        loss += divergence * of_rows.mean()
    trace.losses.add_total(loss)
    (1024 * loss).backward()
    sample = trace.sample(0, trace.close(torch.device("cpu")).tolist())
    assert sample.calls[0].weight == pytest.approx(weight)
    assert sample.divergence[0] == pytest.approx(divergence)


@pytest.mark.parametrize(
    ("first", "ratio", "found"), [(18, 1.0, ["second_term"]), (3, 1.0, []), (18, 0.8, [])]
)
def test_a_term_that_outweighs_the_reconstruction_is_named(
    first: float, ratio: float, found: list[str]
) -> None:
    """As the divergence of a VAE, which is summed over the batch; the mean of the data may be 0."""
    calls = [LossSignal("mse_loss", value=ratio, constant=1.0, constant_here=1.0, weight=1.0)]
    steps = {0: first, 250: 1.4, 300: 1.3, 400: 1.2}
    assert _found(Sample(s, loss, calls=calls, spread=0.9) for s, loss in steps.items()) == found


@pytest.mark.parametrize(
    ("over_constant", "permuted", "spread", "found"),
    [(1.0, nan, 0.02, 1), (2.6, nan, 0.02, 0), (1.0, 0.1, 0.02, 0), (1.0, nan, 0.3, 0)],
)
def test_answers_on_the_way_to_a_far_mean_or_that_differ_are_not_stuck(
    over_constant: float, permuted: float, spread: float, found: int
) -> None:
    calls = [LossSignal("mse_loss", value=over_constant, constant=1.0, constant_here=1.0)]
    samples = [
        Sample(step, over_constant + 1, calls=calls, spread=spread, permuted=permuted)
        for step in range(150, 154)
    ]
    diagnosis = Diagnosis()
    assert sum(len(diagnosis.update(sample)) for sample in samples) == found


@pytest.mark.parametrize("constant", [1.2, 0.01])
@pytest.mark.parametrize(("losses", "found"), [((25, 20, 18, 16), 0), ((18, 18, 18, 18), 1), ((45,) * 4, 1)])
def test_a_loss_on_its_way_down_to_a_constant_is_not_stuck(
    losses: tuple[float, ...], found: int, constant: float
) -> None:
    """As of embeddings whose products are far above the targets at first, and of tiny targets."""
    diagnosis = Diagnosis()
    for step, loss in zip((0, 125, 150, 175, 200), (49, *losses), strict=True):
        calls = [LossSignal("mse_loss", value=loss, constant=constant, constant_here=constant)]
        found -= len(diagnosis.update(Sample(step, loss, calls=calls, permuted=0.0)))
    assert not found


@pytest.mark.parametrize(
    ("first", "growth", "meets_data", "found"),
    [(150, 0.0, False, 1), (150, 0.002, False, 0), (20, 0.0, False, 0), (150, 0.0, True, 0)],
)
def test_answers_that_spread_out_or_meet_data_are_not_the_same(
    first: int, growth: float, meets_data: bool, found: int
) -> None:
    diagnosis = Diagnosis()
    spreads = [0.01 + growth * i for i in range(4)]
    samples = [
        Sample(first + i, 1 / (i + 1), spread=spread, meets_data=meets_data)
        for i, spread in enumerate(spreads)
    ]
    assert sum(len(diagnosis.update(sample)) for sample in samples) == found


@pytest.mark.parametrize(("first", "found"), [(10, 0), (50, 1)])
def test_first_labels_may_be_of_one_class(first: int, found: int) -> None:
    diagnosis, calls = Diagnosis(), [LossSignal("cross_entropy", value=1.0, constant=0.0)]
    samples = [Sample(first + i, 1.0 / (i + 1), calls=calls) for i in range(4)]
    assert sum(len(diagnosis.update(sample)) for sample in samples) == found


@pytest.mark.parametrize(("n", "found"), [(1, ["detached"]), (8, [])])
def test_a_state_may_be_detached_a_few_times_in_a_sequence(n: int, found: list[str]) -> None:
    layers = [LayerSignal("net.cell", False, 1.0, [1.0] * n, n_attached=16)]
    calls = [LossSignal("cross_entropy", value=1.0, constant=1.0, constant_here=1.0)]
    diagnosis = Diagnosis()
    samples = [Sample(step, 1.0, layers, calls=calls) for step in (20, 25)]
    assert [root.cause for sample in samples for root in diagnosis.update(sample)] == found


@pytest.mark.parametrize(("first", "found"), [(200, ["learning_rate_schedule"]), (300, [])])
def test_a_schedule_may_end_late_in_the_run(first: int, found: list[str]) -> None:
    calls = [LossSignal("cross_entropy", value=0.7, constant=1.0, constant_here=1.0)]
    numbers: Any = {"ratios": [1e-6, 1e-6], "rates": [1e-6], "initial_rates": [1e-2]}
    updates = [_update(**numbers, total_norm=1.0 + i / 7) for i in range(4)]
    samples = [Sample(first + i, 0.7, calls=calls, updates=[one]) for i, one in enumerate(updates)]
    diagnosis = Diagnosis()
    diagnosis.plan(400)
    assert [root.cause for sample in samples for root in diagnosis.update(sample)] == found


def test_number_of_rare_positives_tells_no_constant() -> None:
    baselines, answers, labels = LossBaselines(), torch.zeros(512, 1), torch.zeros(512, 1)
    labels[0] = 1.0
    found = [baselines.constant("0", "binary_cross_entropy", answers, labels, {}) for _ in range(10)]
    assert [constants is not None and constants[0].isnan().item() for constants in found] == [True] * 9 + [
        False
    ]


@pytest.mark.parametrize(("n_images", "is_constant"), [(36, False), (256, True)])
def test_labels_of_one_class_are_counted_by_images(n_images: int, is_constant: bool) -> None:
    baselines, labels = LossBaselines(), torch.zeros(4, 8, 8, dtype=torch.long)
    for _ in range(n_images // 4):
        found = baselines.constant("0", "cross_entropy", torch.zeros(4, 2, 8, 8), labels, {})
    assert found is not None
    assert (found[0].item() == 0) is is_constant


def test_labels_that_say_nothing_are_a_stuck_loss() -> None:
    data = [(x, y.roll(1)) for x, y in batches(180, size=64)]
    (incident,) = diagnosed(Task(loss=_nll_by_hand), data=data)
    assert (incident.kind, incident.cause, incident.step) == ("stuck_loss", "", 150)
    assert "permuted" in incident.detail


def test_a_loss_that_ends_near_that_of_a_constant_is_told_at_the_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    weak = [(x, 0.15 * x[:, :1] + torch.randn(64, 1, generator=generator)) for x, _ in batches(160, 64)]
    for data, is_told in ((weak, True), ([(x, x[:, :1]) for x, _ in weak], False)):
        task = Task(
            nn.Linear(20, 1), functional.mse_loss, lambda net: torch.optim.SGD(net.parameters(), 0.02)
        )
        logger = TensorBoardLogger(tmp_path, name="", version=str(is_told))
        fit(task, data, [TrainingDiagnosis()], logger=logger, log_every_n_steps=10)
        printed = capsys.readouterr().err
        assert ("the loss, as last sampled, is 0.9" in printed) == is_told
        assert ("No incident" in printed) != is_told
        main(["report", logger.log_dir])
        assert ("little or nothing learned" in capsys.readouterr().out.splitlines()[0]) == is_told


class Adapted(nn.Module):
    """Two frozen layers, each with a low-rank adapter."""

    def __init__(self, first: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.ModuleList([nn.Linear(20, 32), nn.Linear(32, 4)]).requires_grad_(False)
        sizes = ((20, 32), (32, 4))
        self.down = nn.ParameterList(nn.Parameter(first * torch.randn(n, 4)) for n, _ in sizes)
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(4, n)) for _, n in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for base, down, up in zip(self.base, self.down, self.up, strict=True):
            x = (base(x) + x @ down @ up).tanh()
        return 4 * x


@pytest.mark.parametrize("first", [0.0, 0.3])
def test_adapters_whose_factors_are_both_zero_are_named(first: float) -> None:
    found = [
        (one.kind, one.cause, one.where[0]) for one in diagnosed(Task(Adapted(first), optimizer=_adam), 25)
    ]
    assert found == [("weight_stagnation", "zero_gradient", "net.down")] * (first == 0)


def test_random_layers_that_are_frozen_are_named_where_nothing_is_learned() -> None:
    net = deep(nn.ReLU, 8)  # by which hardly anything is left of what differs between the samples
    net[:16].requires_grad_(False)
    (incident,) = diagnosed(Task(net), 160)
    assert (incident.kind, incident.cause) == ("weight_stagnation", "frozen_weights")
    assert incident.where[0] == "net.0"
    assert "requires_grad_(True)" in incident.advice


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_random_recurrence_that_is_frozen_is_named(kind: Any) -> None:
    rnn = kind(8, 8).requires_grad_(False)
    assert frozen_layers(nn.Sequential(rnn)) == ["0"]
    nn.init.orthogonal_(rnn.weight_hh_l0)
    assert frozen_layers(nn.Sequential(rnn)) == []


@pytest.mark.parametrize(("cause", "names_both"), [("second_term", False), ("unknown", True)])
def test_flat_recurrence_follows_from_a_known_cause_of_a_stuck_loss(cause: Any, names_both: bool) -> None:
    stuck = Symptom("stuck_loss", cause, ("net.head",), 1.0, "", "stuck")
    flat = Symptom("vanishing_gradient", "through_time", ("net.rnn",), 4.0, "", "depth")
    assert stuck.explains(flat) is not names_both


@pytest.mark.parametrize(("over_constant", "found"), [(1.0, ["large_logits"]), (0.93, [])])
def test_half_of_attention_is_saturated_in_a_network_that_is_stuck(
    over_constant: float, found: list[str]
) -> None:
    rows = [UnitSignal("net.q", "", "attention", nan, 0.6, is_head=False)]
    calls = [LossSignal("cross_entropy", value=over_constant, constant=1.0, constant_here=1.0)]
    diagnosis = Diagnosis()
    samples = [Sample(step, over_constant, units=rows, calls=calls) for step in (20, 25)]
    assert [root.cause for sample in samples for root in diagnosis.update(sample)] == found


def test_random_layers_that_pass_a_little_are_named_where_next_to_nothing_is_learned() -> None:
    calls = [LossSignal("cross_entropy", value=0.99, constant=1.0, constant_here=1.0)]
    layers = [LayerSignal("net.0", False, 1.0, [1.0]), LayerSignal("net.2", True, 1.0, [1.0])]
    for frozen, found in (("net.0", ["frozen_weights"]), ("net.2", [])):
        diagnosis = Diagnosis()
        diagnosis.plan(400, [frozen])
        samples = [Sample(s, 0.99, layers, calls=calls, permuted=0.03) for s in (225, 240, 250, 300)]
        assert [root.cause for sample in samples for root in diagnosis.update(sample)] == found


@pytest.mark.parametrize(("permuted", "found"), [(-0.2, ["stuck_loss"]), (0.2, []), (nan, [])])
def test_a_loss_that_has_become_worse_than_a_constant_is_no_slow_start(
    permuted: float, found: list[str]
) -> None:
    losses = {0: 1.0, 10: 1.1, 20: 1.3, 25: 1.6, 35: 2.0, 50: 2.0}
    wanted = {step: permuted if step >= 35 else nan for step in losses}
    samples = [Sample(i, loss, calls=_whole_loss(loss), permuted=wanted[i]) for i, loss in losses.items()]
    assert _found(samples) == found


@pytest.mark.parametrize(
    ("loss", "growth", "found"), [(1.0, 1.0, ["stuck_loss"]), (0.98, 1.0, []), (1.0, 1.5, [])]
)
def test_a_loss_that_begins_to_depend_on_its_targets_is_not_stuck(
    loss: float, growth: float, found: list[str]
) -> None:
    known: dict[str, Any] = {"calls": _whole_loss(loss), "permuted": 0.012}
    steps = enumerate((0, 100, 150, 175, 200))
    assert _found(Sample(i, loss, spread=0.04 * growth**n, **known) for n, i in steps) == found


def test_rare_positives_that_are_learned_slowly_are_no_stuck_loss() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1))
    data = []
    for _ in range(240):
        x = torch.randn(64, 20)
        data.append((x, (x[:, :1] + x[:, 1:2] / 2 + 0.7 * torch.randn(64, 1) > 2.2).float()))
    callback = TrainingDiagnosis()
    fit(Task(net, functional.binary_cross_entropy_with_logits, _adam), data, [callback])
    assert callback.diagnosis.roots == []


@pytest.mark.parametrize(("loss", "found"), [(0.001, []), (0.5, ["saturated_units"])])
def test_units_may_saturate_in_a_network_that_has_learned_all(loss: float, found: list[str]) -> None:
    units = [UnitSignal("net.0", "net.1", "tanh", float("nan"), 0.95, is_head=False, outputs=0.95)]
    calls = [LossSignal("cross_entropy", value=loss, constant=1.0, constant_here=1.0)]
    diagnosis = Diagnosis()
    samples = [Sample(step, loss, units=units, calls=calls) for step in range(20, 24)]
    assert [root.kind for sample in samples for root in diagnosis.update(sample)] == found


@pytest.mark.parametrize(("loss", "step", "found"), [(3.0, 25, 0), (4.5, 25, 1), (3.0, 125, 1)])
def test_gates_may_be_saturated_early_while_the_loss_falls(loss: float, step: int, found: int) -> None:
    gates = UnitSignal("net.lstm", "net.lstm", "candidates", float("nan"), 0.7, is_head=False)
    calls = [LossSignal("cross_entropy", value=loss, constant_here=3.0)]
    samples = [Sample(0, loss=4.6), *(Sample(step + i, loss, units=[gates], calls=calls) for i in range(4))]
    diagnosis = Diagnosis()
    assert sum(len(diagnosis.update(sample)) for sample in samples) == found


@pytest.mark.parametrize(("n", "loss", "found"), [(16, 3.0, 1), (16, 2.0, 0), (4, 3.0, 0)])
def test_gates_by_hand_may_be_other_ones_at_each_time(n: int, loss: float, found: int) -> None:
    shares = [(0.0, 0.84), (0.9, 0.9)] * (n // 2)
    gates = [UnitSignal("net.gates", "", "sigmoid", float("nan"), s, False, of_all) for s, of_all in shares]
    calls = [LossSignal("mse_loss", value=loss, constant_here=3.0)]
    diagnosis = Diagnosis()
    samples = [Sample(step, loss, units=gates, calls=calls) for step in range(100, 104)]
    assert sum(len(diagnosis.update(sample)) for sample in samples) == found


def _update(**numbers: Any) -> Update:
    plain = {
        "names": ["net.0.weight", "net.2.weight"],
        "is_matrix": [True, True],
        "gradients": [1.0, 1.0],
        "weights": [1.0, 1.0],
        "default_norms": [0.5**0.5] * 2,
        "ratios": [1e-3, 1e-3],
        "unclipped": 1.0,
        "rates": [0.1],
        "total_norm": 1.0,
    }
    return Update(**{**plain, **numbers})


@pytest.mark.parametrize(("first", "found"), [(1.0, []), (1e-5, ["weight_stagnation"])])
def test_weights_may_stand_still_once_no_loss_is_left(first: float, found: list[str]) -> None:
    ratios = [1e-9, 1e-3]
    updates = [_update(ratios=ratios, weights=[1.0, 2.0 + i], total_norm=1.0 + i / 7) for i in range(8)]
    samples = [Sample(0, first), *(Sample(50 + i, 1e-5, updates=[one]) for i, one in enumerate(updates))]
    diagnosis = Diagnosis()
    assert [root.kind for sample in samples for root in diagnosis.update(sample)] == found


def _found(samples: Any) -> list[str]:
    """Returns the causes, or else the kinds, of what samples show."""
    diagnosis = Diagnosis()
    roots = [root for sample in samples for root in diagnosis.update(sample)]
    return [root.kind if root.cause == "unknown" else root.cause for root in roots]


def _whole_loss(value: float) -> list[LossSignal]:
    return [LossSignal("cross_entropy", value=value, constant=1.0, constant_here=1.0)]


@pytest.mark.parametrize(
    ("numbers", "loss", "found"),
    [
        ({"names": ["net.0.weight", "net.2.weight"], "ratios": [1e-9, 1e-3]}, 0.5, ["learning_rate_too_low"]),
        ({"names": ["rnn.weight_ih", "rnn.weight_hh"], "ratios": [1e-9, 1e-3]}, 0.5, []),
        ({"ratios": [9e-6, 9e-6], "unclipped": 2.0}, 1.0, ["learning_rate_too_low"]),
        ({"ratios": [9e-6, 9e-6], "unclipped": 20.0}, 1.0, ["clip_value_too_small"]),
    ],
    ids=["a layer", "a part of a layer", "clipped a little", "clipped far"],
)
def test_weights_that_stand_still_have_a_cause(numbers: Any, loss: float, found: list[str]) -> None:
    updates = [_update(**numbers, total_norm=1.0 + i / 7) for i in range(6)]
    calls = _whole_loss(loss)
    assert _found(Sample(40 + i, loss, calls=calls, updates=[u]) for i, u in enumerate(updates)) == found


@pytest.mark.parametrize(
    ("loss", "planned", "size", "found"),
    [
        (1.0, 200, 1.0, ["learning_rate_too_low"]),
        (0.98, 200, 1.0, []),
        (1.0, 800, 1.0, []),
        (1.0, 200, 1e3, []),  # of raw inputs, these are the cause
        (1.0, 50, 1.0, []),
        (1.0, 0, 1.0, []),
    ],
    ids=["flat", "falls", "long", "raw", "short", "unknown"],
)
def test_weights_that_hardly_move_in_the_whole_run_stand_still(
    loss: float, planned: int, size: float, found: list[str]
) -> None:
    diagnosis = Diagnosis()
    diagnosis.plan(planned)
    samples = [
        Sample(step, loss if step else 1.0, updates=[one], input_rms=size)
        for step in (0, 10, 20, 25)
        for one in [_update(ratios=[2e-5] * 2, total_norm=1 + step / 7)]
    ]
    assert [root.cause for sample in samples for root in diagnosis.update(sample)] == found


@pytest.mark.parametrize(("answer", "found"), [(1.0, ["target_scale"]), (40.0, [])])
def test_targets_that_growing_answers_do_not_come_near_are_named_early(
    answer: float, found: list[str]
) -> None:
    calls = [LossSignal("mse_loss", target=1e5, answer=answer)]
    assert _found(Sample(step, 1e10, calls=calls) for step in (0, 10, 20, 25)) == found


@pytest.mark.parametrize(("step", "found"), [(25, []), (150, ["dead_units"])])
def test_a_layer_that_is_dead_late_needs_one_sample(step: int, found: list[str]) -> None:
    unit = UnitSignal("net.0", "net.1", "relu", 1.0, float("nan"), is_head=False)
    assert _found([Sample(step, 2.0, units=[unit])]) == found


@pytest.mark.parametrize(("ratio", "found"), [(5e-4, []), (5e-5, ["scaled_gradients_clipped"])])
def test_scaled_gradients_may_be_clipped_where_a_network_learns(ratio: float, found: list[str]) -> None:
    update = _update(ratios=[ratio, ratio], loss_scale=1024.0, total_norm=0.5 / 1024)
    assert _found(Sample(10 + i, 0.5, calls=_whole_loss(0.5), updates=[update]) for i in range(5)) == found


@pytest.mark.parametrize(("gradient", "found"), [(1e-6, ["weight_decay"]), (1e-3, ["vanishing_weights"])])
def test_weights_shrink_by_a_decay_that_is_larger_than_gradients(gradient: float, found: list[str]) -> None:
    updates = [
        _update(weights=[w, w], gradients=[gradient] * 2, decay=0.1, rates=[1e-3], total_norm=1.0 + w)
        for w in (1.0, 1.1e-4, 1.05e-4, 1e-4)
    ]
    calls = _whole_loss(1.0)
    assert _found(Sample(90 + i, 1.0, calls=calls, updates=[u]) for i, u in enumerate(updates)) == found


@pytest.mark.parametrize(
    ("decay", "loss", "found"),
    [
        (3.0, 1.0, ["weight_decay"]),
        (0.01, 1.0, []),
        (3.0, 0.5, []),
        (60.0, 0.5, ["weight_decay"]),
        (60.0, 0.1, []),
    ],
)
def test_weights_that_decay_are_named_long_before_they_are_gone_if_nothing_is_learned(
    decay: float, loss: float, found: list[str]
) -> None:
    """Adam shrinks them by its rate in each step, however large the decay is."""
    updates = [
        _update(weights=[w, w], gradients=[0.05] * 2, decay=decay, rates=[1e-3], total_norm=1.0 + w)
        for w in (1.0, 0.79, 0.7, 0.6)
    ]
    steps = zip((0, 20, 25, 35), updates, strict=True)
    assert _found(Sample(i, loss, calls=_whole_loss(loss), updates=[u]) for i, u in steps) == found


@pytest.mark.parametrize(("one_signed", "found"), [(True, ["unreachable_targets"]), (False, [])])
def test_a_difference_to_far_targets_is_wrong_where_all_answers_are_on_one_side(
    one_signed: bool, found: list[str]
) -> None:
    calls = [LossSignal("difference", flags={"unreachable_targets": 0.8})]
    assert _found(Sample(i, 1 / (i + 1), calls=calls, one_signed=one_signed) for i in range(3)) == found


@pytest.mark.parametrize(
    ("steps", "decades", "loss", "found"),
    [
        ((1, 2, 5), 8.0, 1.0, []),
        ((20, 25, 35), 8.0, 1.0, []),  # what is asked for may be in the last steps
        ((35, 50), 8.0, 1.0, ["through_time"]),
        ((35, 50), 8.0, 0.97, []),
        ((75, 100), 8.0, 0.97, ["through_time"]),
        ((100, 125), 4.5, 1.0, []),
        ((150, 175), 3.6, 1.0, ["through_time"]),
    ],
)
def test_gradients_may_vanish_through_time_in_the_first_steps(
    steps: Any, decades: float, loss: float, found: list[str]
) -> None:
    times = [TimeSignal("rnn", 0.1 / 10**decades, 1e-1, 1e-1, 20)]
    assert _found(Sample(step, loss, times=times, calls=_whole_loss(loss)) for step in steps) == found


def test_updates_that_are_too_large_need_not_be_so_in_samples_on_end() -> None:
    ratios = (2.0, 0.01, 2.0)
    samples = [Sample(i, 2.0, updates=[_update(ratios=[r, r])]) for i, r in enumerate(ratios)]
    assert _found(samples) == ["update_too_large"]


@pytest.mark.parametrize(("last", "found"), [(-1e3, []), (-1e5, ["unbounded_loss"])])
def test_a_loss_may_fall_far_below_0(last: float, found: list[str]) -> None:
    losses = (1.0, *(last / 3 ** (3 - i) for i in range(5)))
    assert _found(Sample(i, loss) for i, loss in enumerate(losses)) == found


@pytest.mark.parametrize(
    ("output", "n_optimizers", "found"), [(50.0, 1, ["unbounded_loss"]), (10.0, 1, []), (50.0, 2, [])]
)
def test_a_loss_that_falls_slowly_is_unbounded_where_answers_grow(
    output: float, n_optimizers: int, found: list[str]
) -> None:
    samples = []
    for i, loss in enumerate([1.0, -100.0, -120.0, -150.0, -200.0, -250.0]):
        layers = [LayerSignal("head", True, output if i else 1.0, [1.0])]
        samples.append(Sample(100 * i, loss, layers=layers, updates=[_update()] * n_optimizers))
    assert _found(samples) == found


@pytest.mark.parametrize(("size", "saturated"), [(3.0, 0.0), (6.0, 1.0)])
def test_units_without_a_gradient_are_saturated_by_inputs_far_out(size: float, saturated: float) -> None:
    found, gradients = extremes(torch.full((16, 2), size), 1), UnitGradients()
    assert found is not None
    gradients.add(torch.zeros(16, 2), 1, *found, 0)
    assert gradients.blocked_shares(torch.ones(1)).flatten().tolist() == [0.0, saturated]


@pytest.mark.parametrize(("bias", "share"), [(4.0, 0.0), (8.0, 1.0)])
def test_gates_are_saturated_close_to_1(bias: float, share: float) -> None:
    cell, x, state = nn.GRUCell(2, 4), torch.zeros(16, 2), torch.zeros(16, 4)
    nn.init.zeros_(cell.bias_hh)
    nn.init.constant_(cell.bias_ih[4:8], bias)
    assert dict(saturated_gates(cell, (x, state), cell(x, state)))["update gates"] == share


@pytest.mark.parametrize(("opened", "share"), [(8.0, 0.0), (0.0, 1.0)])
def test_input_gates_may_be_closed_where_forget_gates_are_open(opened: float, share: float) -> None:
    """The state then is a sum over many steps, as intended."""
    cell, x, state = nn.LSTMCell(2, 4), torch.zeros(16, 2), torch.zeros(16, 4)
    nn.init.zeros_(cell.bias_ih)
    nn.init.constant_(cell.bias_hh[:4], -8.0)
    nn.init.constant_(cell.bias_hh[4:8], opened)
    assert dict(saturated_gates(cell, (x, state), state))["input gates"] == share


@pytest.mark.parametrize(
    ("norm", "unclipped", "step", "found"),
    [(40.0, 15.0, 0, 1), (40.0, 2.0, 0, 0), (10.0, 15.0, 0, 0), (40.0, 15.0, 20, 0)],
)
def test_first_step_that_clipping_alone_keeps_from_overshooting(
    norm: float, unclipped: float, step: int, found: int
) -> None:
    update = _update(total_norm=norm, unclipped=unclipped, rates=[0.03], momentum=0.9)
    roots = Diagnosis().update(Sample(step, 5.0, updates=[update]))
    assert [(root.kind, root.cause) for root in roots] == [("exploding_gradient", "update_too_large")] * found
    roots = Diagnosis().update(Sample(step, 5.0, updates=[update], input_rms=137.0))
    assert [root.cause for root in roots] == ["input_scale"] * found, "raw pixels are the reason"


class Rollout(nn.Module):
    """A simulator that is called for each of 100 steps, `state + scale * f(state)`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.f = scale, nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 20))

    def forward(self, state: Tensor) -> Tensor:
        """Returns the states of all steps."""
        states = []
        for _ in range(100):
            state = state + self.scale * self.f(state)
            states.append(state)
        return torch.stack(states, 1)


@pytest.mark.parametrize(("scale", "found"), [(1.0, ["through_time"]), (0.01, [])])
def test_states_that_grow_in_a_loop_are_named_at_the_first_step(scale: float, found: list[str]) -> None:
    torch.manual_seed(0)
    module = Task(Rollout(scale), functional.mse_loss)
    targets = [(x, x[:, None].expand(-1, 100, -1)) for x, _ in batches(3)]
    incidents = diagnosed(module, data=targets)
    assert [incident.cause for incident in incidents] == found
    assert all(one.where == ("net.f.0", "net.f.2") and one.step == 0 for one in incidents)


def test_growth_through_time_explains_a_first_step_that_overshoots() -> None:
    update = _update(total_norm=40.0, unclipped=15.0, rates=[0.03], momentum=0.9)
    times, diagnosis = [TimeSignal("net.0", 1.0, 1e-4, 1.0, 60)], Diagnosis()
    samples = [Sample(step, 5.0, times=times, updates=[update]) for step in (0, 1)]
    assert [root.cause for one in samples for root in diagnosis.update(one)] == ["through_time"]


@pytest.mark.parametrize(
    ("mistakes", "found"), [([("dropout", "net.1", 1.0)], []), ([], ["update_too_large"])]
)
def test_gradients_that_dropout_enlarges_are_no_explosion(mistakes: Any, found: list[str]) -> None:
    update = _update(total_norm=40.0, unclipped=15.0, rates=[0.03], momentum=0.9, ratios=[2.0, 2.0])
    samples = [Sample(step, 5.0, mistakes=mistakes, updates=[update]) for step in (0, 1, 2)]
    assert _found(samples) == found


def test_divergence_without_a_known_origin_is_an_explosion_where_gradients_are_largest() -> None:
    diagnosis = Diagnosis()
    diagnosis.update(Sample(5, 2.0, updates=[_update(ratios=[0.1, 0.1])]))
    (root,) = diagnosis.add_divergence((), "training has diverged", 8)
    assert root.kind == "exploding_gradient"
    assert root.where


@pytest.mark.parametrize(("decay", "found"), [(1.0, "vanishing_weights"), (0.01, "exploding_gradient")])
def test_weights_that_decay_under_momentum_do_not_explode(decay: float, found: str) -> None:
    one = _update(ratios=[0.25, 0.25], rates=[0.05], momentum=0.9, decay=decay)
    diagnosis = Diagnosis()
    (root,) = (root for step in (5, 10) for root in diagnosis.update(Sample(step, 2.0, updates=[one])))
    assert root.kind == found


def test_loss_that_has_risen_by_a_larger_update_before_is_an_explosion() -> None:
    diagnosis = Diagnosis()
    samples = [
        Sample(step, loss, updates=[_update(ratios=[size, size])])
        for step, loss, size in ((0, 2.0, 0.9), (1, 1.9, 0.4), (2, 9.0, 0.29), (5, 4.0, 0.12))
    ]
    (root,) = (root for sample in samples for root in diagnosis.update(sample))
    assert (root.kind, root.since) == ("exploding_gradient", 2)


class Standardizing(nn.Module):
    """Standardizes its inputs, which are far from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns values for the standardized inputs."""
        values: Tensor = self.net((x - 5000) / 1000)
        return values


@pytest.mark.parametrize(
    ("module", "rms"), [(Standardizing(), 1.0), (nn.Sequential(nn.Linear(8, 1)), 5100.0)]
)
def test_inputs_are_measured_as_the_first_layer_gets_them(module: nn.Module, rms: float) -> None:
    batch = 1000 * torch.randn(64, 8) + 5000, torch.randn(64, 1)
    trace = StepTrace(module, batch, LossBaselines())
    with trace:
        loss = functional.mse_loss(module(batch[0]), batch[1])
    loss.backward()
    sample = trace.sample(0, trace.close(torch.device("cpu")).tolist())
    assert sample.input_rms == pytest.approx(rms, rel=0.1)
    assert sample.columns is not None
    assert sample.columns[0] == pytest.approx(rms, rel=0.3)


@pytest.mark.parametrize(("second", "found"), [(4321.0, []), (5000.0, ["input_scale"])])
def test_weights_far_from_their_values_move_far_while_the_loss_falls(second: float, found: list[str]) -> None:
    diagnosis = Diagnosis()
    samples = [
        Sample(step, loss, updates=[_update(ratios=[size, size])], input_rms=14.0)
        for step, loss, size in ((0, 4634.0, 0.83), (1, second, 0.36), (2, 3752.0, 0.21))
    ]
    assert [root.cause for sample in samples for root in diagnosis.update(sample)] == found


@pytest.mark.parametrize(("size", "cause"), [(5e-5, "learning_rate_too_low"), (1e-3, "unknown")])
def test_loss_is_stuck_by_a_rate_at_which_updates_are_small(size: float, cause: str) -> None:
    diagnosis = Diagnosis()
    one, calls = _update(ratios=[size, size]), [LossSignal("mse_loss", {}, 2.0, 2.0, 2.0)]
    samples = [Sample(step, 2.0, calls=calls, updates=[one], permuted=0.0) for step in (0, 150, 175)]
    (root,) = (root for sample in samples for root in diagnosis.update(sample))
    assert (root.kind, root.cause) == ("stuck_loss", cause)
    assert "it changes by 0.0% if the targets are permuted" in root.evidence


@pytest.mark.parametrize(("permuted", "found"), [(0.0, ["stuck_loss"]), (-0.13, [])])
def test_loss_that_falls_with_permuted_targets_depends_on_them(permuted: float, found: list[str]) -> None:
    """As of a Q-network, whose batches have the ends of episodes in the place of targets."""
    diagnosis = Diagnosis()
    samples = [Sample(step, 2.0, permuted=permuted) for step in (0, 150, 175)]
    assert [root.kind for sample in samples for root in diagnosis.update(sample)] == found


@pytest.mark.parametrize(("spread", "found"), [(0.9, []), (0.01, ["stuck_loss"])])
def test_a_loss_between_views_does_not_depend_on_labels(spread: float, found: list[str]) -> None:
    losses = ((0, 3.0), (150, 1.0), (175, 0.9))
    calls = [LossSignal("cross_entropy")]
    assert (
        _found(
            Sample(step, loss, calls=calls, permuted=0.0, spread=spread, meets_data=True)
            for step, loss in losses
        )
        == found
    )


def test_answers_that_become_one_while_the_loss_falls_to_nothing_are_named_before_units_die() -> None:
    dead = UnitSignal("net.0", "net.1", "relu", 1.0, float("nan"), is_head=False)
    first = [Sample(step, 0.01 if step else 1.0, spread=0.5) for step in (0, 10, 20, 25)]
    after = [Sample(step, 0.001, spread=0.1) for step in (35, 50)]
    last = Sample(75, 1e-4, spread=0.05, units=[dead])
    assert _found([*first, *after, last]) == ["same_answers"]


@pytest.mark.parametrize(("last", "found"), [(-5.0, ["update_too_large"]), (-90.0, [])])
def test_updates_of_a_loss_below_0_are_too_large_where_it_rises(last: float, found: list[str]) -> None:
    large = [_update(ratios=[0.15, 0.15])]
    losses = ((0, -50.0), (5, last), (10, last))
    assert _found(Sample(step, loss, updates=large) for step, loss in losses) == found


@pytest.mark.parametrize(("output", "found"), [(0.3, ["dead_units"]), (0.0, [])])
def test_units_behind_weights_of_zero_are_not_dead(output: float, found: list[str]) -> None:
    unit = UnitSignal("net.0", "net.1", "relu", 1.0, float("nan"), is_head=False)
    sample = Sample(0, 2.0, layers=[LayerSignal("net.0", False, output, [0.0])], units=[unit])
    diagnosis = Diagnosis()
    assert [root.kind for _ in range(2) for root in diagnosis.update(sample)] == found


def test_saturated_units_explain_a_first_step_that_overshoots() -> None:
    update = _update(total_norm=40.0, unclipped=15.0, rates=[0.03], momentum=0.9)
    rows = [UnitSignal("net.q", "", "attention", float("nan"), 1.0, is_head=False)]
    diagnosis = Diagnosis()
    samples = [Sample(step, 5.0, units=rows, updates=[update]) for step in range(3)]
    assert [root.kind for sample in samples for root in diagnosis.update(sample)] == ["saturated_units"]


def test_what_is_nonfinite_follows_from_answers_that_explode_and_not_the_reverse() -> None:
    calls = [LossSignal("mse_loss", target=2.0, answer=1e5)]
    for since, found in ((0, ["exploding_gradient"]), (2, [])):
        diagnosis = Diagnosis()
        samples = [Sample(step, 1e9, calls=calls) for step in range(since, since + 3)]
        diagnosis.update(samples[0])
        diagnosis.add_published("nonfinite_gradient", (), 1)
        assert [root.kind for sample in samples[1:] for root in diagnosis.update(sample)] == found


def test_loss_that_is_zero_from_the_start_is_constant() -> None:
    (incident,) = diagnosed(Task(loss=lambda z, y: (z - z.mean(1, keepdim=True) - z + z).sum() * 0), 12)
    assert (incident.kind, incident.cause) == ("stuck_loss", "constant_loss")
    assert "0 since the start" in incident.detail


def test_outputs_that_a_rectifier_has_cut_off_have_lost_their_gradient() -> None:
    rectified = lambda z, y: (functional.relu(z[:, 0] + 1.0) + 5.0).square().mean()  # noqa: E731
    module = Task(loss=rectified, optimizer=lambda net: torch.optim.SGD(net.parameters(), 1.0))
    (incident,) = (found for found in diagnosed(module, 40) if found.kind == "stuck_loss")
    assert (incident.cause, "a factor of 0" in incident.advice) == ("zero_gradient", True)


@pytest.mark.parametrize(("accumulated", "found"), [(1, 1), (4, 0)])
def test_first_updates_are_counted_where_a_module_accumulates_by_itself(accumulated: int, found: int) -> None:
    diagnosis, updates = Diagnosis(), [_update(ratios=[0.13, 0.13])]
    samples = [Sample(step, 2.0, updates=updates, n_updates=step // accumulated) for step in (0, 4, 8, 12)]
    roots = [root for sample in samples for root in diagnosis.update(sample)]
    assert [root.kind for root in roots] == ["exploding_gradient"] * found


@pytest.mark.parametrize(
    ("share", "since", "kind"),
    [(0.3, 5, "exploding_gradient"), (0.3, 1, "vanishing_gradient"), (0.01, 5, "vanishing_gradient")],
)
def test_gradient_that_vanishes_after_updates_that_were_too_large_follows_from_them(
    share: float, since: int, kind: str
) -> None:
    def layers(vanish: bool) -> list[LayerSignal]:
        gradients = [1e-9, 1e-6, 1e-3] if vanish else [1e-3] * 3
        return [LayerSignal(str(i), False, 1.0, [gradient]) for i, gradient in enumerate(gradients)]

    diagnosis = Diagnosis()
    samples = [
        Sample(step, 2.0, layers=layers(step >= since), updates=[_update(ratios=[size, size])])
        for step, size in ((0, share), (1, 0.01), (2, 0.01), (5, 0.01), (10, 0.01), (20, 0.01))
    ]
    (root,) = (root for sample in samples for root in diagnosis.update(sample))
    assert root.kind == kind
    assert (root.cause == "update_too_large") == (kind == "exploding_gradient")


@pytest.mark.parametrize(("loss", "decay", "found"), [(9.0, 0.0, 1), (9.0, 1.0, 1), (2.1, 0.0, 0)])
def test_large_update_that_raises_the_loss_is_an_explosion_whatever_follows(
    loss: float, decay: float, found: int
) -> None:
    def sample(step: int, value: float, ratio: float) -> Sample:
        return Sample(step, value, updates=[_update(ratios=[ratio, ratio], rates=[0.3], decay=decay)])

    diagnosis = Diagnosis()
    samples = [sample(0, 2.0, 2.8), sample(1, 1.0, 0.6), sample(2, loss, 0.32), sample(5, 1.0, 0.05)]
    assert [r.kind for s in samples for r in diagnosis.update(s)] == ["exploding_gradient"] * found


def _adam(net: nn.Module) -> Any:
    return torch.optim.Adam(net.parameters(), 1e-3)


def _adam_at(rate: float) -> Any:
    return lambda net: torch.optim.Adam(net.parameters(), rate)


def _nll_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    return -logits.log_softmax(1)[torch.arange(len(target)), target].mean()


def test_what_follows_from_a_cause_is_listed_under_it() -> None:
    diagnosis = TrainingDiagnosis()
    fit(Task(biased(deep(nn.ReLU, 4), 2, -20.0)), batches(60), [diagnosis])
    (root,) = diagnosis.diagnosis.roots
    assert root.kind == "dead_units"
    assert ("weight_stagnation", 2) in root.followed_by


def test_charts_show_units_and_gradients_at_outputs(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    module = Task(biased(deep(nn.ReLU, 4), 2, -20.0))
    fit(module, batches(8), [TrainingDiagnosis(charts=True)], logger=logger)
    events = events_in(logger.log_dir)
    assert [(event.step, event.value) for event in events.Scalars("dead_share/net.2")] == [
        (step, 1.0) for step in (0, 1, 2, 5)
    ]
    assert events.Scalars("output_gradient/net.0")[0].value == 0
    assert events.Scalars("output_gradient/net.6")[0].value > 0
    assert "output_gradient/layers" in events.Tags()["images"]


def test_chosen_symptoms_alone_are_published() -> None:
    listener = Listener()
    fit(Task(deep(nn.Sigmoid, 10)), batches(12), [TrainingDiagnosis(symptoms=["dead_units"]), listener])
    assert listener.found == []


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"symptoms": ["measles"]}])
def test_wrong_arguments_are_quoted(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"0|measles"):
        TrainingDiagnosis(**arguments)


class Clamped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)


class Logistic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / (1 + (-x).exp())


class Bounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.square()).sqrt()


def tiny(module: Any) -> Any:
    for weight in module.rnn.parameters():
        nn.init.normal_(weight, 0, 0.02)
    return module


def gated(kind: Callable[..., nn.RNNBase], gates: slice, bias: float, **arguments: Any) -> Any:
    torch.manual_seed(0)
    module = Recurrent(kind, **arguments)
    nn.init.constant_(module.rnn.bias_ih_l0[gates], bias)  # type: ignore[index]
    return module


class Attending(Classifier):
    def __init__(self) -> None:
        super().__init__("adam")
        torch.manual_seed(0)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        nn.init.normal_(self.attend.in_proj_weight, 0, 100.0)
        self.head = nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].view(-1, 5, 4)
        return functional.cross_entropy(self.head(self.attend(x, x, x)[0].mean(1)), batch[1])


class AttendingByHand(Classifier):
    """Products of queries and keys that nothing divides."""

    def __init__(self) -> None:
        super().__init__("adam")
        torch.manual_seed(0)
        self.query, self.key, self.head = nn.Linear(4, 64), nn.Linear(4, 64), nn.Linear(4, 4)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=4.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].view(-1, 5, 4)
        logits = self.query(x) @ self.key(x).transpose(1, 2)
        return functional.cross_entropy(self.head((logits.softmax(-1) @ x).mean(1)), batch[1])


@pytest.mark.parametrize("kind", [Attending, AttendingByHand])
def test_pasted_weights_of_attention_are_not_saturated(kind: Any) -> None:
    (incident,) = diagnosed(kind())
    assert incident.cause == "large_logits"
    model = kind()
    exec(incident.advice.rpartition("\n")[2], {"torch": torch, "model": model})
    assert diagnosed(model) == []


class Recurrent(Classifier):
    def __init__(self, kind: Callable[..., nn.RNNBase], **arguments: Any) -> None:
        super().__init__("adam")
        self.rnn = kind(4, 16, batch_first=True, **arguments)
        self.head = nn.Linear(16, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.rnn(batch[0].view(-1, 5, 4))[0]
        return functional.cross_entropy(self.head(out[:, -1]), batch[1])


class _Padded(Classifier):
    """Five steps that are read behind so many of padding."""

    def __init__(self, kind: Callable[..., nn.RNNBase], is_cured: bool = False) -> None:
        super().__init__("adam")
        self.rnn, self.head = kind(4, 16, batch_first=True), nn.Linear(16, 4)
        self.is_cured = is_cured

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = functional.pad(batch[0].view(-1, 5, 4), (0, 0, 0, 60))
        state = self.rnn(x)[0][:, -1]
        if self.is_cured:
            code = advice_for_cause("padding", ["rnn"], model=self).rpartition("\n")[2]
            exec(code, values := {"torch": torch, "nn": nn, "model": self, "x": x})
            state = values["state"]
        return functional.cross_entropy(self.head(state), batch[1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_sequences_that_are_read_behind_their_padding_are_packed(kind: Any) -> None:
    (incident,) = diagnosed(_Padded(kind), 25)
    assert (incident.kind, incident.cause, incident.where) == ("vanishing_gradient", "padding", ("rnn",))
    assert "; 92% of its steps, at the end, are all the same" in incident.detail
    assert diagnosed(_Padded(kind, is_cured=True), 25) == []


class Manual(Classifier):
    """Two optimizers by hand, with a mistake or none."""

    def __init__(self, mistake: str = "") -> None:
        super().__init__(norm=not mistake, dropout=0.1)
        self.automatic_optimization = False
        self.mistake = mistake

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for i, optimizer in enumerate(self.optimizers()):
            loss = functional.cross_entropy(self.net(batch[0]), batch[1])
            if self.mistake != "kept":
                optimizer.zero_grad()
            self.manual_backward(loss)
            if i == 1 and self.mistake == "cleared":
                optimizer.zero_grad()
            if not (i == 1 and self.mistake == "forgotten"):
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.net[:4].parameters()), torch.optim.SGD(self.net[4:].parameters(), 0.1)]


class Players(Task):
    """A generator and a critic, whose losses move by nature."""

    def __init__(self, saturates: bool = False) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 20)))
        self.saturates = saturates
        self.critic = nn.Sequential(nn.Linear(20, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        made = self.net(torch.randn(len(batch[0]), 4))
        optimizers: Any = self.optimizers()
        for optimizer, real, wanted in zip(optimizers, (batch[0], None), (0.0, 1.0), strict=True):
            scores = self.critic(made.detach() if real is not None else made)
            loss = functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, wanted))
            if real is not None:
                loss = loss + functional.softplus(-self.critic(real)).mean()
            elif self.saturates:
                loss = -functional.softplus(scores).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adagrad(n.parameters(), 0.06) for n in (self.critic, self.net)]


class CertainCritic(Players):
    def configure_optimizers(self) -> Any:
        rates = ((self.critic, 0.05), (self.net, 1e-4))
        return [torch.optim.Adam(network.parameters(), rate) for network, rate in rates]


def test_targets_of_a_discriminator_that_is_fooled_are_not_unrelated() -> None:
    program = gan(1)
    assert diagnosed(program.module, data=program.batches[:100]) == []


@pytest.mark.parametrize("saturates", [True, False])
def test_a_generator_whose_loss_is_flat_before_a_certain_critic_is_named(saturates: bool) -> None:
    data = [(x / 9 + 2, y) for x, y in batches(60)]
    found = diagnosed(CertainCritic(saturates), data=data)
    assert [(one.kind, one.cause, one.where[0]) for one in found] == [
        ("vanishing_gradient", "saturating_loss", "net.0")
    ] * saturates


def test_gradients_of_two_losses_are_no_profile_of_one() -> None:
    made = [LayerSignal(f"net.{i}", False, 1.0, [1e-5]) for i in range(3)]
    judged = [LayerSignal(f"critic.{i}", i == 2, 1.0, [0.1, 1e-5, 1e-5]) for i in range(3)]
    updates = [_update(names=[f"{of}.0.weight", f"{of}.1.weight"]) for of in ("net", "critic")]
    assert _found(Sample(i, 1.0, [*made, *judged], updates=updates) for i in range(1, 4)) == []


def test_large_updates_of_two_players_are_no_explosion() -> None:
    assert diagnosed(Players(), 40) == []


class Keeping(Task):
    """Never clears its gradients."""

    def optimizer_zero_grad(self, *arguments: Any) -> None:
        pass


class Assigning(Task):
    """Writes its gradients by hand, over those of the step before."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        parameters = [*self.net.parameters()]
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.copy_(gradient)
        return loss.detach().requires_grad_()

    def optimizer_zero_grad(self, *arguments: Any) -> None:
        pass


class Resetting(Task):
    """Begins each epoch with new weights of some layers, or with those of the start."""

    def __init__(self, layers: slice | None) -> None:
        super().__init__(deep(nn.ReLU, 2), optimizer=_adam_at(0.01))
        self.layers, self.start = layers, deepcopy(self.net.state_dict())

    def on_train_epoch_start(self) -> None:
        if self.layers is None:
            self.net.load_state_dict(self.start)
        for layer in [*self.net][self.layers or slice(0)]:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (slice(None), [("stuck_loss", "overwritten_weights", 12)]),
        (None, [("stuck_loss", "overwritten_weights", 12)]),
        (slice(-1, None), []),
        (slice(0), []),
    ],
)
def test_weights_that_are_reset_in_each_epoch_are_named_at_the_third(
    layers: slice | None, found: list[tuple[str, str, int]]
) -> None:
    incidents = diagnosed(Resetting(layers), 6, max_epochs=4, max_steps=-1)
    assert [(i.kind, i.cause, i.step) for i in incidents] == found


@pytest.mark.parametrize("loss", [functional.mse_loss, by_hand])
@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda y: y.roll(1, 0), [("stuck_loss", "unrelated_targets", 35)]),
        (lambda y: y + 3 * torch.randn(y.shape), []),
    ],
)
def test_targets_of_other_rows_are_named_noise_is_not(
    wrong: Change, found: list[tuple[str, str, int]], loss: Change
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(40, 48, 20)
    data = [(x, wrong(x[:, :1])) for x in inputs]
    incidents = diagnosed(Task(one_unit(), loss, rate(1e-3)), data=data)
    assert [(i.kind, i.cause, i.step) for i in incidents] == found


@pytest.mark.parametrize("is_related", [True, False])
def test_rows_that_come_again_show_no_dependence(is_related: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 20, generator=generator)
    y = (x[:, :1] if is_related else x[:, :1].roll(1, 0)).clone()
    dependence = TargetDependence()
    for rows in torch.randperm(512, generator=generator).split(64):
        found, n_rows = dependence.add([x[rows % 256]], y[rows % 256])
    assert (found > 3, n_rows == 256) == (is_related, True)


def test_weights_that_are_reset_for_each_fold_are_not_named() -> None:
    assert diagnosed(Resetting(slice(None)), data=batches(4) * 15, max_epochs=4, max_steps=-1) == []


class Freezing(Manual):
    """Trains parameters that are frozen between its steps, as a discriminator is in the generator's step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.net.requires_grad_(True)
        super().training_step(batch, batch_idx)
        self.net.requires_grad_(False)


class Momentum(Manual):
    """Has momentum by hand: gradients decay, and are not cleared."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(0.01 * functional.cross_entropy(self.net(batch[0]), batch[1]))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0.99)


class Repeating(Manual):
    """Has optimizers that step several times on each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            super().training_step(batch, batch_idx)


class Perturbed(Task):
    """Takes the gradient at perturbed weights (sharpness-aware minimization), and writes back the others."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        gradients = torch.autograd.grad(super().training_step(batch, batch_idx), [*self.net.parameters()])
        self.kept = deepcopy(self.net.state_dict())
        with torch.no_grad():
            for parameter, gradient in zip(self.net.parameters(), gradients, strict=True):
                parameter.add_(gradient, alpha=0.1)
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.net.load_state_dict(self.kept)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 32, sparse=True), nn.Linear(32, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        rows: Tensor = self.table((10 * inputs).long().clamp(-20, 19) + 20)
        logits: Tensor = self.head(rows.mean(1))
        return logits


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(20, 32, dtype=torch.cfloat), nn.Linear(32, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(inputs.to(torch.cfloat)).abs())
        return logits


@pytest.mark.parametrize(
    "make",
    [
        Freezing,
        Momentum,
        Repeating,
        Perturbed,
        Assigning,
        lambda: Task(Embedded(), optimizer=lambda net: torch.optim.SGD(net.parameters(), 0.1)),
        lambda: Task(Complex(), optimizer=lambda net: torch.optim.SGD(net.parameters(), 0.1)),
    ],
    ids=["frozen", "momentum", "repeated", "perturbed", "by hand", "sparse", "complex"],
)
def test_gradients_of_unusual_steps_are_not_named(make: Callable[[], Any]) -> None:
    module = make()
    n = 1 if make is Perturbed else 40
    assert diagnosed(module, data=40 // n * batches(n)) == []
    assert not any(parameter._backward_hooks for parameter in module.parameters())


class Checkpointed(Classifier):
    """Computes its body again in the backward pass; has scripted, shared and `vmap` parts."""

    def __init__(self) -> None:
        super().__init__("adam", dropout=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            inputs = torch.zeros(1, 4)
            self.scripted: Any = torch.jit.trace(nn.Linear(4, 4), inputs)
        self.again = self.net[0]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits: Any = checkpoint(self.net, x, use_reentrant=False)
        logits = logits + self.scripted(logits) + 0 * self.again(x)[:, :4]
        mapped = torch.vmap(lambda row: self.net[6](row.tanh()))(x.repeat(1, 4)[:, :64])
        return {"loss": functional.cross_entropy(logits + 0.1 * mapped, y), "logits": logits}


PROGRAMS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "normalization and dropout": (lambda: Classifier("adam", norm=True, dropout=0.2), {}),
    "momentum, clipped": (lambda: Classifier(norm=True), {"gradient_clip_val": 0.1}),
    "RNN": (lambda: Recurrent(nn.RNN), {}),
    "LSTM": (lambda: Recurrent(nn.LSTM), {}),
    "GRU": (lambda: Recurrent(nn.GRU), {}),
    "two optimizers by hand": (Manual, {}),
    "accumulation": (lambda: Classifier(norm=True), {"accumulate_grad_batches": 2}),
    "bf16": (lambda: Classifier("adam", norm=True), {"precision": "bf16-mixed"}),
    "checkpoint, vmap, script": (Checkpointed, {}),
    "permuted targets": (lambda: Task(Classifier(norm=True, dropout=0.2).net, _nll_by_hand), {"n": 152}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_watching_changes_nothing(name: str) -> None:
    make, arguments = PROGRAMS[name]
    n = arguments.get("n", 40)
    trainer_arguments = {key: value for key, value in arguments.items() if key != "n"}
    results = []
    for callbacks in ([], [TrainingDiagnosis()]):
        torch.manual_seed(0)
        module = make()
        torch.manual_seed(1)
        data = [(x, y.roll(1)) for x, y in batches(n)] if n > 40 else batches(n)
        trainer = fit(module, data, callbacks, **trainer_arguments)
        results.append(
            [*weights(module), *module.buffers(), *optimizer_state(trainer), torch.get_rng_state()]
        )
        assert "training_step" not in vars(module)
    assert same(*results)


def test_step_that_raises_restores_the_module() -> None:
    class Raising(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("mine")

    module = Raising()
    with pytest.raises(RuntimeError, match="mine"):
        fit(module, batches(3), [TrainingDiagnosis()])
    assert "training_step" not in vars(module)


def test_compiled_module_is_not_hooked(caplog: pytest.LogCaptureFixture) -> None:
    module = Task(deep(nn.Sigmoid, 10))
    module.net[0].compile(backend="eager")
    with caplog.at_level("INFO"):
        assert diagnosed(module, 4) == []
    assert "not diagnosed, because a part of the module is compiled" in caplog.text
    assert caplog.text.count("gradguard: ") == len(caplog.records)


def test_restored_diagnosis_continues_with_what_it_has_seen() -> None:
    callback, resumed = TrainingDiagnosis(), TrainingDiagnosis()
    fit(Task(biased(deep(nn.ReLU, 4), 2, -20.0)), batches(30), [callback])
    resumed.load_state_dict(callback.state_dict())
    assert resumed.diagnosis.roots == callback.diagnosis.roots != []
    assert resumed.diagnosis.state_dict() == callback.diagnosis.state_dict()


def test_resumed_run_names_the_same_at_the_same_step(tmp_path: Path) -> None:
    def slow(net: Any) -> Any:
        groups = [{"params": net[:2].parameters(), "lr": 1e-11}, {"params": net[2:].parameters()}]
        return torch.optim.Adam(groups, 1e-3)

    def run(steps: int, **arguments: Any) -> list[Any]:
        listener = Listener()
        data, module = batches(30), Task(deep(nn.ReLU, 3), optimizer=slow)
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=12, save_top_k=-1)
        arguments = {"max_steps": steps, "enable_checkpointing": True, **arguments}
        callbacks = [TrainingDiagnosis(), listener, keep]
        fit(module, data, callbacks, loader=ResumableLoader(data), **arguments)
        return [(incident.kind, incident.step, incident.where) for incident in listener.found]

    assert run(12) == []
    resumed = run(30, ckpt_path=str(tmp_path / "step=12.ckpt"))
    assert resumed == run(30) == [("weight_stagnation", 25, ("net.0",))]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_rank_0_decides_and_both_ranks_publish(tmp_path: Path) -> None:
    launch_on(2, "tests.callbacks.diagnosis_on_two_ranks", str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert [(kind, cause) for kind, cause, _, _ in first] == [
        ("dead_units", ""),
        ("exploding_gradient", "gradients_not_cleared"),
    ]
    assert first[0][3] == "net.2"


def test_a_step_may_copy_its_layers() -> None:
    """As for an average of weights: the copies have no hook that records."""

    class Copies(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.__dict__["copied"] = deepcopy(self.net)
            return loss

    bare, module = Copies(), Copies()
    fit(bare, batches(4))
    fit(module, batches(4), default_callbacks())
    assert same(weights(bare), weights(module))
    pickle.dumps(module.__dict__["copied"])
    module.__dict__["copied"](batches(1)[0][0])
