"""Arithmetic on a number that is on the host or on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_gradguard.core.clipping.policy import EPS, Scalar
from lightning_gradguard.core.norms import Gradients


def _total_norm(gradients: Gradients) -> Scalar:
    """The total norm, on the host if it is known there."""
    return gradients.total_norm if gradients.known_norm is None else gradients.known_norm


def _coefficient(allowed: Scalar, norm: Scalar, is_finite: Tensor | bool) -> Scalar:
    """By what to multiply gradients of this norm; 1 where it is allowed, or nonfinite."""
    return _where((norm > allowed) & is_finite, allowed / (norm + EPS), 1.0)


def _where(condition: Tensor | bool, one: Scalar, other: Scalar) -> Scalar:
    """One if the condition holds, else the other; on the device where the condition is."""
    if isinstance(condition, Tensor):
        return torch.where(condition, one, other)
    return one if condition else other


def _larger(one: Scalar, other: Scalar) -> Scalar:
    """The larger of two numbers of one kind; the other where one is NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.fmax(one, other)
    return one if one > other else other


def _at_least(value: Scalar, bound: float) -> Scalar:
    """The value, or a bound that it falls short of."""
    if isinstance(value, Tensor):
        return value.clamp(min=bound)
    return bound if value < bound else value


def _at_most(value: Scalar, bound: float) -> Scalar:
    """The value, or a bound that it exceeds; NaN stays."""
    if isinstance(value, Tensor):
        return value.clamp(max=bound)
    return bound if value > bound else value


def _lerp(start: Scalar, end: Scalar, weight: float) -> Scalar:
    """What lies this share of the way from one number to another of its kind."""
    if isinstance(start, Tensor) and isinstance(end, Tensor):
        return torch.lerp(start, end, weight)
    return start + weight * (end - start)


def _like(norm: Scalar, value: Scalar) -> Scalar:
    """A value as a norm is given: a number, or a scalar on its device."""
    if isinstance(norm, Tensor):
        return torch.as_tensor(value, dtype=torch.float64, device=norm.device)
    return float(value)


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a positive number.")
    return value


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    return value
