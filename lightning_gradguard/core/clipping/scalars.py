"""Arithmetic on numbers that the host knows, or that stay on the device without a host synchronization."""

from __future__ import annotations

import math
from statistics import median_low

import torch
from torch import Tensor

from lightning_gradguard.core.norms import Gradients

#: A number that the host knows, or one on the device that is read without a host synchronization.
Scalar = float | Tensor
#: Added to a norm that divides; the value of `torch.nn.utils.clip_grad_norm_`.
EPS = 1e-6


def total_norm(gradients: Gradients) -> Scalar:
    """Returns the total norm, as a number if the host knows it."""
    return gradients.total_norm if gradients.known_norm is None else gradients.known_norm


def smallest(coefficients: Scalar | list[Tensor]) -> Scalar:
    """Returns the smallest coefficient of a policy, which may have one for each gradient."""
    if not isinstance(coefficients, list):
        return coefficients
    device = coefficients[0].device
    return torch.cat([coefficient.reshape(-1).to(device) for coefficient in coefficients]).min()


def clip_coefficient(max_norm: Scalar, norm: Scalar, is_finite: Tensor | bool) -> Scalar:
    """Returns the coefficient for gradients of this norm; 1 if the norm is within bounds, or nonfinite."""
    return where((norm > max_norm) & is_finite, max_norm / (norm + EPS), 1.0)


def where(condition: Tensor | bool, one: Scalar, other: Scalar) -> Scalar:
    """Returns one number if the condition holds, else the other."""
    if isinstance(condition, Tensor):
        return torch.where(condition, one, other)
    return one if condition else other


def negate(condition: Tensor | bool) -> Tensor | bool:
    """Returns the opposite of a condition."""
    return ~condition if isinstance(condition, Tensor) else not condition


def fmax(one: Scalar, other: Scalar) -> Scalar:
    """Returns the larger of two numbers of one kind; the other if one is NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.fmax(one, other)
    return one if one > other or other != other else other


def fmin(one: Scalar, other: Scalar) -> Scalar:
    """Returns the smaller of two numbers of one kind; the other if one is NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.fmin(one, other)
    return one if one < other or other != other else other


def clamp_min(value: Scalar, bound: float) -> Scalar:
    """Returns the value, or the bound if that is larger; NaN stays."""
    if isinstance(value, Tensor):
        return value.clamp(min=bound)
    return bound if value < bound else value


def clamp_max(value: Scalar, bound: float) -> Scalar:
    """Returns the value, or the bound if that is smaller; NaN stays."""
    if isinstance(value, Tensor):
        return value.clamp(max=bound)
    return bound if value > bound else value


def absolute(value: Scalar) -> Scalar:
    """Returns the absolute value."""
    return value.abs() if isinstance(value, Tensor) else abs(value)


def square_root(value: Scalar) -> Scalar:
    """Returns the square root; NaN of a negative number."""
    if isinstance(value, Tensor):
        return value.sqrt()
    return math.sqrt(value) if value >= 0 else math.nan


def lerp(start: Scalar, end: Scalar, weight: float) -> Scalar:
    """Interpolates linearly between two numbers of one kind."""
    if isinstance(start, Tensor) and isinstance(end, Tensor):
        return torch.lerp(start, end, weight)
    return start + weight * (end - start)


def as_like(norm: Scalar, value: Scalar) -> Scalar:
    """Returns a value in the form of a norm: a number, or a scalar tensor on its device."""
    if isinstance(norm, Tensor):
        if not isinstance(value, Tensor):  # made on the device, for a copy synchronizes
            return torch.full((), value, dtype=torch.float64, device=norm.device)
        return value.to(norm.device, torch.float64)
    return float(value)


#: The last numbers of a series, the newest last; NaN where there is none yet if it is on the device.
Recent = list[float] | Tensor


def recent_like(norm: Scalar, recent: Recent, size: int) -> Recent:
    """Returns last numbers in the form of a norm: a list, or a tensor of shape `(size,)` on its device."""
    if isinstance(norm, Tensor):
        if isinstance(recent, Tensor):
            return recent.to(norm.device)
        values = torch.full((size,), torch.nan, dtype=torch.float64)
        if recent:
            values[-len(recent) :] = torch.tensor(recent, dtype=torch.float64)
        return values.to(norm.device)
    return [value for value in recent.tolist() if value == value] if isinstance(recent, Tensor) else recent


def pushed(recent: Recent, value: Scalar, is_finite: Tensor | bool, size: int) -> Recent:
    """Returns last numbers with one more, if that is finite, and at most `size` numbers."""
    if isinstance(recent, Tensor):
        longer = torch.cat((recent[1:], torch.as_tensor(value).view(1)))
        return torch.where(torch.as_tensor(is_finite), longer, recent)
    return [*recent[-size + 1 :], float(value)] if is_finite else recent


def emptied(recent: Recent, condition: Tensor | bool) -> Recent:
    """Returns no numbers if the condition holds, else the same ones."""
    if isinstance(recent, Tensor):
        return recent.masked_fill(torch.as_tensor(condition, device=recent.device), torch.nan)
    return [] if condition else recent


def last(recent: Recent) -> Scalar:
    """Returns the newest number; NaN without one."""
    return recent[-1] if len(recent) else math.nan


def median(recent: Recent) -> Scalar:
    """Returns the median, the lower of two; NaN without a number."""
    if isinstance(recent, Tensor):
        return recent.nanmedian()
    return median_low(recent) if recent else math.nan
