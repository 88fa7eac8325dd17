"""Fused optimizers clip and skip in their own kernel where no other code is affected, with equal results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from lightning_gradguard import (
    AdaptiveGradientClipping,
    ClippingPolicy,
    GlobalNormClipping,
    NaNRollback,
    UnitwiseClipping,
)
from lightning_gradguard.core.norms import Gradients, Measurement, PackedMeasurement
from lightning_gradguard.core.norms.measurement import DISAGREEMENT, OVERFLOW
from lightning_gradguard.runtime.optimizer_hooks import FusedStepOverride
from lightning_gradguard.runtime.steps.check_modes import DeferredCheck
from tests.tasks import NOT_A_NUMBER, Classifier, batches, fit, insert, optimizer_state, same, weights

FUSED: dict[str, Callable[[Any], Optimizer]] = {
    "adam": lambda p: Adam(p, lr=3e-3, fused=True),
    "adamw": lambda p: AdamW(p, lr=3e-3, fused=True),
    "adagrad": lambda p: Adagrad(p, lr=1e-2, fused=True),
    "sgd": lambda p: SGD(p, lr=0.1, fused=True),
    "sgd with momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
}
ATTRIBUTES = ("grad_scale", "found_inf")


class Fused(Classifier):
    """Notes what its optimizer is told to do by itself, whenever it steps."""

    def __init__(self, optimizer: Callable[[Any], Optimizer]) -> None:
        super().__init__()
        self.make = optimizer
        self.riders: list[set[str]] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())

        def note(optimizer: Optimizer, *_: Any) -> None:
            self.riders.append(vars(optimizer).keys() & set(ATTRIBUTES))

        # beside hooks of other modules, which might write to weights, nothing is overridden
        note.__module__ = FusedStepOverride.__module__
        # Lightning runs everything from the forward pass on in between the hooks before a step and the step
        optimizer.register_step_post_hook(note)
        return optimizer


class Onlooker(pl.Callback):
    """Wants to see gradients as the optimizer will use them."""

    def on_before_optimizer_step(self, *_: Any) -> None: ...


class Watch(pl.Callback):
    """What each batch has left: gradients, weights, the optimizer's state."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.states: list[list[Tensor]] = []
        self.left: set[str] = set()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.gradients.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])
        self.states.append([*weights(pl_module), *optimizer_state(trainer)])
        for optimizer in trainer.optimizers:
            self.left |= vars(optimizer).keys() & set(ATTRIBUTES)


def run(
    optimizer: Callable[[Any], Optimizer],
    callbacks: Sequence[pl.Callback],
    data: Any = None,
    **arguments: Any,
) -> tuple[Fused, Watch]:
    module, watch = Fused(optimizer), Watch()
    fit(module, batches(6) if data is None else data, [*callbacks, watch], **arguments)
    return module, watch


def clipping() -> AdaptiveGradientClipping:
    return AdaptiveGradientClipping(GlobalNormClipping(0.05))


@pytest.mark.parametrize("rollback", [None, "exact", "deferred"])
@pytest.mark.parametrize("optimizer", FUSED)
def test_the_kernel_scales_as_the_callback_does(optimizer: str, rollback: Any) -> None:
    judges = [] if rollback is None else [NaNRollback(check=rollback)]
    module, watch = run(FUSED[optimizer], [clipping(), *judges], max_steps=1)
    assert "grad_scale" in module.riders[0]
    judges = [] if rollback is None else [NaNRollback(check=rollback)]
    other, expected = run(FUSED[optimizer], [clipping(), *judges, Onlooker()], max_steps=1)
    assert "grad_scale" not in other.riders[0]
    for gradient, scaled in zip(watch.gradients[0], expected.gradients[0], strict=True):
        ulp = torch.finfo(torch.float32).eps * scaled.abs()
        assert bool(((gradient - scaled).abs() <= 2 * ulp).all())
    assert not watch.left


