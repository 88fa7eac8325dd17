"""Criteria that a freshly initialized network must meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_gradguard.core.initialization.probe import LAYERS, NOTHING, RECTIFIERS, Probe, probe
from lightning_gradguard.core.norms import local_shard

Severity = Literal["info", "warn", "fail"]
#: Decades of gradient gain from the last hidden layer back to the first block or layer. Measured on 294
#: networks: within WARN 3 % fail to train, beyond FAIL 90 %.
WARN_BLOCK = (-2.0, 2.0)
WARN_LAYER = (-5.0, 3.0)
FAIL_BLOCK = 4.0
FAIL_LAYER = -6.0
#: Decades through time beyond which no recurrent network in the experiment learned a long dependency.
RECURRENT_DECADES = 3.0
#: Share of units that are dead, of outputs that are saturated: warn above, fail at.
DEAD = (0.9, 1.0)
SATURATED = (0.3, 0.9)
#: A layer of its own is at fault if it changes gradients by more than this many decades.
LAYER_DECADES = 0.2
#: Loss beside that of guessing: worth a word above.
LOSS_RATIO = 1.2


class InitializationError(RuntimeError):
    """The network, as it is initialized, will not train."""


@dataclass(frozen=True)
class Finding:
    """One criterion that one module does not meet.

    Args:
        criterion: Its name.
        module: The module at fault; empty for the whole network.
        value: What was measured.
        expected: What a healthy network shows.
        severity: `"fail"` will not train, `"warn"` may not, `"info"` is worth knowing.
        cure: The line of code that cures it.
    """

    criterion: str
    module: str
    value: float
    expected: str
    severity: Severity
    cure: str


def check(
    module: nn.Module, run_loss: Callable[[], Tensor], *, scale_free: bool = False
) -> tuple[list[Finding], dict[str, float]]:
    """Check whether a network, as it is initialized, can train.

    Args:
        module: The network.
        run_loss: Computes the training loss of one batch with it.
        scale_free: Whether the optimizer divides gradients by their size, as Adam does: exploding gradients
            are then no failure.

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
    findings = check_weights(module)
    if any(finding.criterion == "nonfinite_weights" for finding in findings):
        return findings, {}
    seen = probe(module, run_loss)
    findings += _judge_constant(seen)
    findings += _judge_loss(module, seen)
    findings += _judge_activations(seen)
    findings += _judge_gains(seen, scale_free=scale_free)
    findings += _judge_recurrence(seen, scale_free=scale_free)
    order: Sequence[Severity] = ("fail", "warn", "info")
    return sorted(findings, key=lambda f: order.index(f.severity)), _values(seen)


def check_weights(module: nn.Module) -> list[Finding]:
    """What can be told without a batch: nonfinite weights, and units that are copies of each other.

    Args:
        module: The network.
    """
    return nonfinite_weights(module) or copied_units(module)


def nonfinite_weights(module: nn.Module) -> list[Finding]:
    """The layers with weights that are nonfinite; with the local shards, where weights are sharded."""
    findings = []
    for name, parameter in module.named_parameters():
        owner, _, _ = name.rpartition(".")
        finite = torch.isfinite(local_shard(parameter.detach()))
        if not bool(finite.all()):
            share = 1 - float(finite.float().mean())
            cure = f"model.{owner}.reset_parameters()" if owner else f"model.{name} = ..."
            findings.append(Finding("nonfinite_weights", owner, share, "0", "fail", cure))
    return findings


def copied_units(
    module: nn.Module, whole: Callable[[Tensor], Tensor] = lambda weight: weight
) -> list[Finding]:
    """The layers that have units with the same weights.

    Args:
        module: The network.
        whole: Puts together the weight of a layer, of which ranks hold parts.
    """
    findings = []
    for name, layer in module.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        weight = whole(layer.weight.detach())
        if bool(weight.any()) and (copies := _equal_rows(weight)) > 0:
            findings.append(Finding("symmetric_units", name, copies, "0", "fail", _cure(name, "relu")))
    return findings


def table(findings: Sequence[Finding]) -> str:
    """Findings as a table for people: layer, criterion, measured, expected, cure."""
    head = ("", "layer", "criterion", "measured", "expected", "cure")
    rows = [
        (f.severity.upper(), f.module or "(network)", f.criterion, f"{f.value:.3g}", f.expected, f.cure)
        for f in findings
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in (head, *rows)
    )


def _judge_constant(seen: Probe) -> list[Finding]:
    """Weights that are all the same; zeros are a habit at the end of a residual branch or a network."""
    findings = []
    first = next((g for g in seen.gradients.values() if g is not None), None)
    head_is_zero = bool(seen.layers) and not bool(seen.layers[-1].module.weight.detach().any())
    blocked = first is not None and not bool(first.any()) and not head_is_zero
    for layer in seen.layers:
        weight = layer.module.weight.detach()
        if weight.numel() > 1 and bool((weight == 0).all()):
            last = layer is seen.layers[-1]
            severity: Severity = "fail" if blocked and not last else "info"
            cure = _cure(layer.name, layer.activation)
            findings.append(Finding("zero_weights", layer.name, 0.0, "std > 0", severity, cure))
    return findings


