"""Signals of one sampled step on the host: plain numbers that rules read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_gradguard.core import tags
from lightning_gradguard.core.detectors.diagnosis.coverage import Coverage
from lightning_gradguard.core.forensics.arguments import Call, call_in
from lightning_gradguard.core.forensics.location import Location
from lightning_gradguard.core.incidents import SymptomCause

#: Calls of one layer in one pass from which on it is a recurrence.
MIN_TIMES = 8
#: Norm before over that after clipping from which on it was clipped, and not rounded.
CLIPPED_AT_ALL = 1.01


@dataclass(frozen=True)
class LayerSignal:
    """A layer with a weight matrix, as one pass has seen it.

    Args:
        name: Name in the module.
        is_last: True for the layer that was called last, the head.
        output: Rms of its output at the first call.
        gradients: Rms of the gradient that arrives at the output of each call; NaN where none arrives.
        activation: Name of the function applied to its output, if it is a known activation.
        n_attached: Number of calls whose output takes part in the backward pass.
        is_lookup: True if it gets integers alone, as an embedding does.
    """

    name: str
    is_last: bool
    output: float
    gradients: Sequence[float]
    activation: str = ""
    n_attached: int = 0
    is_lookup: bool = False

    @property
    def gradient(self) -> float:
        """The largest of the gradients; NaN if none arrived."""
        return max((g for g in self.gradients if not math.isnan(g)), default=math.nan)


@dataclass(frozen=True)
class UnitSignal:
    """Units after an activation.

    Args:
        layer: The layer that feeds the activation.
        module: The module that is the activation; empty for a function.
        function: Name of the activation function, the kind of a recurrent module's gates, `"attention"`, or
            empty for units that no gradient reaches.
        dead: Share of units that are zero for every sample; NaN if not measured.
        saturated: Share of units that are saturated for more than 95 % of samples; NaN if not measured.
        is_head: True if no layer follows.
        outputs: Share of outputs that are saturated; NaN if not measured.
    """

    layer: str
    module: str
    function: str
    dead: float
    saturated: float
    is_head: bool
    outputs: float = math.nan


@dataclass(frozen=True)
class TimeSignal:
    """The gradient through time of a recurrent module.

    Args:
        name: The module.
        first: Rms of the gradient at the first step of the sequence.
        last: That at the last step to which a gradient arrives.
        largest: The largest at any step.
        n_times: Length of the sequence.
        padded: Share of the steps that are, up to the last one, all the same; NaN if unknown.
    """

    name: str
    first: float
    last: float
    largest: float
    n_times: int = 0
    padded: float = math.nan


@dataclass(frozen=True)
class LossSignal:
    """A call of a loss function.

    Args:
        function: Its name.
        flags: Share of the call, 0 to 1, that breaks a condition, by the cause.
        value: Mean loss.
        constant: Mean loss of the best constant answer to the targets so far; NaN if unknown, 0 if all of
            many labels were the same.
        constant_here: The same of that answer to the targets of this call.
        target: Root mean square of the targets of a regression.
        answer: The same of the answers.
        guess: Loss of a classification that gives all classes one probability; NaN if unknown.
        location: The line of the user's code that calls it; `None` if unknown.
        weight: What it adds to the loss of the step, over `value`; NaN if unknown.
        n_per_row: Elements of its targets in a row of the batch.
    """

    function: str
    flags: dict[SymptomCause, float] = field(default_factory=dict)
    value: float = math.nan
    constant: float = math.nan
    constant_here: float = math.nan
    target: float = math.nan
    answer: float = math.nan
    guess: float = math.nan
    location: Location | None = None
    weight: float = math.nan
    n_per_row: float = math.nan

    @property
    def place(self) -> str:
        """Words for its line; empty if unknown."""
        return "" if self.location is None else f" at {self.location}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """Answer and target as the user's code has them; empty if unknown."""
        code = "" if self.location is None else self.location.called_code
        call = call_in(code, "sub" if self.function == "difference" else "") or Call("", (), {})
        by_name = [call.keywords[name] for name in ("input", "target") if name in call.keywords]
        found = (*call.arguments, *by_name)[-2:]
        return found if len(found) == 2 and all(found) else ()