@pytest.mark.parametrize("optimizer", FUSED)
def test_the_kernel_skips_bit_for_bit(optimizer: str) -> None:
    data, rollback = insert(batches(8), 4, NOT_A_NUMBER), NaNRollback(check="deferred")
    module, watch = run(FUSED[optimizer], [rollback], data)
    assert rollback.skips == 1
    # on a CPU, the host knows of the others that they are good
    assert [step for step, riders in enumerate(module.riders) if "found_inf" in riders] == [4]
    assert same(watch.states[4], watch.states[3])
    assert not same(watch.states[3], watch.states[2])
    assert not watch.left


def test_a_deferred_check_copies_no_weights_where_the_kernel_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {}
    # else the host knows that all steps are good
    monkeypatch.setattr(PackedMeasurement, "is_on_host", False)
    for name, optimizer in {"fused": FUSED["adamw"], "not": lambda p: AdamW(p, lr=3e-3)}.items():
        rollback = NaNRollback(check="deferred")

        class Look(pl.Callback):
            def on_train_end(self, *_: Any) -> None:
                deferred = rollback._session._mode  # noqa: B023
                assert isinstance(deferred, DeferredCheck)
                sizes[name] = sum(t.nbytes for t in deferred._before._memory.values())  # noqa: B023

        run(optimizer, [rollback, Look()])
    n_parameters = sum(p.numel() for p in Classifier().parameters())
    assert sizes["fused"] == 0
    assert sizes["not"] >= 12 * n_parameters


class _Looks(Fused):
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None: ...


class _Clips(Fused):
    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize(
    ("module", "callbacks", "arguments"),
    [
        (Fused, [clipping], {"gradient_clip_val": 10.0}),
        (_Looks, [clipping], {}),
        (_Clips, [clipping], {}),
        (Fused, [clipping, Onlooker], {}),
        (Fused, [lambda: AdaptiveGradientClipping(UnitwiseClipping())], {}),
        (Fused, [lambda: AdaptiveGradientClipping(GlobalNormClipping(0.05), exclude=["net.6"])], {}),
        (Fused, [clipping], {"precision": "64-true"}),
    ],
    ids=[
        "gradient_clip_val",
        "the module looks",
        "the module clips",
        "a callback looks",
        "by unit",
        "exclude",
        "64",
    ],
)
def test_no_override_where_other_code_is_affected(module: Any, callbacks: Any, arguments: Any) -> None:
    network = module(FUSED["adamw"])
    double = "precision" in arguments
    data = [(x.double() if double else x, y) for x, y in batches(3)]
    fit(network, data, [make() for make in callbacks], **arguments)
    assert not set().union(*network.riders)


def test_overrides_of_a_scaler_stay() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    rollback = NaNRollback(check="deferred")
    module, watch = run(FUSED["adamw"], [clipping(), rollback], plugins=plugin)
    assert all(riders == set(ATTRIBUTES) for riders in module.riders)
    assert not watch.left


def test_manually_stepped_optimizer_gets_one_override() -> None:
    class Manual(Fused):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()
            optimizer.optimizer.step()  # past Lightning, and so past every callback

    module = Manual(FUSED["adamw"])
    fit(module, batches(2), [clipping()])
    assert [bool(riders) for riders in module.riders] == [True, False] * 2


def test_exception_leaves_no_override() -> None:
    class Breaks(Fused):
        def configure_optimizers(self) -> Any:
            self.kept = self.make(self.parameters())
            self.kept.register_step_post_hook(self.fail)
            return self.kept

        def fail(self, *_: Any) -> None:
            raise RuntimeError("on purpose")

    module = Breaks(FUSED["sgd"])
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, batches(2), [clipping(), NaNRollback(check="deferred")])
    assert not vars(module.kept).keys() & set(ATTRIBUTES)


@pytest.mark.parametrize("fused", [False, True])
def test_state_created_in_a_bad_step_is_initialized(fused: bool) -> None:
    class TwoBranches(pl.LightningModule):
        """First the one is trained, then the other, which has no momentum by then."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(20, 4), nn.Linear(20, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            branch = self.first if batch_idx < 4 else self.second
            return nn.functional.cross_entropy(branch(batch[0]), batch[1])

        def configure_optimizers(self) -> Optimizer:
            return SGD(self.parameters(), lr=0.1, momentum=0.9, fused=fused)

    def no_trace() -> list[Tensor]:
        module = TwoBranches()
        trainer = fit(module, insert(batches(10), 4, NOT_A_NUMBER), [NaNRollback(check="deferred")])
        return [*weights(module), *optimizer_state(trainer)]

    assert max(float(tensor.abs().max()) for tensor in no_trace()) < 10


class _Decays(SGD):
    """Writes to weights after the kernel has."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            torch._foreach_mul_(group["params"], 0.99)
        return loss