def _judge_loss(module: nn.Module, seen: Probe) -> list[Finding]:
    if not math.isfinite(seen.loss):
        return [Finding("loss", "", seen.loss, "finite", "fail", "check the batch, the labels and the loss")]
    if seen.n_classes is None or seen.n_classes < 2:
        return []
    ratio = seen.loss / math.log(seen.n_classes)
    if ratio <= LOSS_RATIO:
        return []
    normalized = any(isinstance(m, nn.LayerNorm) for m in module.modules())
    severity: Severity = "warn" if normalized and ratio > 2.2 else "info"
    name = seen.layers[-1].name if seen.layers else ""
    cure = f"nn.init.normal_(model.{name}.weight, std=0.02)"
    return [Finding("loss_over_guessing", name, ratio, f"<= {LOSS_RATIO}", severity, cure)]


def _judge_activations(seen: Probe) -> list[Finding]:
    findings = []
    for layer in seen.layers:
        if not bool(torch.isfinite(layer.output).all()):
            cure = _cure(layer.name, layer.activation)
            worst = math.nan if bool(layer.output.isnan().any()) else math.inf
            findings.append(Finding("nonfinite_output", layer.name, worst, "finite", "fail", cure))
            break
        for criterion, value, (warn, fail) in (
            ("dead_units", layer.dead, DEAD),
            ("saturated_units", layer.saturated, SATURATED),
        ):
            if value is not None and value > warn:
                severity: Severity = "fail" if value >= fail else "warn"
                cure = _cure(layer.name, layer.activation)
                findings.append(Finding(criterion, layer.name, value, f"< {warn}", severity, cure))
    return findings


def _judge_gains(seen: Probe, *, scale_free: bool) -> list[Finding]:
    layers = [layer for layer in seen.layers if layer.gain is not None]
    if len(layers) < 2 or seen.block_gain is None:
        return []
    block = seen.block_gain
    gain = layers[0].gain or 0.0
    if gain <= NOTHING:
        gain = block  # a branch that starts at zero sends nothing back; what goes around it tells
    if not (math.isfinite(gain) and math.isfinite(block)):
        severity: Severity = "fail"
    elif abs(block) >= FAIL_BLOCK or gain <= FAIL_LAYER:
        severity = "warn" if scale_free and block > 0 else "fail"
    elif not (WARN_BLOCK[0] < block < WARN_BLOCK[1] and WARN_LAYER[0] < gain < WARN_LAYER[1]):
        severity = "warn"
    else:
        return []
    expected = f"{WARN_BLOCK[0]:g} .. {WARN_BLOCK[1]:g}"
    if scale_free and block > 0:
        expected += " (SGD is unlikely to train, Adam may)"
    word = "vanishes" if block < 0 else "explodes"
    findings = [Finding("gradient_gain", "", block, expected, severity, f"the gradient {word}; see below")]
    for layer, after in zip(layers, layers[1:], strict=False):
        change = (layer.gain or 0.0) - (after.gain or 0.0)
        if abs(change) > LAYER_DECADES and change * block > 0:
            # what lies between two outputs is the activation of the first and the weight of the second
            cure = _cure(after.name, layer.activation)
            findings.append(Finding("layer_gain", after.name, change, "-0.2 .. 0.2", severity, cure))
    return findings


def _judge_recurrence(seen: Probe, *, scale_free: bool) -> list[Finding]:
    findings = []
    for name, gain in seen.recurrent_gains.items():
        if math.isfinite(gain) and abs(gain) <= RECURRENT_DECADES:
            continue
        explodes = not gain < 0
        severity: Severity = "fail" if explodes and not scale_free else "warn" if explodes else "info"
        cure = f"nn.init.orthogonal_(model.{name}.weight_hh_l0)"
        findings.append(Finding("gain_through_time", name, gain, "-3 .. 3", severity, cure))
    return findings


def _values(seen: Probe) -> dict[str, float]:
    values = {"loss": seen.loss}
    if seen.block_gain is not None:
        values["gradient_gain"] = seen.block_gain
    for layer in seen.layers:
        for criterion, value in (
            ("layer_gain", layer.gain),
            ("dead_units", layer.dead),
            ("saturated_units", layer.saturated),
        ):
            if value is not None:
                values[f"{criterion}/{layer.name}"] = value
    for name, gain in seen.recurrent_gains.items():
        values[f"gain_through_time/{name}"] = gain
    return values


def _equal_rows(weight: Tensor) -> int:
    """How many rows have an equal among the others, found by their projection on a random vector."""
    rows = weight.flatten(1)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64).to(rows.device)
    shadows = (rows.double() @ direction).sort().values
    return int((shadows.diff() == 0).sum())


def _cure(name: str, activation: str | None) -> str:
    target = f"model.{name}.weight" if name else "model.weight"
    if activation in RECTIFIERS:
        return f"nn.init.kaiming_normal_({target}, nonlinearity='relu')"
    if activation == "tanh":
        return f"nn.init.orthogonal_({target}, gain=nn.init.calculate_gain('tanh'))"
    if activation == "sigmoid":
        return f"nn.init.xavier_normal_({target})  # better: ReLU, or normalization before the sigmoid"
    return f"nn.init.xavier_normal_({target})"