#: Norm of weights, relative to torch's default initialization, below which an update is compared with that.
SMALL_WEIGHTS = 0.3
#: Share of its initial value below which a schedule has lowered a learning rate to nothing.
DECAYED = 1e-3


@dataclass(frozen=True)
class Update:
    """The change that an optimizer made to its weights in the sampled step.

    Args:
        names: Parameters with a gradient.
        is_matrix: By parameter.
        gradients: Norms before clipping.
        weights: Norms before the update.
        default_norms: Norms after torch's default initialization, 0 for what is no matrix.
        ratios: Norm of the update over that of the weight; empty if unknown.
        unclipped: Factor by which the gradient was larger before clipping, if the update depends on it.
        rates: Learning rate of each parameter group.
        initial_rates: The same before any schedule.
        resolution: Update of a weight, relative to it, that its dtype rounds away.
        total_norm: Norm of all gradients before clipping.
        loss: Mean loss of the backward passes since the step before; NaN if unknown.
        largest: Largest magnitude of an element of these gradients; NaN if unknown.
        loss_scale: The GradScaler's; 1 without one.
        decay: Largest weight decay of a parameter group.
        momentum: Of SGD; NaN for other optimizers, whose step is no multiple of the gradient.
        clipper: What else clips, such as `gradient_clip_val=0.01 of the Trainer`; empty if nothing does.
        suite_clips: True if `AdaptiveGradientClipping` has clipped a step so far.
    """

    names: Sequence[str]
    is_matrix: Sequence[bool]
    gradients: Sequence[float]
    weights: Sequence[float]
    default_norms: Sequence[float]
    ratios: Sequence[float]
    unclipped: float
    rates: Sequence[float]
    total_norm: float
    loss: float = math.nan
    largest: float = math.nan
    loss_scale: float = 1.0
    decay: float = 0.0
    momentum: float = math.nan
    clipper: str = ""
    suite_clips: bool = False
    initial_rates: Sequence[float] = ()
    resolution: float = 0.0

    @property
    def has_no_rate(self) -> bool:
        """True if a schedule leaves less than a thousandth of the initial rate."""
        return max(self.rates, default=0.0) < DECAYED * max(self.initial_rates, default=0.0)

    def scheduled(self, *, has_begun: bool) -> str:
        """Returns words for a schedule that leaves no rate, by whether there has been one; else nothing."""
        rate, initial = max(self.rates, default=0.0), max(self.initial_rates, default=0.0)
        if not self.has_no_rate:
            return ""
        if has_begun:
            return f", as a schedule has lowered the learning rate from {initial:.3g} to {rate:.3g}"
        return f", as the schedule of a learning rate of {initial:.3g} begins at {rate:.3g}"

    @property
    def by_clippers(self) -> str:
        """Words for what may have clipped, the suite first; empty if that is not known."""
        names = [*["AdaptiveGradientClipping"] * self.suite_clips, *filter(None, [self.clipper])]
        return f" by {' or '.join(names)}" if names else ""

    @property
    def sizes(self) -> tuple[float, float, float]:
        """Norm and largest element as they were before they were unscaled, and the norm after clipping."""
        scale = self.loss_scale
        return self.total_norm * scale, self.largest * scale, self.total_norm / self.unclipped

    @property
    def steepest(self) -> list[str]:
        """The five parameters with the largest gradients."""
        order = sorted(range(len(self.names)), key=lambda i: -self.gradients[i])
        return [self.names[i] for i in order[:5]]

    def promise(self, loss: float) -> float:
        """Returns the decrease that a first step along the gradient promises, over the loss; NaN if unknown.

        Where the loss is a parabola above 0, steps are stable up to 4 times (1 + momentum) squared.
        """
        step = min(self.rates, default=math.nan) * (1 + self.momentum)
        return step * self.total_norm**2 / loss if loss > 0 else math.nan

    @property
    def share(self) -> float:
        """Norm of the whole update over that of all weights; NaN if unknown."""
        total = math.hypot(*self.weights)
        return self._moved / total if self.ratios and total > 0 else math.nan

    @property
    def ratio(self) -> float:
        """The `share`, or that of weights of a usual size where these are smaller; NaN if unknown."""
        usual = max(math.hypot(*self.weights), SMALL_WEIGHTS * math.hypot(*self.default_norms))
        return self._moved / usual if self.ratios and usual > 0 else math.nan

    @property
    def _moved(self) -> float:
        return math.hypot(*(r * w for r, w in zip(self.ratios, self.weights, strict=False)))


