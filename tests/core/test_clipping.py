"""Policies meet their published vectors, keep their bound, and survive what training throws at them."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard import (
    ClippingPolicy,
    GlobalNormClipping,
    PercentileClipping,
    PerTensorClipping,
    UnitwiseClipping,
    ZScoreClipping,
)
from lightning_gradguard.core.norms import Gradients, measure_gradients, scale_gradients_, unitwise_norm

POLICIES: list[Callable[[], ClippingPolicy]] = [
    GlobalNormClipping,
    ZScoreClipping,
    lambda: ZScoreClipping(max_norm=None, warmup_steps=5),
    PercentileClipping,
    UnitwiseClipping,
    lambda: PerTensorClipping(warmup_steps=5),
]


def gradients_of(*grads: Any, weight: float = 1.0) -> Gradients:
    named = []
    for i, grad in enumerate(grads):
        tensor = torch.as_tensor(grad, dtype=torch.float32)
        parameter = nn.Parameter(torch.full_like(tensor, weight))
        parameter.grad = tensor.clone()
        named.append((f"p{i}", parameter))
    return measure_gradients(named)


def step(policy: ClippingPolicy, gradients: Gradients) -> float:
    scale_gradients_(gradients, policy.coefficients(gradients))
    policy.commit()
    return float(torch.cat([t.flatten() for t in gradients.tensors]).double().norm())


def applied(policy: ClippingPolicy, norms: Sequence[float]) -> list[float]:
    return [step(policy, gradients_of([norm])) for norm in norms]


def test_global_norm_is_torch() -> None:
    for norm in (0.3, 1.0, 5.0):
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([3.0, 4.0]) * norm / 5
        nn.utils.clip_grad_norm_([parameter], 1.0)
        gradients = gradients_of(torch.tensor([3.0, 4.0]) * norm / 5)
        step(GlobalNormClipping(1.0), gradients)
        torch.testing.assert_close(gradients.tensors[0], parameter.grad, rtol=1e-6, atol=0)


def test_zscore_vector() -> None:
    policy = ZScoreClipping(max_norm=None)
    norms = applied(policy, [0.8, 1.2] * 12 + [0.8, 1, 10, 1, 1.5])
    assert norms[-4:] == pytest.approx([1.0, 1.01911950, 1.0, 1.44308031], rel=1e-6)
    assert policy.state_dict()["mean"].item() == pytest.approx(1.0067498108323134, rel=1e-6)
    assert policy.state_dict()["variance"].item() == pytest.approx(0.041088776804108315, rel=1e-5)


def test_zscore_warmup_is_not_inflated_by_a_spike() -> None:
    policy = ZScoreClipping(max_norm=None)
    assert applied(policy, [0.8, 1.2] * 10 + [1000] + [0.8, 1.2] * 2)[20] == pytest.approx(1.0, rel=1e-5)
    assert applied(policy, [50.0])[0] < 2


def test_zscore_constant_warmup_does_not_lock() -> None:
    policy = ZScoreClipping(max_norm=None)
    assert applied(policy, [1.0] * 25 + [1.2])[-1] == pytest.approx(1.2)


def test_zscore_is_never_disabled_by_nonfinite_norms() -> None:
    with_nan = ZScoreClipping(max_norm=None)
    without = ZScoreClipping(max_norm=None)
    norms = [0.8, 1.2] * 20 + [10.0]
    applied(with_nan, [math.nan, math.inf])  # they leave two places of the warm-up empty
    assert applied(with_nan, norms)[-1] == pytest.approx(applied(without, norms)[-1], rel=1e-3)
    applied(with_nan, [math.nan, math.inf])
    state = copy.deepcopy(with_nan.state_dict())
    applied(with_nan, [math.nan, math.inf])
    assert str(with_nan.state_dict()) == str(state)


def test_zscore_outlives_a_warmup_without_a_finite_norm() -> None:
    policy = ZScoreClipping(max_norm=None, warmup_steps=2)
    norms = applied(policy, [math.nan, math.inf, *([0.8, 1.2] * 50), 10.0])
    assert norms[2] == pytest.approx(0.8)
    assert norms[-3:-1] == pytest.approx([0.8, 1.2])
    assert norms[-1] < 2


@pytest.mark.parametrize("on_host", [False, True])
def test_zscore_takes_no_nonfinite_mean(on_host: bool) -> None:
    policy = ZScoreClipping(max_norm=None, warmup_steps=2)
    for norm in [math.inf] * 3 + [1.0] * 30:
        gradients = gradients_of([norm])
        known = gradients.total_norm.item() if on_host else None
        policy.coefficients(dataclasses.replace(gradients, known_norm=known))
        policy.commit()
    assert applied(policy, [1000.0])[0] < 10
    assert math.isfinite(float(policy.state_dict()["variance"]))


def test_zscore_loads_a_history_of_nothing() -> None:
    policy = ZScoreClipping()
    policy.load_state_dict({})
    assert applied(policy, [0.5]) == pytest.approx([0.5])


@pytest.mark.parametrize("policy", POLICIES)
@given(norms=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40))
@settings(deadline=None, max_examples=25)
def test_the_host_decides_as_the_device(policy: Callable[[], ClippingPolicy], norms: list[float]) -> None:
    on_device, on_host = policy(), policy()
    for norm in norms:
        gradients = gradients_of([[norm, 0.0]], [norm / 2])
        known = dataclasses.replace(gradients, known_norm=gradients.total_norm.item())
        expected = _flat(on_device.coefficients(gradients)).tolist()
        assert _flat(on_host.coefficients(known)).tolist() == pytest.approx(expected, rel=1e-12)
        if on_device.threshold is not None:
            assert on_host.threshold is not None
            assert float(on_host.threshold) == pytest.approx(float(on_device.threshold), rel=1e-12)
        on_device.commit()
        on_host.commit()


def test_zscore_goes_on_where_the_norm_is() -> None:
    mixed, plain = (ZScoreClipping(max_norm=None, warmup_steps=5) for _ in range(2))
    for i, norm in enumerate([0.8, 1.2] * 20 + [10.0]):
        gradients = gradients_of([norm])
        known = dataclasses.replace(gradients, known_norm=gradients.total_norm.item())
        found = mixed.coefficients(known if i % 3 else gradients)
        assert float(found) == pytest.approx(float(plain.coefficients(gradients)), rel=1e-12)
        mixed.commit()
        plain.commit()


@pytest.mark.parametrize("policy", [GlobalNormClipping, ZScoreClipping, PercentileClipping])
def test_what_the_host_knows_is_decided_by_numbers(policy: Callable[[], ClippingPolicy]) -> None:
    clipper = policy()
    gradients = dataclasses.replace(gradients_of([3.0]), known_norm=3.0)
    for _ in range(30):
        assert isinstance(clipper.coefficients(gradients), float)
        clipper.commit()


def test_percentile_vector_is_numpy() -> None:
    policy = PercentileClipping(percentile=10.0)
    for n in range(1, 11):
        applied(policy, [float(n)])
        assert policy.threshold is not None
        assert float(policy.threshold) == pytest.approx(np.percentile(range(1, n + 1), 10))


def test_percentile_window_is_bounded() -> None:
    policy = PercentileClipping(percentile=50.0, window=3)
    applied(policy, [100.0, 1.0, 2.0, 3.0])
    assert policy.threshold is not None
    assert float(policy.threshold) == pytest.approx(2.0)
    assert policy.state_dict()["norms"].numel() == 3


def test_unitwise_vector() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    weight.grad = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    gradients = measure_gradients([("w", weight)])
    step(UnitwiseClipping(), gradients)
    expected = torch.tensor([[0.05, 0.0], [1.0000000656873453e-05, 0.0]])
    torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=0)


def test_unitwise_lets_zero_weights_grow() -> None:
    gradients = gradients_of([[1.0, 1.0]], weight=0.0)
    assert step(UnitwiseClipping(), gradients) > 0


def test_per_tensor_vector() -> None:
    policy = PerTensorClipping(warmup_steps=5)
    norms = applied(policy, [0.5, 0.4, 0.6, 0.45, 2, 0.4, 0.4, 0.8])
    assert norms == pytest.approx([0.5, 0.4, 0.6, 0.45, 0.42, 0.4, 0.4, 0.4204], rel=1e-5)
    assert policy.state_dict()["norms"].item() == pytest.approx(0.40078454416, rel=1e-6)


def test_per_tensor_zero_norm_forbids_nothing() -> None:
    policy = PerTensorClipping(warmup_steps=3)
    assert applied(policy, [0.0, 0.5, 0.5, 0.5, 0.5])[-1] == pytest.approx(0.5)


def test_per_tensor_newcomer_has_its_own_warmup() -> None:
    policy = PerTensorClipping(warmup_steps=3)
    for _ in range(5):
        step(policy, gradients_of([0.1]))
    both = gradients_of([0.1], [0.9])
    step(policy, both)
    assert both.tensors[1].item() == pytest.approx(0.9)


@pytest.mark.parametrize("policy", POLICIES)
@given(norms=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40))
@settings(deadline=None, max_examples=25)
def test_never_larger_and_twice_is_once(policy: Callable[[], ClippingPolicy], norms: list[float]) -> None:
    clipper = policy()
    for norm in norms:
        gradients = gradients_of([[norm, 0.0]], [norm / 2])
        before = float(gradients.total_norm)
        first = copy.deepcopy(clipper)
        after = step(clipper, gradients)
        assert after <= before * (1 + 1e-6)
        if clipper.threshold is not None and not isinstance(clipper, ZScoreClipping):
            assert after <= float(clipper.threshold) * (1 + 1e-6)
        if isinstance(clipper, GlobalNormClipping | UnitwiseClipping):
            clipped = [tensor.clone() for tensor in gradients.tensors]
            repeated = gradients_of(*clipped)
            step(first, repeated)
            for one, two in zip(clipped, repeated.tensors, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_small_gradients_are_left_bitwise(policy: Callable[[], ClippingPolicy]) -> None:
    clipper = policy()
    for _ in range(4):
        gradients = gradients_of([[1e-4, 2e-4]], [3e-4])
        before = [tensor.clone() for tensor in gradients.tensors]
        scale_gradients_(gradients, clipper.coefficients(gradients))
        clipper.commit()
        assert all(map(torch.equal, before, gradients.tensors))


def test_unitwise_bound_holds_for_every_unit() -> None:
    gradients = gradients_of(torch.randn(8, 5) * 100, torch.randn(4) * 100, torch.randn(2, 3, 3, 3))
    step(UnitwiseClipping(0.01), gradients)
    for parameter, tensor in zip(gradients.parameters, gradients.tensors, strict=True):
        assert bool((unitwise_norm(tensor) <= 0.01 * unitwise_norm(parameter) * (1 + 1e-5)).all())


@pytest.mark.parametrize("policy", POLICIES)
def test_nonfinite_gradients_are_left_and_forgotten(policy: Callable[[], ClippingPolicy]) -> None:
    clipper, twin = policy(), policy()
    for norm in (0.6, 0.9, 0.7, 0.8, 0.5, 0.6):
        applied(clipper, [norm])
        applied(twin, [norm])
    for bad in (math.nan, math.inf):
        poisoned = gradients_of([bad, 1.0])
        for coefficient in torch.atleast_1d(_flat(clipper.coefficients(poisoned))):
            assert coefficient.item() == 1
        clipper.commit()
        for norm in (0.5, 3.0, 0.7, 9.0, 0.6):
            assert applied(clipper, [norm]) == applied(twin, [norm])


def _flat(coefficients: float | Tensor | list[Tensor]) -> Tensor:
    if not isinstance(coefficients, list):
        return torch.as_tensor(coefficients, dtype=torch.float64)
    return torch.cat([coefficient.reshape(-1) for coefficient in coefficients])


@pytest.mark.parametrize("policy", POLICIES)
@given(cut=st.integers(0, 30))
@settings(deadline=None, max_examples=10)
def test_resume_decides_as_uninterrupted(policy: Callable[[], ClippingPolicy], cut: int) -> None:
    generator = torch.Generator().manual_seed(3)
    norms = torch.rand(40, generator=generator).mul(3).tolist()
    whole = policy()
    expected = applied(whole, norms)
    first = policy()
    applied(first, norms[:cut])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = policy()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert applied(resumed, norms[cut:]) == expected[cut:]


@pytest.mark.parametrize("policy", POLICIES)
def test_looking_changes_nothing_until_commit(policy: Callable[[], ClippingPolicy]) -> None:
    clipper, twin = policy(), policy()
    for norm in (0.5, 3.0, 0.7, 9.0, 0.6, 4.0):
        for _ in range(3):
            clipper.coefficients(gradients_of([7 * norm]))
        assert applied(clipper, [norm]) == applied(twin, [norm])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_copy_is_independent(policy: Callable[[], ClippingPolicy]) -> None:
    clipper = policy()
    applied(clipper, [1.0, 2.0, 3.0])
    state = str(clipper.state_dict())
    applied(copy.deepcopy(clipper), [100.0] * 10)
    assert str(clipper.state_dict()) == state


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert "_local_scalar_dense" not in func._schema.name, "the host waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_host_never_waits(policy: Callable[[], ClippingPolicy]) -> None:
    clipper = policy()
    for norm in (0.5, 3.0, 9.0):
        gradients = gradients_of([norm, norm])
        with _NoWaiting():
            scale_gradients_(gradients, clipper.coefficients(gradients))
            clipper.commit()


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        (GlobalNormClipping, {"max_norm": 0}, "max_norm=0"),
        (GlobalNormClipping, {"max_norm": math.nan}, "max_norm=nan"),
        (ZScoreClipping, {"z_threshold": -1}, "z_threshold=-1"),
        (ZScoreClipping, {"decay": 1.0}, "decay=1.0"),
        (ZScoreClipping, {"warmup_steps": 0}, "warmup_steps=0"),
        (ZScoreClipping, {"max_norm": -2.0}, "max_norm=-2.0"),
        (PercentileClipping, {"percentile": 101}, "percentile=101"),
        (PercentileClipping, {"window": 2.5}, "window=2.5"),
        (UnitwiseClipping, {"clipping": 0}, "clipping=0"),
        (UnitwiseClipping, {"eps": 0}, "eps=0"),
        (PerTensorClipping, {"max_ratio": 0.5}, "max_ratio=0.5"),
        (PerTensorClipping, {"decay": -0.1}, "decay=-0.1"),
        (PerTensorClipping, {"warmup_steps": True}, "warmup_steps=True"),
        (PerTensorClipping, {"max_norm": math.inf}, "max_norm=inf"),
    ],
)
def test_bad_arguments_are_quoted(policy: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(**arguments)


def test_a_policy_without_coefficients_is_refused() -> None:
    class Empty(ClippingPolicy):
        pass

    with pytest.raises(TypeError, match="coefficients"):
        Empty()  # type: ignore[abstract]
