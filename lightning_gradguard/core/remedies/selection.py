"""Selects the texts that apply to a run, and names in them what is at fault."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning_gradguard.core.parameter_names import code_of
from lightning_gradguard.core.remedies.gates import gated_code, packed_code
from lightning_gradguard.core.remedies.ranked import REMEDIES
from lightning_gradguard.core.remedies.texts import BY_CAUSE, BY_KIND

if TYPE_CHECKING:
    from torch import nn

    from lightning_gradguard.core.detectors.diagnosis.symptom import Symptom

#: What a run has, so that some advice does not apply; `feed_forward`: no recurrence; `untrained`: what is
#: found was there before the first update; `by_batch`: no schedule that steps once an epoch is at fault;
#: `sampled`: it was found on a step that is sampled, and may have begun before; `explained`: its cause is
#: known.
Present = Literal[
    "clipping",
    "backoff",
    "rollback",
    "check",
    "treatment",
    "feed_forward",
    "no_attention",
    "normalized",
    "residual",
    "no_divergence",
    "untrained",
    "by_batch",
    "has_rate",
    "no_rate",
    "sampled",
    "explained",
]

#: How a cure names all weights: those of layers or, for functional code and recurrent networks, all matrices.
_OF_LAYERS = "for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))"
_OF_MATRICES = "for p in model.parameters() if p.ndim > 1"

#: Scaled coordinates have the same waves in less room, which is too fast for a network of a few layers.
_WAVES = (
    " Of a coordinate such as time, give sines and cosines of the scaled x: "
    "torch.cat([f(2**k * x) for k in range(6) for f in (torch.sin, torch.cos)], 1)."
)
#: Inputs up to which they may be coordinates.
_COORDINATES = 3

_CONDITIONAL = re.compile(r"\[(\w+)\|([^]]*)\]")


def advice(
    kind: str, where: Sequence[str] = (), present: Collection[Present] = (), coefficient: float | None = None
) -> str:
    """Returns advice for an incident, in one or two sentences; empty for an unknown kind.

    Args:
        kind: One of `core.incidents.KINDS`.
        where: Names of the parameters or modules at fault, the worst first; the first is named.
        present: What the run has: advice to add it is left away.
        coefficient: That of most clipped steps, if it is known.

    Example:
        >>> advice("rollback", present=["backoff"])
        'The weights are those of an earlier step; lower the learning rate if it happens again.'
    """
    return _applied(BY_KIND.get(kind, ""), where, present, coefficient=coefficient)


def advice_for_cause(
    cause: str,
    where: Sequence[str] = (),
    present: Collection[Present] = (),
    model: nn.Module | None = None,
    kind: str = "",
    n_steps: int = 0,
    arguments: Sequence[str] = (),
) -> str:
    """Returns advice for the cause that a replay found, in one or two sentences; empty for `"unknown"`.

    Args:
        cause: One of `core.incidents.CAUSES` or `SYMPTOM_CAUSES`.
        where: Names of the modules or tensors at fault, the worst first; the first is named.
        present: What the run has.
        model: The module that the names are of, so that the first is spelled as Python.
        kind: The symptom, where a cause has more than one.
        n_steps: Length of the sequences, where it is known.
        arguments: Answer and target of a loss in the user's code, where they are known.
    """
    text = BY_CAUSE.get(f"{kind}: {cause}", BY_CAUSE.get(cause, ""))
    return _applied(text, where, present, model, n_steps, arguments=arguments)


def advice_for_symptom(
    symptom: Symptom, present: Collection[Present] = (), model: nn.Module | None = None
) -> str:
    """Returns advice for the cause that a diagnosis found, or for its symptom if that is unknown.

    Example:
        >>> from lightning_gradguard.core.detectors.diagnosis import Symptom
        >>> advice_for_symptom(Symptom("stuck_loss", "labels_ignored", (), 1.0, "", "contract"))
        'Check the labels and ignore_index: none is left for the loss.'
    """
    where, n_steps, arguments = symptom.where, symptom.n_times, symptom.arguments
    known = advice_for_cause(symptom.cause, where, present, model, symptom.kind, n_steps, arguments)
    return known or advice(symptom.kind, where, present)


def remedies(kind: str, where: Sequence[str] = (), present: Collection[Present] = ()) -> tuple[str, ...]:
    """Returns the remedies of a symptom, the likeliest first: the advice alone for a kind without a list.

    Args:
        kind: One of `core.incidents.KINDS`, or a symptom that only `report.analysis` finds.
        where: Names of the parameters or modules at fault, the worst first; the first is named.
        present: What the run has: a remedy that it has is left away.

    Example:
        >>> remedies("stuck_loss")[0].partition(";")[0]
        'Try the learning rate 10 times higher, and 10 times lower'
    """
    texts = REMEDIES.get(kind, (BY_KIND.get(kind, ""),))
    return tuple(filter(None, (_applied(text, where, present) for text in texts)))


def _applied(
    text: str,
    where: Sequence[str],
    present: Collection[Present],
    model: nn.Module | None = None,
    n_steps: int = 0,
    coefficient: float | None = None,
    arguments: Sequence[str] = (),
) -> str:
    """Returns a text without the parts that do not apply, and with the name of what is at fault."""
    name = where[0] if where else ""
    fitting = _CONDITIONAL.sub(lambda part: "" if part[1] in present else part[2], text).strip()
    code, found = code_of(name, model), _find(name, model)
    is_bare = found is not None and getattr(found, "ndim", None) is not None
    has_layers = found is None or type(found).__name__ in ("Linear", "Conv2d")
    shape: Sequence[int] = getattr(getattr(found, "weight", None), "shape", ())
    answer, target = arguments or (f"{code}(inputs)", "target")
    applied = fitting.format(
        answer=answer,
        target=target,
        where=name or "the network",
        code=code,
        gated=_gated(name, code, found, n_steps),
        packed=packed_code(code, found),
        waves=_WAVES if len(shape) == 2 and shape[1] <= _COORDINATES else "",
        small=_small(where, model),
        start=_start_of_head(code, found),
        steadied=_steadied(where, model, n_steps),
        parameters=f"[{code}]" if is_bare else f"{code}.parameters()",
        weight="m.weight" if has_layers else "p",
        coefficient="the usual clip/coefficient" if coefficient is None else f"{coefficient:.2g}",
        for_all=_OF_LAYERS if has_layers else _OF_MATRICES,
    )
    is_named = re.search(r"\bmodel[.\[]", applied) and "model = self" not in applied
    return f"{applied} Here model is the LightningModule, self in its methods." if is_named else applied


def _gated(name: str, code: str, recurrent: Any, n_steps: int) -> str:
    """Returns how to keep a state over many steps; as code, where the module and its arguments are known."""
    if n_steps > 0 and (lines := gated_code(code, recurrent, n_steps)):
        return f"paste at the end of __init__, with model = self:\n{lines}"
    return (
        f"use an LSTM for {name or 'the network'} whose forget gates are open at the start (a bias of log(n) "
        "for n steps)."
    )


def _steadied(names: Sequence[str], model: nn.Module | None, n_steps: int) -> str:
    """Returns how to keep what is carried through time from growing.

    Where layers in a loop return what they are given, as `state + f(state)` takes it, a step is made small.
    """
    loop = [None if model is None else _find(name, model) for name in names] or [None]
    n_inputs, n_outputs = (
        getattr(getattr(loop[i], "weight", None), "shape", ())[1 + i : 2 + i] for i in (0, -1)
    )
    if n_steps and len(loop) > 1 and n_inputs and n_inputs == n_outputs:
        return (
            f"Let each of the {n_steps} steps change the state little: state + {min(1, 10 / n_steps):.2g} * "
            "f(state), a learning rate 10 times lower and, pasted at the end of __init__ with model = self:\n"
            f"for p in {code_of(names[-1], model)}.parameters(): torch.nn.init.zeros_(p)"
        )
    if len(loop) > 1:
        use = "Use Adam, whose steps are no longer where gradients are larger, or fewer steps at first"
        return f"{use}; in a cell of your own, gates."
    weight = next((w for w in ("weight_hh_l0", "weight_hh") if hasattr(loop[0], w)), "weight")
    code, others = code_of("".join(names), model), "gated cells or truncated BPTT"
    orthogonal = f"an orthogonal recurrent weight, nn.init.orthogonal_({code}.{weight}), "
    found: Any = getattr(loop[0], weight, None)
    if getattr(found, "ndim", 0) == 2:
        rest = found.T @ found - found.new_ones(found.shape[1]).diag()
        orthogonal *= not bool(rest.abs().max() < 0.01)  # it is one already
    return f"Use {orthogonal}{others} (state = state.detach() every 10 to 50 steps)."


def _small(names: Sequence[str], model: nn.Module | None) -> str:
    """Returns statements that initialize modules, or parameters, with small weights."""
    lines = []
    for name in names:
        found, code = _find(name, model), code_of(name, model)
        weight = "in_proj_weight" if hasattr(found, "in_proj_weight") else "weight"
        code = code if hasattr(found, "ndim") else f"{code}.{weight}"
        lines.append(f"torch.nn.init.normal_({code}, std=0.02)")
    return "; ".join(lines)


def _start_of_head(code: str, head: Any) -> str:
    """Returns how to initialize a last layer so that its answers are not large."""
    std = "n ** -0.5) for n inputs"
    if getattr(head, "weight", None) is not None and head.weight.ndim > 1:
        n_outputs, n_inputs = head.weight.flatten(1).shape
        if head.weight.norm() ** 2 <= 1.44 * n_outputs:
            return f"begin with answers of 0, nn.init.zeros_({code}.weight)"
        std = f"{n_inputs} ** -0.5)"
    return (
        f"initialize it for unit variance, nn.init.normal_({code}.weight, 0, {std}, and with it an embedding "
        "that is tied to it"
    )


def _find(name: str, model: nn.Module | None) -> object:
    """Returns the module or the parameter of a name; `None` if there is none, or no model."""
    if model is None:
        return None
    named = {**dict(model.named_parameters()), **dict(model.named_modules())}
    return named.get(name)
