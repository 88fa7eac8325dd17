"""Every policy keeps its bound, its history and the contract of `ClippingPolicy`."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard import (
    ClippingPolicy,
    GlobalNormClipping,
    PercentileClipping,
    PerTensorClipping,
    RelativeNormClipping,
    UnitwiseClipping,
    ZScoreClipping,
)
from lightning_gradguard.core.norms import scale_gradients_
from tests.core.clipping.steps import applied, gradients_of, step

POLICIES: list[Callable[[], ClippingPolicy]] = [
    GlobalNormClipping,
    ZScoreClipping,
    lambda: ZScoreClipping(max_norm=None, warmup_steps=5),
    RelativeNormClipping,
    PercentileClipping,
    UnitwiseClipping,
    lambda: PerTensorClipping(warmup_steps=5),
]


def _flat(coefficients: float | Tensor | list[Tensor]) -> Tensor:
    if not isinstance(coefficients, list):
        return torch.as_tensor(coefficients, dtype=torch.float64)
    return torch.cat([coefficient.reshape(-1) for coefficient in coefficients])


@pytest.mark.parametrize("policy", POLICIES)
@given(norms=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40))
@settings(deadline=None, max_examples=25)
def test_host_and_device_give_the_same_coefficients(
    policy: Callable[[], ClippingPolicy], norms: list[float]
) -> None:
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


@pytest.mark.parametrize("policy", [GlobalNormClipping, ZScoreClipping, PercentileClipping])
def test_known_norm_gives_a_number(policy: Callable[[], ClippingPolicy]) -> None:
    clipper = policy()
    gradients = dataclasses.replace(gradients_of([3.0]), known_norm=3.0)
    for _ in range(30):
        assert isinstance(clipper.coefficients(gradients), float)
        clipper.commit()


@pytest.mark.parametrize("policy", POLICIES)
@given(norms=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40))
@settings(deadline=None, max_examples=25)
def test_norms_never_grow_and_clipping_is_idempotent(
    policy: Callable[[], ClippingPolicy], norms: list[float]
) -> None:
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
def test_small_gradients_are_unchanged_bitwise(policy: Callable[[], ClippingPolicy]) -> None:
    clipper = policy()
    for _ in range(4):
        gradients = gradients_of([[1e-4, 2e-4]], [3e-4])
        before = [tensor.clone() for tensor in gradients.tensors]
        scale_gradients_(gradients, clipper.coefficients(gradients))
        clipper.commit()
        assert all(map(torch.equal, before, gradients.tensors))


@pytest.mark.parametrize("policy", POLICIES)
def test_nonfinite_gradients_are_unchanged_and_enter_no_history(policy: Callable[[], ClippingPolicy]) -> None:
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


@pytest.mark.parametrize("n_zeros", [1, 5, 30])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_of_zero_bound_no_later_ones(policy: Callable[[], ClippingPolicy], n_zeros: int) -> None:
    """As those of a loss that is switched on later, or of a reward that is seen later."""
    clipper = policy()
    assert applied(clipper, [0.0] * n_zeros) == [0.0] * n_zeros
    assert applied(clipper, [0.5] * 40)[-1] == pytest.approx(applied(policy(), [0.5] * 40)[-1])


@pytest.mark.parametrize("policy", POLICIES)
@given(cut=st.integers(0, 30))
@settings(deadline=None, max_examples=10)
def test_resumed_policy_clips_like_an_uninterrupted_one(
    policy: Callable[[], ClippingPolicy], cut: int
) -> None:
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
def test_coefficients_changes_nothing_until_commit(policy: Callable[[], ClippingPolicy]) -> None:
    clipper, twin = policy(), policy()
    for norm in (0.5, 3.0, 0.7, 9.0, 0.6, 4.0):
        for _ in range(3):
            clipper.coefficients(gradients_of([7 * norm]))
        assert applied(clipper, [norm]) == applied(twin, [norm])


@pytest.mark.parametrize("policy", POLICIES)
def test_deep_copy_is_independent(policy: Callable[[], ClippingPolicy]) -> None:
    clipper = policy()
    applied(clipper, [1.0, 2.0, 3.0])
    state = str(clipper.state_dict())
    applied(copy.deepcopy(clipper), [100.0] * 10)
    assert str(clipper.state_dict()) == state


class _NoSynchronization(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert "_local_scalar_dense" not in func._schema.name, "the host synchronizes with the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_never_synchronize_the_host(policy: Callable[[], ClippingPolicy]) -> None:
    clipper = policy()
    for norm in (0.5, 3.0, 9.0):
        gradients = gradients_of([norm, norm])
        with _NoSynchronization():
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


def test_policy_without_coefficients_is_rejected() -> None:
    class Empty(ClippingPolicy):
        pass

    with pytest.raises(TypeError, match="coefficients"):
        Empty()  # type: ignore[abstract]