@dataclass
class Sample:
    """All signals of one sampled step.

    Args:
        step: Its number.
        loss: The loss of the step; NaN if unknown.
        layers: In the order of their first calls.
        units: One for each activation.
        times: One for each recurrence.
        calls: One for each loss.
        mistakes: Causes, layers and shares of calls that compute over another dimension than is meant.
        updates: One for each optimizer that stepped.
        coverage: Parameters that are not trained.
        input_rms: Rms of the largest floating-point tensor of the batch, as the first layer gets it.
        input_name: Place of that tensor in the batch, such as `batch[0]['age']`, where it has others.
        columns: If that is a table, the largest rms of a column, the median one, the index of the largest.
        keeps_gradients: True if a step has had the gradients of the one before in its own.
        updates_are_undone: True if weights were nearly the same before a step and before the next one.
        n_resets: Ends of epochs in a row at which most weights were replaced, besides any update.
        inputs_are_constant: True if all rows of the inputs are the same, and those of the targets differ.
        dependence: By how many standard deviations targets depend on the inputs, NaN if unknown, and the
            number of rows of which that is known.
        one_signed: True if the gradient at the head has one sign for all samples.
        permuted: Relative rise of the loss if targets are permuted; NaN if not measured.
        spread: Distance of the last layer's output, in rows of unit norm, from its mean; NaN if unknown.
        meets_data: True if what the network gives is compared, or combined, with the batch.
        has_residuals: True if something is added to what was computed from it by a layer.
        divergence: Weight of the divergence of a VAE within the loss, NaN without one, and its line.
        n_updates: Number of steps that optimizers have taken, fewer than those of the run where a module
            accumulates by itself.
    """

    step: int
    loss: float = math.nan
    layers: Sequence[LayerSignal] = ()
    units: Sequence[UnitSignal] = ()
    times: Sequence[TimeSignal] = ()
    calls: Sequence[LossSignal] = ()
    mistakes: Sequence[tuple[SymptomCause, str, float]] = ()
    updates: list[Update] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)
    input_rms: float = math.nan
    input_name: str = ""
    columns: tuple[float, ...] | None = None
    keeps_gradients: bool = False
    updates_are_undone: bool = False
    n_resets: int = 0
    inputs_are_constant: bool = False
    dependence: tuple[float, float] = (math.nan, 0.0)
    one_signed: bool = False
    permuted: float = math.nan
    spread: float = math.nan
    meets_data: bool = False
    has_residuals: bool = False
    divergence: tuple[float, Location | None] = (math.nan, None)
    n_updates: float = math.inf

    @property
    def head(self) -> tuple[str, ...]:
        """The name of the layer that was called last, if any was."""
        return tuple(layer.name for layer in self.layers if layer.is_last)

    @property
    def entry(self) -> tuple[str, ...]:
        """The name of the first layer that a normalization can be put before, if any was called."""
        return tuple(layer.name for layer in sorted(self.layers, key=lambda one: one.is_lookup)[:1])

    @property
    def is_whole(self) -> bool:
        """True if a known loss is all of that of the step."""
        return any(math.isclose(call.value, self.loss, rel_tol=0.01) for call in self.calls)

    def output_gradients(self) -> dict[str, float]:
        """Returns the gradient at each layer's output, where one arrives."""
        return {layer.name: layer.gradient for layer in self.layers if math.isfinite(layer.gradient)}

    def scalars(self) -> dict[str, float]:
        """Returns what is charted, by tag: gradients at outputs, shares of dead and saturated units.

        Example:
            >>> unit = UnitSignal("net.0", "net.1", "relu", 0.25, math.nan, is_head=False)
            >>> list(Sample(0, units=[unit]).scalars().values())
            [0.25]
        """
        found = {tags.tag(tags.OUTPUT_GRADIENT, name): g for name, g in self.output_gradients().items()}
        for unit in self.units:
            for form, share in ((tags.DEAD_SHARE, unit.dead), (tags.SATURATED_SHARE, unit.saturated)):
                if math.isfinite(share):
                    tag = tags.tag(form, unit.layer)
                    found[tag] = max(share, found.get(tag, 0.0))
        return found
