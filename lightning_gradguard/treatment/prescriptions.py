"""Faults of code and data, prescribed as a patch with file and line; nothing of the user's is written."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_gradguard.core.detectors.diagnosis import Symptom
from lightning_gradguard.core.forensics.origin import in_rows
from lightning_gradguard.core.incidents import Incident, sentence_case
from lightning_gradguard.core.remedies import advice_for_cause, advice_for_symptom
from lightning_gradguard.core.remedies.changes import Change, functional_activations, places
from lightning_gradguard.core.remedies.surgery.data_flow import SATURATING_FUNCTIONS
from lightning_gradguard.runtime.lightning_packages import FRAMEWORKS
from lightning_gradguard.runtime.logging.console import relative_to_cwd
from lightning_gradguard.treatment.patches import patched_code

#: Causes that lie in code or data, where no change of a module or of its training helps, and the calls or
#: attributes whose line is named.
_IN_CODE: dict[str, tuple[str, ...]] = {
    "softmax_before_loss": ("Softmax", "softmax", "Sigmoid", "sigmoid", "LogSoftmax", "cross_entropy"),
    "single_class": ("Softmax", "softmax", "LogSoftmax", "log_softmax", "cross_entropy"),
    "not_log_probabilities": ("nll_loss", "NLLLoss", "kl_div", "KLDivLoss"),
    "broadcast_targets": ("mse_loss", "MSELoss", "l1_loss", "L1Loss", "smooth_l1_loss", "huber_loss"),
    "labels_ignored": ("cross_entropy", "CrossEntropyLoss", "nll_loss"),
    "targets_out_of_range": ("binary_cross_entropy", "binary_cross_entropy_with_logits", "BCELoss"),
    "unreachable_targets": ("Sigmoid", "sigmoid", "Tanh", "tanh", "ReLU", "relu", "Softmax", "softmax"),
    "single_value": ("LayerNorm", "RMSNorm", "GroupNorm", "layer_norm", "rms_norm", "group_norm"),
    "softmax_over_batch": ("softmax", "Softmax", "log_softmax", "LogSoftmax", "sum"),
    "batch_as_time": ("LSTM", "GRU", "RNN", "TransformerEncoderLayer", "MultiheadAttention", "Transformer"),
    "view_for_transpose": ("view", "reshape"),
    "inverted_mask": ("masked_fill", "scaled_dot_product_attention", "triu", "tril", "where"),
    "constant_loss": ("detach", "argmax", "round", "item"),
    "not_in_optimizer": ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "parameters"),
    "not_registered": ("append", "Linear", "Conv2d"),
    "overwritten_weights": ("load_state_dict", "copy_", "reset_parameters"),
    "replaced_parameters": ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "parameters"),
    "detached": ("detach", "no_grad", "numpy", "data"),
    "never_stepped": ("step",),
    "cleared_gradients": ("zero_grad",),
    "frozen_weights": ("requires_grad_", "requires_grad", "freeze"),
    "gradients_not_cleared": ("manual_backward", "optimizer_zero_grad"),
    "learning_rate_schedule": ("LambdaLR", "StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR"),
    "scaled_gradients_clipped": ("clip_gradients", "clip_grad_norm_", "clip_grad_value_"),
    "clip_value_too_small": ("clip_gradients", "clip_grad_norm_", "clip_grad_value_"),
    "input_scale": ("train_dataloader",),
    "constant_input": ("train_dataloader",),
    "unrelated_targets": ("train_dataloader",),
    "target_scale": ("train_dataloader",),
    "data_scale": ("train_dataloader",),
    "unbounded_loss": ("log_prob",),
    "large_logits": ("softmax", "Softmax", "scaled_dot_product_attention"),
}
#: Faults with which a loss may fall: of how it is called, and of what the optimizer holds.
_BESIDE_LEARNING = frozenset(
    {"single_class", "not_log_probabilities", "broadcast_targets", "targets_out_of_range"}
    | {"replaced_parameters", "cleared_gradients", "gradients_not_cleared"}
)
#: Where an operation of the user's code makes nonfinite values of finite ones.
_OPERATIONS = frozenset({"forward_pass", "loss", "backward_pass"})
#: Faults of which a part can be mended without the user: trials are made.
_TREATABLE = _OPERATIONS | {
    "input_scale",
    "target_scale",
    "data_scale",
    "bad_input",
    "saturating_activations",
    "exception_in_step",
    "large_logits",
    "depth",
    "through_time",
}
#: Name of a line in a loop that gives a tensor anew.
_LOOP = "for"
#: Where a fault lies is searched in these functions first.
_FUNCTIONS = ("training_step", "forward", "configure_optimizers", "__init__")


@dataclass(frozen=True)
class Prescription:
    """A change that only the user can make.

    Args:
        fault: Cause, or the kind of symptom.
        text: What was measured, and what to do.
        place: File and line; empty if unknown.
        patch: Lines of a unified diff; empty if only the text describes it.
    """

    fault: str
    text: str
    place: str = ""
    patch: str = ""

    @property
    def is_beside_learning(self) -> bool:
        """True for a fault with which a program may seem to learn, and is not healthy."""
        return self.fault in _BESIDE_LEARNING

    @property
    def remains(self) -> bool:
        """True for a gradient that is nonfinite at a finite value, which a change can avoid and not mend."""
        return self.fault == "backward_pass"

    @property
    def is_blocking(self) -> bool:
        """True for a fault beside which no other change helps, so that no trial is made."""
        return self.fault not in _TREATABLE


def prescriptions(
    module: nn.Module,
    symptoms: Sequence[Symptom],
    batches: Sequence[object],
    run_loss: Callable[[], Tensor] | None,
    incidents: Sequence[Incident] = (),
) -> list[Prescription]:
    """Returns what to change in the user's code or data, operations with nonfinite results first."""
    operations = {p.place: p for incident in incidents if (p := _of_operation(incident)) is not None}
    found = [*operations.values()]
    found += [p for symptom in symptoms if (p := _of_symptom(module, symptom)) is not None]
    found += _nonfinite_rows(batches)
    if any(f.cause == "saturating_activations" for f in symptoms) and run_loss is not None:
        found += _functional(module, run_loss)
    for symptom in symptoms:
        is_long = symptom.kind == "vanishing_gradient" and symptom.cause in ("depth", "through_time")
        if is_long and run_loss is not None and not places(module, Change("add_residual"), run_loss):
            found += _loops(module, symptom)
    return found


