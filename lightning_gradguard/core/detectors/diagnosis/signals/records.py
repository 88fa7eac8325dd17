"""Records of a traced step: indices of numbers that are still on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lightning_gradguard.core.detectors.diagnosis.sample import LayerSignal, LossSignal, UnitSignal
from lightning_gradguard.core.detectors.diagnosis.signals.scalars import DeviceScalars
from lightning_gradguard.core.forensics.location import Location
from lightning_gradguard.core.incidents import SymptomCause


@dataclass
class LayerRecord:
    """A layer: its name, the dimension of its units, rms of its output and gradients, blocked units."""

    name: str
    units: int
    output: int | None
    gradients: list[int] = field(default_factory=list)
    blocked: int | None = None
    calls: int = 0
    activation: str = ""
    n_attached: int = 0
    is_lookup: bool = False

    def signal(self, numbers: DeviceScalars, *, is_last: bool) -> LayerSignal:
        """Returns the layer with its numbers, which are on the host."""
        gradients = [numbers[i] for i in self.gradients]
        rest = gradients, self.activation, self.n_attached, self.is_lookup
        return LayerSignal(self.name, is_last, numbers[self.output], *rest)


@dataclass
class UnitRecord:
    """An activation: its layer, dead units (by their place among all), saturated ones and outputs.

    `after` is the number of calls of layers before it.
    """

    layer: str
    module: str
    function: str
    dead: int | None
    saturated: int | None
    after: int
    outputs: int | None = None

    def signal(self, numbers: DeviceScalars, dead: int | None, *, is_head: bool) -> UnitSignal:
        """Returns the activation with its numbers, which are on the host."""
        names = self.layer, self.module, self.function
        return UnitSignal(*names, numbers[dead], numbers[self.saturated], is_head, numbers[self.outputs])


@dataclass
class LossRecord:
    """A call of a loss: broken conditions, value, those of a constant and of guessing, rms, its line.

    `added` is what it adds to the loss of the step, over its value.
    """

    function: str
    flags: dict[SymptomCause, int]
    value: int
    constants: tuple[int | None, int | None]
    scales: tuple[int, int] | None = None
    guess: float = math.nan
    location: Location | None = None
    n_per_row: float = math.nan
    added: int | None = None

    def signal(self, numbers: DeviceScalars, scale: float) -> LossSignal:
        """Returns the call with its numbers, which are on the host."""
        flags = {cause: numbers[i] for cause, i in self.flags.items()}
        scales = (None, None) if self.scales is None else self.scales
        value, best, here, target, given = (numbers[i] for i in (self.value, *self.constants, *scales))
        weight = numbers[self.added] / scale if scale else math.nan
        known = value, best, here, target, given, self.guess, self.location, weight, self.n_per_row
        return LossSignal(self.function, flags, *known)
