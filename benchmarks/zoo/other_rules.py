"""Other ways to tell at step 0 that a network will not train, as their authors publish them.

Each returns a score, which is above its threshold where the rule fires; the area under its curve needs no
threshold. What needs more than one step, as an accuracy that does not rise, cannot be computed at step 0.

References:
    Zhang, Zhai, Ma, Shen, AUTOTRAINER: An Automatic DNN Training Problem Detection and Repair System, 2021.
    Wardat, Le, Rajan, DeepLocalize: Fault Localization for Deep Neural Networks, 2021, arXiv:2103.03376.
    Wardat, Cruz, Le, Rajan, DeepDiagnosis: Automatically Diagnosing Faults and Recommending Actionable Fixes
    in Deep Learning Programs, 2022, arXiv:2112.04039.
    Rauschmayr et al., Amazon SageMaker Debugger: A System for Real-Time Insights into Machine Learning Model
    Training, 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

#: Modules whose outputs the rules look at.
_ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SELU, nn.ELU, nn.SiLU, nn.LeakyReLU, nn.Hardtanh)
_INFINITE = 1e9


@dataclass
class Numbers:
    """What the rules need of one batch.

    Args:
        loss: The loss over that of a uniform guess.
        outputs: Root mean square of the output of each layer.
        gradients: Norm, mean magnitude and share of zeros of the gradient of each matrix.
        weights: Variance of each matrix.
        inactive: Share of outputs at or below 0 of each rectifier.
        saturated: Share of outputs at either end of each sigmoid and tanh.
        is_finite: False if anything is nonfinite.
        has_zeros: True if an output, a weight or a gradient is all zero.
    """

    loss: float = 0.0
    outputs: list[float] = field(default_factory=list)
    gradients: list[tuple[float, float, float]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    inactive: list[float] = field(default_factory=list)
    saturated: list[float] = field(default_factory=list)
    is_finite: bool = True
    has_zeros: bool = False


def numbers(network: nn.Module, x: Tensor, y: Tensor) -> Numbers:
    """Runs one batch."""
    found = Numbers()

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        output = output.detach()
        found.is_finite &= bool(output.isfinite().all())
        found.has_zeros |= not bool(output.any())
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.RNNBase)):
            found.outputs.append(float(output.double().square().mean().sqrt()))
        elif isinstance(module, (nn.ReLU, nn.LeakyReLU)):
            found.inactive.append(float((output <= 0).float().mean()))
        elif isinstance(module, (nn.Tanh, nn.Sigmoid)):
            centred = output if isinstance(module, nn.Tanh) else 2 * output - 1
            found.saturated.append(float((centred.abs() > 0.95).float().mean()))

    kinds = (*_ACTIVATIONS, nn.Linear, nn.Conv2d, nn.RNNBase)
    handles = [m.register_forward_hook(see) for m in network.modules() if isinstance(m, kinds)]
    output = network(x)
    loss = functional.cross_entropy(output, y)
    loss.backward()
    for handle in handles:
        handle.remove()
    found.loss = float(loss.detach()) / math.log(output.shape[1])
    for weight in network.parameters():
        if weight.ndim > 1 and weight.grad is not None:
            g = weight.grad.double()
            found.gradients.append((float(g.norm()), float(g.abs().mean()), float((g == 0).double().mean())))
            found.weights.append(float(weight.detach().double().var()))
            found.is_finite &= bool(g.isfinite().all())
            found.has_zeros |= not bool(g.any()) or not bool(weight.detach().any())
    found.is_finite &= math.isfinite(found.loss)
    return found


def loss_at_start(n: Numbers) -> float:
    """Fires above 1.2 times the loss of a uniform guess."""
    return (n.loss if n.is_finite else _INFINITE) / 1.2


def forward_variance(n: Numbers) -> float:
    """Fires if outputs grow or shrink tenfold between the first and the last hidden layer."""
    hidden = n.outputs[:-1]
    return abs(_log(hidden[-1]) - _log(hidden[0])) if n.is_finite and len(hidden) > 1 else _unknown(n)


def autotrainer(n: Numbers) -> float:
    """Fires if the gradient of the first matrix is 1e-3 or 70 of the last, or 70 % of the gradients are 0.

    The condition that the first gradient is below 1e-4 as well is omitted, in its favour.
    """
    if not n.is_finite or n.loss * math.log(10) > 1e3:
        return _INFINITE
    ratio = _log(n.gradients[0][0]) - _log(n.gradients[-1][0])
    dead = max(share for *_, share in n.gradients) / 0.7
    return max(-ratio / 3, ratio / math.log10(70), dead if dead >= 1 else 0.0)


def sagemaker(n: Numbers) -> float:
    """Fires by its rules on vanishing and nonfinite tensors, poor weights, dead units and saturation."""
    if not n.is_finite:
        return _INFINITE
    smallest = min(mean for _, mean, _ in n.gradients)
    spread = _log(max(n.weights)) - _log(min(n.weights))
    dead = max(n.inactive, default=0.0)
    saturated = max(n.saturated, default=0.0)
    return max(_log(smallest) / -7, spread, dead / 0.5 if dead > 0.5 else 0.0, saturated / 0.5)


def deeplocalize(n: Numbers) -> float:
    """Fires if an output, the loss, a weight or a gradient is nonfinite or all zero."""
    return _INFINITE if not n.is_finite else 2.0 * n.has_zeros


def deepdiagnosis(n: Numbers) -> float:
    """Fires if a tensor is nonfinite, units are dead or saturated, or the mean gradient is below 1e-7."""
    if not n.is_finite:
        return _INFINITE
    smallest = min(mean for _, mean, _ in n.gradients)
    return max(_log(smallest) / -7, max(n.inactive, default=0.0) / 0.7, max(n.saturated, default=0.0) / 0.5)


RIVALS = {
    "loss at the start": loss_at_start,
    "forward variance": forward_variance,
    "AUTOTRAINER": autotrainer,
    "SageMaker Debugger": sagemaker,
    "DeepLocalize": deeplocalize,
    "DeepDiagnosis": deepdiagnosis,
}


def _log(value: float) -> float:
    return math.log10(max(value, 1e-45))


def _unknown(n: Numbers) -> float:
    return 0.0 if n.is_finite else _INFINITE
