"""The callback that scales gradients down by a policy which adapts to the run."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradguard.core import arguments, tags
from lightning_gradguard.core.clipping import (
    ClippingPolicy,
    RelativeNormClipping,
    Scalar,
    smallest,
    step_context,
)
from lightning_gradguard.core.detectors import HARD_CLIPPING, ConstantClippingDetector
from lightning_gradguard.core.incidents import Incident, IncidentKind
from lightning_gradguard.core.norms import (
    Gradients,
    StepContext,
    scale_gradients_,
    tensor_norms,
    total_norm_from_norms,
)
from lightning_gradguard.core.parameter_names import match_names, warn_unmatched
from lightning_gradguard.core.remedies import advice
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.incidents.journal import incident_now, publish
from lightning_gradguard.runtime.incidents.present import present_in
from lightning_gradguard.runtime.logging import console
from lightning_gradguard.runtime.logging.hyperparameters import non_defaults
from lightning_gradguard.runtime.other_clipping import clip_norm, clips_otherwise, describe_other_clipper
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.step_callback import StepCallback

_PLAIN = {float, int, bool, str}
#: Symptoms that make gradients so large that most steps are clipped hard.
_EXPLAIN: tuple[IncidentKind, ...] = ("exploding_gradient", "poor_initialization", "saturated_units")


class AdaptiveGradientClipping(StepCallback):
    """Scales gradients down when they are larger than a policy allows.

    Gradients are clipped after they are reduced, unscaled and accumulated, in automatic and in manual
    optimization, once for each optimizer that steps. A nonfinite gradient is left to `NaNRollback`, and
    enters no history. Under LBFGS, which evaluates the loss several times in one step, the callback does
    not act. A `gradient_clip_val` of the Trainer acts after it.

    | tag | value |
    |---|---|
    | `clip/threshold` | total norm that the policy allows now (policies with one threshold) |
    | `clip/coefficient` | factor on the gradients (the smallest, where there are several) |
    | `clip/fraction` | share of steps clipped since the last log |
    | `grad_norm_clipped/total` | total norm after clipping, also that of the Trainer by norm |

    Args:
        policy: Decides the factor on each gradient; a fresh `RelativeNormClipping()` if `None`. Each
            optimizer gets a copy with a history of its own.
        exclude: Names of parameters that are not clipped, such as a classifier's head under
            `UnitwiseClipping`. A name of a module excludes all of its parameters.

    Raises:
        ValueError: If `policy` is not a `ClippingPolicy`, or `exclude` is not a list of names.

    Example:
        >>> from lightning_gradguard import AdaptiveGradientClipping, PercentileClipping
        >>> clipping = AdaptiveGradientClipping(PercentileClipping(percentile=10.0), exclude=["head"])
    """

    def __init__(self, policy: ClippingPolicy | None = None, exclude: Sequence[str] | None = None) -> None:
        super().__init__()
        self.settings = non_defaults(AdaptiveGradientClipping, locals())
        if policy is not None and not isinstance(policy, ClippingPolicy):
            raise ValueError(
                f"policy={policy!r} is not a ClippingPolicy: pass one, such as GlobalNormClipping(1.0), or "
                "one of your own subclass with the method `coefficients(gradients)`."
            )
        self.policy = RelativeNormClipping() if policy is None else policy
        self.exclude = arguments.names("exclude", exclude)
        self.wants_units = self.policy.by_unit
        self.state_arguments = {"policy": type(self.policy).__name__, "exclude": self.exclude}
        self._policies: dict[int, ClippingPolicy] = defaultdict(partial(copy.deepcopy, self.policy))
        self._clipped: dict[int, tuple[Scalar, int]] = {}
        self._logged: dict[int, tuple[Scalar, int]] = {}
        self._hard: dict[int, tuple[Scalar, int, Scalar]] = {}
        self._factors = (0.0, 0)  # sum of logarithms of coefficients below 1, and their number
        self._detectors: dict[int, ConstantClippingDetector] = defaultdict(ConstantClippingDetector)
        self._may_override = False
        self._is_explained = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Joins the suite; prints that there is a second clipper."""
        super().setup(trainer, pl_module, stage)
        self._is_explained = False
        if stage != "fit":
            return
        if self.policy.by_unit:
            lightning_api.reject_flattened_parameters(trainer, type(self.policy).__name__)
        if other := describe_other_clipper(trainer):
            console.print_message(
                trainer,
                f"Gradients may be clipped twice: AdaptiveGradientClipping acts first, then {other}. One is "
                "enough: remove the latter, or give default_callbacks(adaptive_gradient_clipping=None).",
            )

    @override
    def on_begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns about optimizers that cannot be clipped, and about patterns that match nothing."""
        self._clipped, self._logged, self._hard = {}, {}, {}
        self._factors = (0.0, 0)
        warn_unmatched("exclude", self.exclude, pl_module, trainer.optimizers)
        self._may_override = not lightning_api.gradients_used_after_hook(trainer)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, lightning_api.REPEATS_CLOSURE):
                warnings.warn(
                    f"AdaptiveGradientClipping does not act under {type(optimizer).__name__}: a line "
                    "search needs the true gradient.",
                    stacklevel=2,
                )

    @override
    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """Scales the gradients of an accepted step, and adds it to the history."""
        if not step.accepted or step.inside_closure:
            return
        index, gradients = step.optimizer_index, step.gradients
        policy = self._policies[index]
        gradients.context = self._context(step, policy)
        if self.exclude:
            gradients = gradients.without(match_names(gradients.names, self.exclude))
        if not gradients.names:
            return
        coefficients = policy.coefficients(gradients)
        lowest = smallest(coefficients)
        if isinstance(lowest, Tensor) or lowest != 1:
            self._scale(step, gradients, coefficients)
        policy.commit()
        clipped, steps = self._clipped.get(index, (0, 0))
        self._clipped[index] = (clipped + (lowest < 1), steps + 1)
        if not isinstance(coefficients, list):
            hard, steps, _ = self._hard.get(index, (0, 0, 1.0))
            self._hard[index] = (hard + (coefficients < HARD_CLIPPING), steps + 1, coefficients)
        if self.suite.is_logged:
            self._log(trainer, step, gradients, policy.threshold, coefficients)

    @override
    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Adds the counts of hard clipping: at once if they are on the host, else with the logged numbers."""
        for index, (hard, steps, last) in list(self._hard.items()):
            if not isinstance(last, Tensor):
                self.on_host_numbers(trainer, pl_module, (index, steps), [float(hard), last])
            elif self.suite.is_logged:
                numbers = torch.stack([torch.as_tensor(hard).to(last), last])
                self.suite.metrics.add_numbers(self, (index, steps), numbers)
            else:
                continue
            del self._hard[index]

    def on_host_numbers(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        record: tuple[int, int],
        numbers: list[float],
    ) -> None:
        """Publishes an incident once clipping sets the length of most steps."""
        index, steps = record
        hard, last = numbers
        if 0 < last < 1:
            self._factors = (self._factors[0] + math.log(last), self._factors[1] + 1)
        share = self._detectors[index].update(hard, steps)
        self.suite.clipped[index] = self._detectors[index].of_last
        # a bound that a treatment has chosen was tried as it is
        if share is not None and not self._is_explained and "treatment" not in present_in(trainer):
            text = advice("constant_clipping", coefficient=self._usual_coefficient())
            incident = incident_now(trainer, "constant_clipping", value=share, advice=text)
            publish(trainer, pl_module, incident)

    def on_training_incident(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, incident: Incident
    ) -> None:
        """Takes note of a symptom from which hard clipping follows."""
        self._is_explained |= incident.kind in _EXPLAIN

    @override
    def final_counts(self) -> dict[str, float]:
        """Returns the share of steps that were clipped, and by how much."""
        counts = [*self._logged.values(), *self._clipped.values()]
        steps = sum(n for _, n in counts)
        clipped = sum(float(n) for n, _ in counts)
        usual = self._usual_coefficient()
        found = {} if usual is None else {tags.USUAL_COEFFICIENT: usual}
        return {tags.CLIPPED_FRACTION: clipped / steps, **found} if steps else {}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the histories of the policies, and the counts of hard clipping, by optimizer."""
        detectors = {index: detector.state_dict() for index, detector in self._detectors.items()}
        return {
            **self.snapshot_state_dict(),
            "constant_clipping": detectors,
            "is_explained": self._is_explained,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._policies.clear()
        for index, state in state_dict["histories"].items():
            self._policies[index].load_state_dict(copy.deepcopy(state))
        # checkpoints of 0.5 have neither
        self._is_explained = state_dict.get("is_explained", False)
        for index, state in state_dict.get("constant_clipping", {}).items():
            self._detectors[index].load_state_dict(state)

    def snapshot_state_dict(self) -> dict[str, Any]:
        """Returns the state that `NaNRollback` rolls back with the weights."""
        return {"histories": {i: _copied(policy.state_dict()) for i, policy in self._policies.items()}}

    def load_snapshot_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Rolls the histories back with the weights."""
        for index, policy in self._policies.items():
            state = state_dict["histories"].get(index, self.policy.state_dict())
            policy.load_state_dict(copy.deepcopy(state))

    @override
    def wants_weight_norms(self, trainer: pl.Trainer) -> bool:
        """True if the policy of any optimizer wants them, or may, as the optimizer has not stepped yet."""
        wants = False
        for index in range(len(trainer.optimizers)):
            wants |= self._policies[index].wants_weight_norm
        return wants

    def _usual_coefficient(self) -> float | None:
        """Returns the geometric mean of the coefficients of clipped steps; `None` if it is not known."""
        total, n = self._factors
        return math.exp(total / n) if n else None

    def _context(self, step: Step, policy: ClippingPolicy) -> StepContext:
        measurement = step.measurement
        weight_norm: Scalar | None = None
        if policy.wants_weight_norm:
            weight_norm = step.packed.weight_norm() if measurement is None else measurement.weight_norm
        return step_context(
            step.optimizer,
            step.gradients,
            loss=step.loss if measurement is None else measurement.loss,
            weight_norm=weight_norm,
        )

    def _scale(self, step: Step, gradients: Gradients, coefficients: Scalar | list[Tensor]) -> None:
        divisor = self._divisor(step, gradients, coefficients)
        if divisor is None:
            scale_gradients_(gradients, coefficients)
        else:
            self.suite.override_fused_step(step, grad_scale=divisor)

    def _divisor(
        self, step: Step, gradients: Gradients, coefficients: Scalar | list[Tensor]
    ) -> Tensor | None:
        """Returns the divisor for a fused optimizer; `None` if gradients are scaled here."""
        if isinstance(coefficients, list) or not isinstance(coefficients, Tensor) and coefficients == 0:
            return None
        if (
            not self._may_override
            or gradients.tensors is not step.gradients.tensors
            or not step.supports_fused_override
        ):
            return None
        if isinstance(coefficients, Tensor):
            return coefficients.to(step.selection.device).reciprocal().float()
        # made on the device, for a copy synchronizes
        return torch.full((), 1 / coefficients, device=step.selection.device)

    def _log(
        self,
        trainer: pl.Trainer,
        step: Step,
        gradients: Gradients,
        threshold: Scalar | None,
        coefficients: Scalar | list[Tensor],
    ) -> None:
        index = step.optimizer_index
        clipped, steps = self._clipped.pop(index)
        before, steps_before = self._logged.get(index, (0, 0))
        self._logged[index] = (before + clipped, steps_before + steps)
        values = {tags.CLIP_COEFFICIENT: smallest(coefficients), tags.CLIP_FRACTION: clipped / steps}
        if not clips_otherwise(trainer):  # else `GradientNormMonitor` measures it
            left = _clipped_norm(step.gradients, gradients, coefficients)
            values[tags.CLIPPED_NORM_TOTAL] = _at_most(left, clip_norm(trainer))
        if threshold is not None:
            values[tags.CLIP_THRESHOLD] = threshold
        n = len(trainer.optimizers)
        scalars = {tags.tag(form, optimizer=index, of=n): value for form, value in values.items()}
        self.suite.metrics.add_scalars(scalars)


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copies a history: numbers, and lists of them, in a hundredth of the time of `copy.deepcopy`."""
    return {
        name: value
        if type(value) in _PLAIN
        else list(value)
        if type(value) is list and {*map(type, value)} <= _PLAIN
        else copy.deepcopy(value)
        for name, value in state.items()
    }


def _at_most(norm: Scalar, bound: float | None) -> Scalar:
    """Returns the norm after the Trainer's own clipping to a bound, if there is one."""
    if bound is None:
        return norm
    return norm.clamp(max=bound) if isinstance(norm, Tensor) else min(norm, bound)


def _clipped_norm(everything: Gradients, clipped: Gradients, coefficients: Scalar | list[Tensor]) -> Scalar:
    """Returns the total norm after clipping, from the norms before it if one coefficient scales a tensor."""
    if (
        not isinstance(coefficients, list)
        and everything.known_norm is not None
        and clipped.tensors is everything.tensors
    ):
        return everything.known_norm * coefficients
    if not isinstance(coefficients, list):
        norms = clipped.norms * coefficients
    elif all(coefficient.numel() == 1 for coefficient in coefficients):
        norms = clipped.norms * torch.stack([c.reshape(()) for c in coefficients])
    elif clipped.units is not None:
        pairs = zip(coefficients, clipped.units, strict=True)
        norms = torch.stack([total_norm_from_norms((c * unit).reshape(-1)) for c, (unit, _) in pairs])
    else:
        norms = tensor_norms(clipped.tensors)
    excluded = everything.total_norm**2 - clipped.total_norm**2
    return (total_norm_from_norms(norms) ** 2 + excluded.clamp(min=0)).sqrt()
