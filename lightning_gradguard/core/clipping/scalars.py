"""Arithmetic on numbers that the host knows, or that stay on the device without a host synchronization."""

from __future__ import annotations

import math
from typing import overload

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
        if not isinstance(one, Tensor) and not isinstance(other, Tensor):
            one = as_like(condition, one)  # two numbers would be float32
        return torch.where(condition, one, other)
    return one if condition else other


def negate(condition: Tensor | bool) -> Tensor | bool:
    """Returns the opposite of a condition."""
    return ~condition if isinstance(condition, Tensor) else not condition


@overload
def fmax(one: float, other: float) -> float: ...


@overload
def fmax(one: Scalar, other: Scalar) -> Scalar: ...


def fmax(one: Scalar, other: Scalar) -> Scalar:
    """Returns the larger of two numbers; the other if one is NaN."""
    if isinstance(one, Tensor):
        return torch.fmax(one, torch.as_tensor(as_like(one, other)))
    if isinstance(other, Tensor):
        return fmax(other, one)
    return one if one > other or other != other else other


@overload
def fmin(one: float, other: float) -> float: ...


@overload
def fmin(one: Scalar, other: Scalar) -> Scalar: ...


def fmin(one: Scalar, other: Scalar) -> Scalar:
    """Returns the smaller of two numbers; the other if one is NaN."""
    if isinstance(one, Tensor):
        return torch.fmin(one, torch.as_tensor(as_like(one, other)))
    if isinstance(other, Tensor):
        return fmin(other, one)
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