def keeps_from_learning(symptom: Symptom) -> bool:
    """True for a fault of code beside which no change of the network or of its training helps."""
    return _names_of(symptom) is not None and symptom.cause not in _TREATABLE


def _names_of(symptom: Symptom) -> Sequence[str] | None:
    """Returns the calls and attributes of a fault of code; `None` for another symptom."""
    if symptom.cause == "learning_rate_too_low" and not symptom.value:
        return _IN_CODE["not_in_optimizer"]  # a rate of 0: no factor helps
    return _IN_CODE.get(symptom.cause)


def _of_symptom(module: nn.Module, symptom: Symptom) -> Prescription | None:
    names = _names_of(symptom)
    if names is None:
        return None
    advice = advice_for_symptom(symptom)
    text = f"{sentence_case(symptom.evidence)}. {advice}" if symptom.evidence else advice
    if symptom.cause == "not_registered":  # the list that has them is the cause
        names = [part for name in symptom.where[:1] for part in name.split(".")] + [*names]
    lines = list(_calls(module, names))
    same = [line for line in lines if line.name == lines[0].name]
    # a module is made where it runs, so that the last is the nearest to the loss
    line = (same[-1] if same[0].name[0].isupper() else same[0]) if same else None
    if line is None:
        return Prescription(symptom.cause, text)
    patch = "" if symptom.is_partial else line.patch(patched_code(symptom.cause, line.node))
    return Prescription(symptom.cause, text, line.place, patch)


def _of_operation(incident: Incident) -> Prescription | None:
    """Returns the remedy of an operation that has made a nonfinite value, or the line that has raised."""
    place = incident.location.partition(" in ")[0]
    if incident.kind == "exception_in_step" and incident.cause == "unknown" and place:
        return Prescription(incident.kind, f"In batch {incident.batch_idx}: {incident.detail}", place)
    usual = advice_for_cause(incident.cause, incident.where).partition(": ")[2]
    if incident.cause not in _OPERATIONS or not incident.location or usual in incident.advice:
        return None  # the operation is not known
    return Prescription(incident.cause, incident.advice, place)


def _nonfinite_rows(batches: Sequence[object]) -> list[Prescription]:
    for i, batch in enumerate(batches):
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                rows = (~torch.isfinite(leaf.reshape(len(leaf), -1)).all(1)).nonzero().flatten().tolist()
                text = (
                    f"Batch {i} of training has nonfinite values{in_rows(rows[:5])} "
                    f"of a tensor of shape {tuple(leaf.shape)}: clean or exclude these samples, as by "
                    "x = x[torch.isfinite(x).all(1)]."
                )
                return [Prescription("bad_input", text)]
    return []