class _Writes(Fused):
    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            torch._foreach_mul_(list(self.parameters()), 0.99)


class _Strict(NaNRollback):
    def check_step(self, trainer: pl.Trainer, measurement: Measurement) -> Any:
        return "skip" if measurement.loss > 5 else super().check_step(trainer, measurement)


@pytest.mark.parametrize(
    ("module", "optimizer", "rollback"),
    [
        (Fused, lambda p: _Decays(p, lr=0.1, fused=True), NaNRollback),
        (_Writes, FUSED["sgd"], NaNRollback),
        (Fused, FUSED["sgd"], _Strict),
    ],
    ids=["the optimizer writes", "the module writes", "another judge"],
)
def test_no_override_where_other_code_writes_or_checks(module: Any, optimizer: Any, rollback: Any) -> None:
    network = module(optimizer)
    fit(network, insert(batches(8), 4, NOT_A_NUMBER), [rollback(check="deferred")])
    assert not set().union(*network.riders)


@pytest.mark.parametrize("coefficient", [0.0, 0, 1, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_a_policy_may_return_any_number(coefficient: float, fused: bool) -> None:
    class Constant(ClippingPolicy):
        def coefficients(self, gradients: Gradients) -> float:
            return coefficient

    module = Fused(lambda p: SGD(p, lr=0.1, fused=fused))
    before = weights(module)
    fit(module, batches(1), [AdaptiveGradientClipping(Constant())])
    assert same(weights(module), before) == (coefficient == 0)


def test_what_is_excluded_is_no_part_of_the_known_norm() -> None:
    class Spy(ClippingPolicy):
        norms: ClassVar[list[tuple[float | None, float]]] = []

        def coefficients(self, gradients: Gradients) -> float:
            self.norms.append((gradients.known_norm, gradients.total_norm.item()))
            return 1.0

    for exclude in ([], ["net.6"]):
        fit(Classifier(), batches(2), [AdaptiveGradientClipping(Spy(), exclude), NaNRollback()])
    assert [known for known, _ in Spy.norms[2:]] == [None] * 2
    assert [known for known, _ in Spy.norms[:2]] == pytest.approx([total for _, total in Spy.norms[:2]])


numbers = st.sampled_from([0.0, 1e-3, 1.0, 2.0, 1e4, 1e38, 3.5e38, 1e300, math.inf, math.nan])


@given(
    loss=st.sampled_from([1.0, -2.0, 1e300, math.inf, -math.inf, math.nan]),
    told=st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0, 3.0]), min_size=4, max_size=4),
    by_rank=st.lists(st.tuples(numbers, st.sampled_from([0.0, 1e-4, 0.1, 2.0])), min_size=1, max_size=4),
    has_rates=st.booleans(),
)
def test_kernel_skips_the_steps_that_the_check_skips(
    loss: float, told: list[float], by_rank: list[tuple[float, float]], has_rates: bool
) -> None:
    totals, rates = zip(*by_rank, strict=True)
    packed = [loss, 1.0, *told, 1.0, 0.0, *totals, *(rates if has_rates else ())]
    asked = PackedMeasurement(torch.tensor(packed, dtype=torch.float64), has_rates)
    assert bool(asked.must_skip()) == asked.measurement(0).must_skip


def test_ranks_disagree_from_a_thousandfold_on() -> None:
    for factor, expected in ((0.99, False), (1.01, True)):
        alike, unlike = [1.0, 1.0], [1.0, factor * DISAGREEMENT]
        for by_rank in ([*unlike, *alike], [*alike, *unlike]):
            packed = [1.0, 1.0, 0, 0, 0, 0, 1.0, 0.0, *by_rank]
            asked = PackedMeasurement(torch.tensor(packed, dtype=torch.float64), has_rates=True)
            assert bool(asked.must_skip()) == asked.measurement(0).must_skip == expected
    assert OVERFLOW > 3e38
