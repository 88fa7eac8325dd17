"""Criteria that a freshly initialized network must meet, measured on one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gradguard.core.initialization.cures import with_cures
from lightning_gradguard.core.initialization.findings import SEVERITIES, Finding, Severity
from lightning_gradguard.core.initialization.propagation import (
    LAYERS,
    ZERO_GAIN,
    SignalPropagation,
    propagate,
)
from lightning_gradguard.core.norms import local_shard


@dataclass(frozen=True)
class Bounds:
    """Values from which on a network may not train, and will not: warn, and fail. Set on half of the zoo.

    Args:
        vanishing: Decades of gradient gain from the last hidden layer back to the first block, at most.
        exploding: The same, at least.
        through_time: Decades back through time, at most.
        loss: The loss over that of a uniform guess, at least.
        variation: Vanishing gradients fail only if the last layer's input varies less than this,
        lost: or at so many decades.
    """

    vanishing: tuple[float, float]
    exploding: tuple[float, float]
    through_time: tuple[float, float]
    loss: tuple[float, float]
    variation: float = math.inf
    lost: float = ZERO_GAIN


#: By whether the optimizer divides gradients by their size: docs/zoo.md has what they give. One that does
#: makes up for small gradients, but not for samples that a constant part of the signal makes alike.
BOUNDS = {
    False: Bounds((-2.0, -3.0), (2.0, 4.0), (-2.25, -4.0), (20.0, 40.0)),
    True: Bounds((-2.5, -4.0), (2.0, math.inf), (-3.0, -7.0), (100.0, math.inf), 1e-5, -12.0),
}
#: Decades back to the first layer within a block.
HEALTHY_LAYER_GAIN = (-5.0, 3.0)
MIN_LAYER_GAIN = -6.0
#: Growth through time, in decades, from which on the first steps get all of the gradient.
MAX_RECURRENT_GAIN = 3.0
#: Shares of dead units and of saturated outputs: warn above the first, fail from the second on.
DEAD_SHARES = (0.9, 1.0)
SATURATED_SHARES = (0.7, 0.9)
#: A single layer is at fault if it changes gradients by more than this many decades.
MAX_LAYER_CHANGE = 0.2
#: Gradients that differ by less than this share are equal.
EQUAL = 1e-3
#: Ratio to the loss of a uniform guess above which the loss is a finding.
MAX_LOSS_RATIO = 1.2


def check(
    module: nn.Module, run_loss: Callable[[], Tensor], *, scale_free: bool = False
) -> tuple[list[Finding], dict[str, float]]:
    """Checks that a freshly initialized network can train, and tries cures on the batch.

    Args:
        module: The network.
        run_loss: Computes the training loss of one batch with it.
        scale_free: True if the optimizer normalizes gradients, as Adam does, so that exploding gradients are
            no failure.

    Returns:
        Findings, the worst first, and every measured value by `<criterion>/<module>`.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch, target = torch.randn(32, 4), torch.randint(2, (32,))
        >>> findings, values = check(
        ...     network, lambda: nn.functional.cross_entropy(network(batch), target)
        ... )
        >>> [finding for finding in findings if finding.severity == "fail"]
        []

    References:
        Schoenholz, Gilmer, Ganguli, Sohl-Dickstein, Deep Information Propagation, 2017,
        arXiv:1611.01232. He, Zhang, Ren, Sun, Delving Deep into Rectifiers, 2015, arXiv:1502.01852.
    """

    def measure_under(change: AbstractContextManager[None]) -> list[Finding]:
        with change:
            return measure(module, run_loss, scale_free=scale_free)[0]

    findings, measured = measure(module, run_loss, scale_free=scale_free)
    return with_cures(module, run_loss, findings, measured, measure_under)[0], values_of(measured)


def measure(
    module: nn.Module, run_loss: Callable[[], Tensor], *, scale_free: bool
) -> tuple[list[Finding], SignalPropagation | None]:
    """Measures a network on one batch: findings without cures, and signals, unless weights are nonfinite."""
    findings = check_weights(module)
    if any(finding.criterion == "nonfinite_weights" for finding in findings):
        return findings, None
    measured = propagate(module, run_loss)
    constant = _check_constant(measured, scale_free=scale_free)
    findings += constant
    bounds = BOUNDS[scale_free]
    findings += _check_activations(measured)
    findings += _check_gradients(measured)
    if not any(finding.criterion in ("nonfinite_input", "nonfinite_gradients") for finding in findings):
        # behind nonfinite values they are unknown, and behind zeros that move until these have moved; a head
        # of zeros is behind none of what is measured
        zeros = [f for f in constant if f.module != measured.layers[-1].name]
        if not (zeros and _is_blocked(measured) and all(f.severity == "info" for f in zeros)):
            later = any(f.severity == "warn" for f in constant)
            findings += _check_gains(measured, bounds, passes_later=later)
        findings += _check_recurrence(measured, bounds, scale_free=scale_free)
    findings += _check_loss(measured, bounds)
    return sorted(findings, key=lambda f: SEVERITIES.index(f.severity)), measured


def _check_constant(measured: SignalPropagation, *, scale_free: bool) -> list[Finding]:
    """Finds weights that are all zero, a failure where they get no gradient and the first layer gets none.

    Those that get one move in the first step, and let gradients pass from then on, as in an adapter. It is a
    warning where steps do not shrink with gradients, and biases give the last layer an input: each step then
    moves one layer more.
    """
    findings = []
    first = next((g for g in measured.gradients.values() if g is not None), None)
    is_head_zero = bool(measured.layers) and not bool(measured.layers[-1].module.weight.detach().any())
    # a head of zeros moves in the first step, and lets gradients pass from then on
    passes_later = is_head_zero and measured.block_gain is not None and not _is_blocked(measured)
    is_blocked = first is not None and not bool(first.any()) and not passes_later
    blocked: Severity = "warn" if scale_free and _last_inputs_differ(measured) else "fail"
    for layer in measured.layers:
        weight = layer.module.weight.detach()
        if weight.numel() > 1 and bool((weight == 0).all()):
            gradient = measured.gradients.get(f"{layer.name}.weight")
            moves = gradient is not None and bool(gradient.any())
            last = layer is measured.layers[-1]
            severity = blocked if is_blocked and not (last or moves) else "info"
            findings.append(Finding("zero_weights", layer.name, 0.0, "std > 0", severity))
    return findings


def _last_inputs_differ(measured: SignalPropagation) -> bool:
    """True if gradients of the last layer differ from one of its inputs to another."""
    gradient = measured.gradients.get(f"{measured.layers[-1].name}.weight") if measured.layers else None
    if gradient is None:
        return False
    sizes = gradient.transpose(0, 1).flatten(1).norm(dim=1)
    return float(sizes.max() - sizes.min()) > EQUAL * float(sizes.max())


def _is_blocked(measured: SignalPropagation) -> bool:
    """True if nothing gets from the last layer back to the first."""
    return measured.block_gain is not None and measured.block_gain <= ZERO_GAIN


def _check_gradients(measured: SignalPropagation) -> list[Finding]:
    """Finds gradients that are nonfinite although the loss is finite."""
    found = [
        bool(gradient.isfinite().all()) for gradient in measured.gradients.values() if gradient is not None
    ]
    if all(found) or not math.isfinite(measured.loss):
        return []
    share, cure = found.count(False) / len(found), "check the loss for a root, a norm or a log of 0"
    return [Finding("nonfinite_gradients", "", share, "0%", "fail", cure)]


def _check_loss(measured: SignalPropagation, bounds: Bounds) -> list[Finding]:
    if not math.isfinite(measured.loss):
        return [
            Finding("loss", "", measured.loss, "finite", "fail", "check the batch, the labels and the loss")
        ]
    guess = measured.constant if measured.n_classes is None else math.log(measured.n_classes)
    if not guess:
        return []
    ratio = measured.loss / guess
    if ratio <= MAX_LOSS_RATIO:
        return []
    name = measured.layers[-1].name if measured.layers else ""
    severity = _severity(ratio, bounds.loss) if measured.constant is None else "info"
    return [Finding("loss_over_guessing", name, ratio, f"<= {MAX_LOSS_RATIO}", severity)]


def _severity(value: float, bounds: tuple[float, float]) -> Severity:
    """Returns the severity of a value by its bounds, which are lower ones if they fall."""
    warn, fail = bounds
    sign = 1 if fail > warn else -1
    return "fail" if sign * value >= sign * fail else "warn" if sign * value >= sign * warn else "info"


def _check_activations(measured: SignalPropagation) -> list[Finding]:
    findings = []
    for layer in measured.layers:
        if not bool(torch.isfinite(layer.output).all()):
            worst = math.nan if bool(layer.output.isnan().any()) else math.inf
            is_given = not (layer.has_finite_input or math.isfinite(measured.loss))
            criterion = "nonfinite_input" if is_given else "nonfinite_output"
            findings.append(Finding(criterion, layer.name, worst, "finite", "fail"))
            break
        for criterion, value, (warn, fail) in (
            ("dead_units", layer.dead, DEAD_SHARES),
            ("saturated_units", layer.saturated, SATURATED_SHARES),
        ):
            if value is not None and value > warn:
                severity: Severity = "fail" if value >= fail else "warn"
                is_first = severity == "warn" and layer is measured.layers[0]
                if criterion == "saturated_units" and (is_first or layer.is_gate):
                    severity = "info"  # no gradient has to pass it on its way to other layers
                findings.append(Finding(criterion, layer.name, value, f"< {warn:.0%}", severity))
    return findings


def _check_gains(measured: SignalPropagation, bounds: Bounds, *, passes_later: bool) -> list[Finding]:
    layers = [layer for layer in measured.layers if layer.gain is not None]
    if len(layers) < 2 or measured.block_gain is None:
        return []
    block = measured.block_gain
    gain = layers[0].gain or 0.0
    if gain <= ZERO_GAIN:
        gain = block  # a zero branch propagates nothing back; the path around it counts
    severity = _severity(block, bounds.vanishing if block < 0 else bounds.exploding)
    is_lost = measured.variation < bounds.variation or min(block, gain) <= bounds.lost
    if not (math.isfinite(gain) and math.isfinite(block)):
        severity = "fail"
    elif block < 0 and (severity == "fail" or gain <= MIN_LAYER_GAIN):
        severity = "fail" if is_lost and not passes_later else "warn"
    elif severity == "info":
        if HEALTHY_LAYER_GAIN[0] < gain < HEALTHY_LAYER_GAIN[1]:
            return []
        severity = "warn"
    expected = f"{bounds.vanishing[0]:g} .. {bounds.exploding[0]:g}"
    if bounds.exploding[1] == math.inf and block > 0:
        expected += " (SGD is unlikely to train, Adam may)"
    findings = [Finding("gradient_gain", "", block, expected, severity)]
    for layer, after in zip(layers, layers[1:], strict=False):
        change = (layer.gain or 0.0) - (after.gain or 0.0)
        if abs(change) > MAX_LAYER_CHANGE and change * block > 0:
            # between two outputs are the activation of the first layer and the weight of the second
            findings.append(Finding("layer_gain", after.name, change, "-0.2 .. 0.2", severity))
    return findings


def _check_recurrence(measured: SignalPropagation, bounds: Bounds, *, scale_free: bool) -> list[Finding]:
    findings, usual = [], f"{bounds.through_time[0]:g} .. {MAX_RECURRENT_GAIN:g}"
    for name, gain in measured.recurrent_gains.items():
        if math.isfinite(gain) and bounds.through_time[0] <= gain <= MAX_RECURRENT_GAIN:
            continue
        severity: Severity = "warn" if scale_free else "fail"
        if gain < 0:
            # the first steps may reach the loss otherwise, as where it has a term for each step
            of_loss = max(gain, measured.recurrent_losses.get(name, gain))
            severity = _severity(of_loss, bounds.through_time)
        why = " (here the loss reaches the first steps by other paths, too)" if severity == "info" else ""
        findings.append(Finding("gain_through_time", name, gain, usual + why, severity))
    return findings


def values_of(measured: SignalPropagation | None) -> dict[str, float]:
    """Returns every measured value by `<criterion>/<module>`."""
    if measured is None:
        return {}
    values = {"loss": measured.loss}
    if measured.block_gain is not None:
        values["gradient_gain"] = measured.block_gain
    for layer in measured.layers:
        of_layer = {"layer_gain": layer.gain, "dead_units": layer.dead, "saturated_units": layer.saturated}
        values |= {f"{name}/{layer.name}": value for name, value in of_layer.items() if value is not None}
    return values | {f"gain_through_time/{name}": gain for name, gain in measured.recurrent_gains.items()}


def check_weights(module: nn.Module) -> list[Finding]:
    """Checks without a batch for nonfinite weights, and for units that are copies of each other."""
    return nonfinite_weights(module) or copied_units(module)


def nonfinite_weights(module: nn.Module) -> list[Finding]:
    """Returns a finding for each layer with nonfinite weights, in the local shard of sharded ones."""
    findings = []
    for name, parameter in module.named_parameters():
        owner, _, _ = name.rpartition(".")
        finite = torch.isfinite(local_shard(parameter.detach()))
        if not bool(finite.all()):
            share = 1 - float(finite.float().mean())
            findings.append(Finding("nonfinite_weights", owner, share, "0", "fail"))
    return findings


def copied_units(
    module: nn.Module, whole: Callable[[Tensor], Tensor] = lambda weight: weight
) -> list[Finding]:
    """Returns a finding for each layer that has units with the same weights.

    Args:
        module: The network.
        whole: Returns the whole of a weight that is sharded over ranks.
    """
    findings = []
    for name, layer in module.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        weight = whole(layer.weight.detach())
        if bool(weight.any()) and (copies := _equal_rows(weight)) > 0:
            findings.append(Finding("symmetric_units", name, copies, "0", "fail"))
    return findings


def _equal_rows(weight: Tensor) -> int:
    """Counts rows that equal another row, by their projections on a random vector."""
    rows = weight.flatten(1)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64).to(rows.device)
    projections = (rows.double() @ direction).sort().values
    return int((projections.diff() == 0).sum())