def _functional(module: nn.Module, run_loss: Callable[[], Tensor]) -> list[Prescription]:
    """Returns a patch for each line that calls a saturating activation as a function."""
    found = []
    called = functional_activations(module, run_loss)
    for line in _calls(module, SATURATING_FUNCTIONS, functions=("forward",)):
        if not any(f"{Path(line.file).name}:{line.number}" in place for place in called):
            continue
        text = (
            f"{line.name} is called as a function, which no change can replace: use an activation that does "
            "not saturate, and initialize the layers before it with torch.nn.init.kaiming_normal_."
        )
        new = patched_code("saturating_activations", line.node)
        found.append(Prescription("saturating_activations", text, line.place, line.patch(new)))
    return found


def _loops(module: nn.Module, symptom: Symptom) -> list[Prescription]:
    """Returns a patch for each loop of `forward` that gives a tensor anew without its last value."""
    found = []
    for line in _calls(module, (_LOOP,), functions=("forward",)):
        last = line.code.partition("=")[0].rpartition(":")[2].strip()
        text = (
            f"{sentence_case(symptom.evidence)}. In this loop, what {last} was is lost: add it, which no "
            "change of the module does."
        )
        new = f"(new := {ast.unparse(line.node)}) + ({last} if {last}.shape == new.shape else 0)"
        found.append(Prescription(symptom.cause, text, line.place, line.patch(new)))
    return found


@dataclass(frozen=True)
class _Line:
    file: str
    number: int
    code: str
    name: str
    node: ast.expr
    indent: int

    @property
    def place(self) -> str:
        """The file from the current folder, and the line."""
        return f"{relative_to_cwd(Path(self.file))}:{self.number}"

    def patch(self, new: str) -> str:
        """Returns a unified diff that replaces the call; empty if nothing does, or it has several lines."""
        if not new or self.node.end_lineno != self.node.lineno:
            return ""
        start, end = (self.indent + (n or 0) for n in (self.node.col_offset, self.node.end_col_offset))
        changed = self.code[:start] + new + self.code[end:]
        file = self.place.rpartition(":")[0]
        return f"--- {file}\n+++ {file}\n@@ -{self.number} +{self.number} @@\n-{self.code}\n+{changed}"


def _calls(module: nn.Module, names: Sequence[str], functions: Sequence[str] = _FUNCTIONS) -> Iterator[_Line]:
    """Yields the lines of the user's classes that call, or assign, one of the names, the first name first."""
    lines = [line for kind in _own_classes(module) for line in _lines(kind, tuple(functions))]
    for name in names:
        yield from (line for line in lines if line.name == name)


def _own_classes(module: nn.Module) -> list[type]:
    own = []
    for kind in dict.fromkeys(kind for child in module.modules() for kind in type(child).__mro__):
        with suppress(TypeError, OSError):  # of a class that is not written in Python
            if not inspect.getfile(kind).startswith((os.path.dirname(torch.__file__), *FRAMEWORKS)):
                own.append(kind)
    return own


@cache
def _lines(kind: type, functions: tuple[str, ...]) -> list[_Line]:
    found: list[_Line] = []
    for name in functions:
        function = kind.__dict__.get(name)
        try:
            source, start = inspect.getsourcelines(function)  # type: ignore[arg-type]
            tree = ast.parse(textwrap.dedent("".join(source)))
            indent = len(source[0]) - len(source[0].lstrip())
            file = inspect.getfile(kind)
        except (TypeError, OSError, SyntaxError):
            continue
        for node, name in _named(tree):
            code = source[node.lineno - 1].rstrip("\n")
            found.append(_Line(file, start + node.lineno - 1, code, name, node, indent))
    return found


def _named(tree: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """Yields calls, by the name of what is called, and lists that an attribute gets, by its name.

    A call that gives a tensor anew from its last value, once in a loop, has the name `_LOOP` as well.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.For):
            lines = [one for one in ast.walk(node) if isinstance(one, ast.Assign)]
            if len(lines) == 1 and isinstance(lines[0].value, ast.Call):
                given = {n.id for a in lines[0].value.args for n in ast.walk(a) if isinstance(n, ast.Name)}
                if isinstance(lines[0].targets[0], ast.Name) and lines[0].targets[0].id in given:
                    yield lines[0].value, _LOOP
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func).rpartition(".")[2]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.ListComp | ast.Dict):
            yield from ((node.value, one.attr) for one in node.targets if isinstance(one, ast.Attribute))
