"""Cures of findings: code that is tried on the batch before it is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_gradguard.core.initialization.findings import SEVERITIES, Finding, fails
from lightning_gradguard.core.initialization.products import MeansOfNeighbours, NormalizedFactors
from lightning_gradguard.core.initialization.propagation import (
    SATURATING,
    ZERO_GAIN,
    Layer,
    SignalPropagation,
)
from lightning_gradguard.core.initialization.trials import (
    Gated,
    Initializers,
    Normalized,
    Rectified,
    Repaired,
    Trial,
    Zeroed,
    embedding_lines,
    feed_forward_line,
    recurrent_lines,
    smaller_lines,
    zero_line,
)
from lightning_gradguard.core.parameter_names import code_of
from lightning_gradguard.core.snapshots import preserve_state, preserve_weights

#: A gain of this share of that before is better, where nothing brings it to what is usual.
_BETTER = 0.5
_NOT_FOUND = (
    "nothing that was tried betters it (initializers, LSUV, ReLU, normalization); try fewer layers "
    "or residual connections"
)
_NO_GRADIENT = (
    "no initialization betters it, the gradient is exactly zero: look for an operation that passes none, "
    "such as a clamp whose argument lies beyond its bounds, round, sign, argmax or a comparison, or a factor "
    "of 0"
)
#: Normalizing what comes beside it betters a gain, and does not train such a network.
_KEPT = (
    "no initialization betters it: residual blocks multiply what passes them by {:.3g}; return x + f(x) from "
    "forward, without a factor of x and of the sum, and begin with branches of zero"
)
#: What remains for criteria that none of these is for.
_NOT_FOUND_FOR = {
    "gain_through_time": "nothing that was tried betters it (initializers, an LSTM); try shorter sequences",
    "loss_over_guessing": (
        "smaller weights of the last layer do not better it; compare the scale of the answers with that of "
        "the targets"
    ),
    "nonfinite_input": (
        "no initialization helps, the values are nonfinite before this layer: check the batch, and the code "
        "before it for a division by 0, a log or root of 0, or exp of a large number"
    ),
    "nonfinite_output": (
        "no initializer that was tried betters it: look in this layer for a division by 0, as by the norm of "
        "weights of zero, for a number that code writes, and for values beyond the range of the dtype"
    ),
}


def with_cures(
    module: nn.Module,
    run_loss: Callable[[], Tensor],
    findings: Sequence[Finding],
    measured: SignalPropagation | None,
    measure: Callable[[AbstractContextManager[None]], Sequence[Finding]],
) -> tuple[list[Finding], list[Trial]]:
    """Returns the findings with the code that betters them, each found by a trial on the batch.

    The second are the trials of those that fail. Trials in turn: initializers for the kind of each layer and
    the activation after it, scaling to unit variance (LSUV), a change of architecture. The weights are
    restored bit for bit.
    """
    uncured = [
        f for f in findings if not f.cure and (f.severity != "info" or f.criterion == "loss_over_guessing")
    ]
    best: dict[Finding, _Result] = {}
    for trial in _trials(module, run_loss, uncured, measured):
        if all(f in best and best[f].passes for f in uncured):
            break
        after = _findings_of(trial, module, measure)
        if after is None or _worst(after) < _worst(findings):
            continue
        for finding in uncured:
            result = _Result.of(finding, after, trial)
            if result is not None and (finding not in best or result.is_better_than(best[finding])):
                best[finding] = result
    # the gains of layers are parts of that of the network: they have the same cure
    whole = next((best[f] for f in uncured if f.criterion == "gradient_gain" and f in best), None)
    cured: list[Finding] = []
    trials: dict[int, Trial] = {}
    for finding in findings:
        result = whole if finding.criterion == "layer_gain" else best.get(finding)
        is_of_loss = finding.criterion == "loss_over_guessing"
        if is_of_loss and measured is not None and measured.constant is not None and result is None:
            continue  # the targets may be far from 0
        if finding not in uncured:
            cured.append(replace(finding, cure=finding.cure or "none needed"))
        elif (
            measured is not None and measured.kept < 1 and "_gain" in finding.criterion and finding.value < 0
        ):
            cured.append(replace(finding, cure=_KEPT.format(measured.kept)))
        elif result is None:
            is_zero = finding.criterion.endswith("_gain") and finding.value < ZERO_GAIN / 2
            text = _NO_GRADIENT if is_zero else _NOT_FOUND_FOR.get(finding.criterion, _NOT_FOUND)
            cured.append(replace(finding, cure=text))
        else:
            line = result.trial.describe(finding, result.change)
            if finding.severity == "fail" and not isinstance(result.trial, Gated):  # no optimizer has that
                trials[id(result.trial)] = result.trial
            cured.append(replace(finding, cure=line, is_tried=True))
    return cured, [*trials.values()]


@dataclass(frozen=True)
class _Result:
    """Improvement of a finding under a trial."""

    trial: Trial
    change: str
    passes: bool
    value: float

    @classmethod
    def of(cls, finding: Finding, after: Sequence[Finding], trial: Trial) -> _Result | None:
        """Returns the result of a trial; `None` if the finding is no better."""
        now = next((f for f in after if (f.criterion, f.module) == (finding.criterion, finding.module)), None)
        if now is None:
            usual = finding.expected.partition(" (")[0]
            return cls(trial, f"{finding.criterion} is as usual, {usual}", passes=True, value=0.0)
        is_ratio = "gain" in finding.criterion or finding.criterion == "loss_over_guessing"
        is_closer = is_ratio and abs(now.value) <= _BETTER * abs(finding.value)
        if SEVERITIES.index(now.severity) <= SEVERITIES.index(finding.severity) and not is_closer:
            return None
        change = f"{finding.criterion} is {now.measured}, not {finding.measured}"
        return cls(trial, change, passes=False, value=abs(now.value))

    def is_better_than(self, other: _Result) -> bool:
        """True if the finding passes under this trial alone, or is closer to it."""
        return (not self.passes, self.value) < (not other.passes, other.value)


def improves(before: Sequence[Finding], after: Sequence[Finding]) -> bool:
    """True if findings are fewer or less severe than before, or a gain is much closer to what is usual."""
    counts = [[sum(f.severity == s for f in found) for s in SEVERITIES[:2]] for found in (before, after)]
    if counts[0] != counts[1]:
        return counts[1] < counts[0]
    worst = {f.criterion: abs(f.value) for f in after}
    gains = [f for f in before if f.criterion in ("gradient_gain", "gain_through_time")]
    return any(worst.get(f.criterion, 0.0) <= _BETTER * abs(f.value) for f in gains)


def _worst(findings: Sequence[Finding]) -> int:
    return min((SEVERITIES.index(f.severity) for f in findings), default=len(SEVERITIES))


def _findings_of(
    trial: Trial, module: nn.Module, measure: Callable[[AbstractContextManager[None]], Sequence[Finding]]
) -> Sequence[Finding] | None:
    """Returns the findings under a trial; `None` if it does not fit the network."""
    with preserve_weights(module), preserve_state(module):
        torch.manual_seed(0)
        try:
            return measure(trial.applied())
        except Exception:  # the trial is ours, and its failure no fault of the network
            return None


def _trials(
    module: nn.Module,
    run_loss: Callable[[], Tensor],
    findings: Sequence[Finding],
    measured: SignalPropagation | None,
) -> Iterator[Trial]:
    """Yields what is tried, the smallest change first."""
    if any(f.criterion == "nonfinite_weights" for f in findings):
        yield Initializers(module, {f.module: _reset_line(module, f.module) for f in findings})
    if measured is None:
        return
    for finding in findings:
        if finding.criterion == "loss_over_guessing":
            factors = NormalizedFactors(measured.n_classes or 0)
            yield factors
            if factors.has_product:  # smaller weights on both sides of it do not train
                continue
            weight = f"{code_of(finding.module, module)}.weight"
            yield Initializers(module, {finding.module: f"nn.init.normal_({weight}, std=0.02)"})
            yield Zeroed(module, {finding.module: f"nn.init.zeros_({weight})"}, run_loss)
            if lines := embedding_lines(module):
                yield Initializers(module, lines)
    others = [f for f in findings if f.criterion != "loss_over_guessing"]
    yield from _of_layers(module, run_loss, others, measured)
    yield from _of_recurrences(module, others, measured)


def _of_layers(
    module: nn.Module,
    run_loss: Callable[[], Tensor],
    findings: Sequence[Finding],
    measured: SignalPropagation,
) -> Iterator[Trial]:
    """Yields initializers of the layers at fault, or of all hidden ones, then repairs and other layers."""
    gains = [f.value for f in findings if f.criterion == "gradient_gain"]
    named = {f.module for f in findings}
    hidden = measured.layers[:-1]
    by_name = {layer.name: layer for layer in measured.layers}
    chosen = [layer for layer in by_name.values() if layer.name in named]
    if gains and len(chosen) > len(hidden) / 2:
        chosen = hidden
    if max(gains, default=0.0) > 0:  # normalization of such a network does not train it
        yield MeansOfNeighbours()
    if measured.branches and max(gains, default=0.0) > 0:
        yield Initializers(module, {x.name: zero_line(module, x) for x in measured.branches})
    for bias in (False, True):
        if chosen:
            lines = {layer.name: feed_forward_line(module, layer, bias=bias) for layer in chosen}
            yield Initializers(module, lines)
    if gains and chosen != hidden:
        chosen = hidden
        yield Initializers(module, {x.name: feed_forward_line(module, x, bias=True) for x in hidden})
    if lines := smaller_lines(module, findings):
        yield Initializers(module, lines)
    if chosen := [layer for layer in chosen if layer in hidden]:
        if fails(findings):  # else nothing is repaired
            yield Repaired(module, run_loss, [layer.name for layer in chosen])
        yield from _changes_of_architecture(module, chosen)


def _of_recurrences(
    module: nn.Module, findings: Sequence[Finding], measured: SignalPropagation
) -> Iterator[Trial]:
    """Yields gated cells, and initializers of recurrent weights; of the two, gates first if it vanishes."""
    named = {f.module for f in findings}
    vanishes = any(f.criterion == "gain_through_time" and f.value < 0 for f in findings)
    for name, n_steps in measured.recurrent_steps.items():
        if name not in named:
            continue
        recurrent = module.get_submodule(name)
        assert isinstance(recurrent, (nn.RNNBase, nn.RNNCellBase))
        gated: list[Trial] = []
        if isinstance(recurrent, (nn.RNN, nn.GRU)):
            gated.append(Gated(module, name, recurrent, n_steps))
        lines = recurrent_lines(module, name, recurrent, n_steps)
        initialized: list[Trial] = [Initializers(module, {name: line}) for line in lines]
        # an LSTM learns in fewer steps: docs/callbacks/initialization_check.md
        yield from [*gated, *initialized] if vanishes else [*initialized, *gated]


def _changes_of_architecture(module: nn.Module, layers: Sequence[Layer]) -> Iterator[Trial]:
    if saturating := [layer for layer in layers if layer.activation in SATURATING]:
        yield Rectified(module, saturating)
        yield Rectified(module, saturating, normalized=True)
    yield Normalized(module, layers)


def _reset_line(module: nn.Module, name: str) -> str:
    target = code_of(name, module)
    if hasattr(module.get_submodule(name), "reset_parameters"):
        return f"{target}.reset_parameters()"
    return f"[nn.init.normal_(p, std=0.02) for p in {target}.parameters(recurse=False)]"
