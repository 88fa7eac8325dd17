"""Elements out of range are counted by comparison with a healthy state."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_gradguard.core.forensics import (
    Origin,
    OutOfRange,
    or_bad_input,
    origin_in_weights,
    out_of_range_elements,
)
from lightning_gradguard.core.forensics.origin import advice_on_schedules, nonfinite_input, origin_in_epsilon

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_infinity_is_out_of_range_in_any_precision(dtype: torch.dtype) -> None:
    nonfinite = torch.tensor([1.0, INF], dtype=dtype)
    assert out_of_range_elements([("momentum", nonfinite, torch.tensor(1e33))])["momentum"].n == 1


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ([0.9, -0.9], [0.1, 0.01], {}),
        ([1.1, 0.0], [0.1, 0.1], {"w": 1}),
        ([0.9, 0.0], [0.0, 0.0], {}),  # a bias starts at zero
        ([NAN, INF], [0.1, 0.1], {"w": 2}),
        ([-INF, 29.0], [3.0, 1.0], {"w": 1}),
        ([31.0, -31.0], [-3.0, 1.0], {"w": 2}),
        ([], [], {}),
    ],
)
def test_out_of_range_elements_of_known_tensors(
    now: list[float], before: list[float], expected: dict[str, int]
) -> None:
    found = out_of_range_elements([("w", torch.tensor(now), torch.tensor(before))])
    assert {name: elements.n for name, elements in found.items()} == expected


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_were_never_finite_are_no_update(value: float) -> None:
    weight = torch.tensor([value])
    (found,) = out_of_range_elements([("w", weight, weight.clone())]).values()
    assert math.isnan(found.growth)


@pytest.mark.parametrize(("of_others", "cause"), [(1e20, "corrupted_weights"), (1e29, "update_too_large")])
def test_one_element_is_corrupted_if_it_is_far_beyond_all_others(of_others: float, cause: str) -> None:
    found = {"bias": OutOfRange(9, 9, of_others), "head.weight": OutOfRange(1, 64, 1e30)}
    assert origin_in_weights(found).cause == cause


def test_integers_are_never_out_of_range() -> None:
    assert out_of_range_elements([("step", torch.tensor([10_000]), torch.tensor([1]))]) == {}


def test_a_part_of_zeros_has_no_outliers() -> None:
    part = torch.zeros(9, 1)
    part[3] = 1.0
    assert or_bad_input(Origin("forward_pass", detail="A"), {"batch[0]": part}).cause == "forward_pass"


def test_a_column_that_is_never_finite_is_named() -> None:
    part = torch.zeros(9, 3)
    part[:, 1] = NAN
    assert nonfinite_input("batch[0]", part).detail == (
        "batch[0] holds nonfinite values in column 1 of every row."
    )


def test_a_schedule_whose_rates_cannot_be_read_gives_no_advice() -> None:
    class Unstepped(torch.optim.lr_scheduler.StepLR):
        def step(self, epoch: int | None = None) -> None:
            """Does not set the rates that `get_last_lr` returns."""

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert advice_on_schedules([Unstepped(optimizer, 1)]) == ("", None)


def test_an_epsilon_of_zero_is_the_cause_where_another_network_has_passed_the_nan_on() -> None:
    first, second = (torch.nn.Parameter(torch.ones(n, dtype=torch.float16)) for n in (4, 8))
    optimizers = [torch.optim.Adam([weight], lr=1e-3, eps=1e-8) for weight in (first, second)]
    first.grad = torch.full_like(first, 1e-4)
    optimizers[0].step()
    second.grad = torch.full_like(second, first[0].item())  # NaN by now
    optimizers[1].step()
    assert not second.isfinite().any()
    found = origin_in_epsilon([("critic", first), ("generator", second)], optimizers)
    assert found is not None
    assert (found.cause, found.where) == ("optimizer_epsilon", ("critic",))
