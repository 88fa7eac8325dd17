"""Rules that call a value a spike, as published, with their threshold left open."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import Protocol

from lightning_gradguard.core.detectors import SpikeDetector


class Rule(Protocol):
    """Called with one value after the other; returns True for a spike."""

    def update(self, value: float) -> bool: ...


class SkipStep:
    """OLMo-core's `SkipStepOptimizer` (AI2, 2024): deviations above the mean of the last 128."""

    def __init__(self, threshold: float) -> None:
        self._threshold, self._window = threshold, deque[float](maxlen=128)

    def update(self, value: float) -> bool:
        window = self._window
        is_spike = False
        if len(window) >= 64:
            level = sum(window) / len(window)
            variance = (sum([v * v for v in window]) - len(window) * level**2) / (len(window) - 1)
            is_spike = value - level > self._threshold * math.sqrt(max(variance, 0.0))
        window.append(value)
        return is_spike


class ZScore:
    """ZClip's running mean and variance (Kumar et al., 2025, arXiv:2504.02507)."""

    def __init__(self, threshold: float) -> None:
        self._threshold, self._first = threshold, list[float]()
        self._mean = self._variance = 0.0

    def update(self, value: float) -> bool:
        if len(self._first) < 25:
            self._first.append(value)
            self._mean = fmean(self._first)
            self._variance = fmean((v - self._mean) ** 2 for v in self._first)
            return False
        deviation = math.sqrt(self._variance) + 1e-6
        z = (value - self._mean) / deviation
        is_spike = z > self._threshold
        if is_spike:
            value = self._mean + self._threshold**2 / z * deviation
        self._mean = 0.97 * self._mean + 0.03 * value
        self._variance = 0.97 * self._variance + 0.03 * (value - self._mean) ** 2
        return is_spike


class LogEMA:
    """RNMT+ (Chen et al., 2018, arXiv:1804.09849): deviations above the running mean of the logarithm."""

    def __init__(self, threshold: float) -> None:
        self._threshold, self._n, self._mean, self._variance = threshold, 0, 0.0, 0.0

    def update(self, value: float) -> bool:
        logarithm = math.log(max(value, 1e-30))
        self._n += 1
        z = (logarithm - self._mean) / math.sqrt(self._variance + 1e-12)
        is_spike = self._n > 25 and z > self._threshold
        if not is_spike:
            rate = max(0.02, 1 / self._n)
            self._mean += rate * (logarithm - self._mean)
            self._variance += rate * ((logarithm - self._mean) ** 2 - self._variance)
        return is_spike


class RunningMean:
    """Lightning's `SpikeDetection`: a multiple above the mean of the last ten."""

    def __init__(self, threshold: float) -> None:
        self._threshold, self._window = threshold, deque[float](maxlen=10)

    def update(self, value: float) -> bool:
        window = self._window
        level = sum(window) / len(window) if window else value
        is_spike = bool(window) and value > window[-1] and value - level >= self._threshold * abs(level)
        window.append(value)
        return is_spike


class LogMAD:
    """Version 0.5 of this package: median absolute deviations of the logarithm, 0.25 at least."""

    def __init__(self, threshold: float) -> None:
        self._threshold, self._window, self._delayed = threshold, deque[float](maxlen=128), deque[float]()

    def update(self, value: float) -> bool:
        if value <= 0:
            return False
        logarithm, is_spike = math.log(value), False
        if len(self._window) >= 32:
            ordered = sorted(self._window)
            centre = ordered[len(ordered) // 2]
            deviation = sorted(abs(v - centre) for v in ordered)[len(ordered) // 2]
            bound = centre + self._threshold * max(1.4826 * deviation, 0.25)
            is_spike, logarithm = logarithm > bound, min(logarithm, bound)
        self._delayed.append(logarithm)
        if len(self._delayed) > 10:
            self._window.append(self._delayed.popleft())
        return is_spike


def ours(threshold: float) -> Rule:
    """The detector of this package."""
    return SpikeDetector(threshold=threshold)


#: Each rule with the threshold that it is used with.
RULES: dict[str, tuple[Callable[[float], Rule], float]] = {
    "SkipStep": (SkipStep, 6.0),
    "z-score": (ZScore, 2.5),
    "log EMA": (LogEMA, 4.0),
    "SpikeDetection": (RunningMean, 2.0),
    "log MAD": (LogMAD, 4.0),
    "ours": (ours, 3.0),
}
