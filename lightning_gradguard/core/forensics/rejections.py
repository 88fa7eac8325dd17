"""The table of messages with which torch rejects values, with causes and cures."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_gradguard.core.forensics.arguments import call_in
from lightning_gradguard.core.incidents import Cause


@dataclass(frozen=True)
class Rejection:
    """Values that an operation, a layer or a distribution raises on.

    Args:
        message: Regular expression of the exception's type and message.
        why: The cause, as a sentence.
        cure: Code to use instead; empty if the data alone can be corrected.
        cause: Of the incident.
        argument: The argument of the operation that has to be within 0 to 1; `None` for no such bounds.
        extreme: The integers of the batch that are rejected, if no more is known of them.
        called: Regular expression of the function that rejects them; empty for a distribution.
        place: The argument of it that the cure replaces; `None` for the whole call.
        n: Number of arguments of a call that the cure can replace.
    """

    message: str
    why: str
    cure: str = ""
    cause: Cause = "forward_pass"
    argument: int | None = None
    extreme: Literal["", "largest", "smallest"] = ""
    called: str = ""
    place: int | None = 0
    n: int = 1

    def advice(self, message: str, code: str) -> str:
        """Returns the cause and the cure in words, with the arguments of the code that has raised."""
        replaced = self._replacement(message, code) if self.cure and code else None
        if replaced is not None:
            return f"{self.why}. In place of {_as_written(replaced[0], code)} use {replaced[1]}."
        return f"{self.why}. Use {self.cure}." if self.cure else f"{self.why}."

    def _replacement(self, message: str, code: str) -> tuple[str, str] | None:
        cure = self.cure.partition(" (`")[0]
        parameter = re.search(r"parameter (\w+) .*?distribution (\w+)", message)
        if parameter is not None and not call_in(code, self.called or "none"):
            given = _parameter(code, *parameter.groups())
            if given is not None and parameter[1] == "probs":
                made = next((c for f in ("sigmoid", "softmax") if (c := call_in(given, f)) is not None), None)
                logits = made.arguments[0] if made is not None and made.code == given else given
                if logits != given or ".clamp_min(" not in cure:
                    is_named = re.search(rf"\bprobs\s*=\s*{re.escape(_as_written(given, code))}", code)
                    return (is_named[0] if is_named else given), f"logits={logits}"
            return None if given is None else (given, _filled(cure, x=given))
        if "within the support" in message:
            call = call_in(code, "log_prob")
            value = call.arguments[1] if call is not None and len(call.arguments) == 2 else ""
            return (value, _filled(cure, y=value)) if value else None
        function = next((f for f in self.called.split("|") if f and call_in(code, f) is not None), "")
        call = call_in(code, function) if function else None
        if call is None or not all(call.arguments):
            return None
        if self.place is not None:
            replaced = "".join(call.arguments[self.place : self.place + 1])
            x = call.arguments[0] if self.place == 1 else replaced
            return (replaced, _filled(cure, x=x, y=replaced)) if replaced else None
        if len(call.arguments) != self.n or (call.keywords and not cure.endswith("(x, y)")):
            return None
        x, y = (*call.arguments, "")[:2]
        options = "".join(f", {name}={value}" for name, value in call.keywords.items())
        cure = cure.replace(f".{self.called.split('|')[0]}(", f".{function}(")
        return call.code, f"{_filled(cure, x=x, y=y).removesuffix(')')}{options})"


def _parameter(code: str, name: str, distribution: str) -> str | None:
    """Returns the code of a parameter of a distribution that code makes; `None` without one."""
    for made in (distribution, *torch.distributions.__all__):  # another may be made of this one
        known, call = getattr(torch.distributions, made, None), call_in(code, made)
        if call is not None and known is not None:
            names = list(inspect.signature(known).parameters)
            return {**dict(zip(names, call.arguments, strict=False)), **call.keywords}.get(name) or None
    return None


def _as_written(given: str, code: str) -> str:
    """Returns an argument without the parentheses that it has as a part of other code alone."""
    return given[1:-1] if given[0] == "(" and given not in code else given


def _filled(cure: str, **given: str) -> str:
    """Returns a cure with arguments in place of `x` and `y`."""
    return re.sub(r"\b[xy]\b(?!=)", lambda name: given.get(name[0], name[0]), cure)


_OUTPUT = "(`x` is the output of the network)"

REJECTIONS = (
    Rejection(
        "more than 1 value per channel",
        "The batch has one sample, of which there is no variance: give drop_last=True to the DataLoader, or "
        "use LayerNorm or GroupNorm",
    ),
    Rejection(
        "more than 1 spatial element",
        "InstanceNorm gets one position of each channel, of which there is no variance: leave it out there, "
        "or use GroupNorm",
    ),
    Rejection(
        r"constraint (IndependentConstraint\()?GreaterThan(Eq)?\(lower_bound=0|var has negative entry",
        "A scale, variance or concentration has to be positive",
        f"torch.nn.functional.softplus(x) + 1e-3 {_OUTPUT}",
        called="gaussian_nll_loss",
        place=2,
    ),
    Rejection(
        "parameter low .*LessThan",
        "The upper bound of a uniform distribution has to be above the lower one",
        "x + torch.nn.functional.softplus(y) + 1e-3 (`x` is the lower bound, `y` the upper one)",
        called="Uniform",
        place=1,
    ),
    Rejection(
        "parameter probs .*to be positive",
        "A probability is 0, as the sigmoid of a low answer rounds to: keep it above 0, or give logits",
        f"x.clamp_min(1e-6) {_OUTPUT}",
    ),
    Rejection(
        r"constraint (IndependentConstraint\()?(HalfOpen)?Interval",
        "A parameter of the distribution has to be within its interval: give logits, as in "
        "torch.distributions.Bernoulli(logits=x)",
        f"x.sigmoid() {_OUTPUT}",
    ),
    Rejection(
        "constraint Simplex",
        "Probabilities have to be positive and add up to 1: give logits",
        f"torch.distributions.Categorical(logits=x) {_OUTPUT}",
    ),
    Rejection(
        "constraint LowerCholesky",
        "A Cholesky factor has to be lower triangular with a positive diagonal",
        "x.tril(-1) + torch.diag_embed(torch.nn.functional.softplus(x.diagonal(dim1=-2, dim2=-1)) + 1e-3) "
        "(`x` is the matrix)",
    ),
    Rejection(
        "constraint PositiveDefinite|not positive-definite",
        "The matrix is not positive definite: add a multiple of the identity, to x @ x.mT where x is not "
        "symmetric",
        "x + 1e-3 * x.new_ones(x.shape[-1]).diag() (`x` is the matrix)",
        called="cholesky|cholesky_ex",
    ),
    Rejection(
        "failed to converge",
        "The matrix is ill-conditioned, or has equal singular values: add a small diagonal of different "
        "numbers",
        "x + torch.linspace(1e-3, 2e-3, x.shape[-1], device=x.device).diag() (`x` is the matrix)",
        called="svd|svdvals|eigh|eigvalsh|eig|eigvals|pinv",
    ),
    Rejection(
        r"within the support \(Simplex",
        "Targets of this distribution have to be positive and add up to 1",
        "y.clamp_min(1e-6) / y.clamp_min(1e-6).sum(-1, keepdim=True) (`y` are the targets)",
    ),
    Rejection(
        r"within the support \((IndependentConstraint\()?(Integer(GreaterThan|LessThan)|NonnegativeInteger)",
        "Targets of this distribution have to be counts, whole numbers of at least 0",
        "y.round().clamp_min(0) (`y` are the targets)",
    ),
    Rejection(
        r"within the support \((IndependentConstraint\()?Boolean",
        "Targets of this distribution have to be 0 or 1; of probabilities between them take "
        "torch.nn.functional.binary_cross_entropy_with_logits",
        "y.round().clamp(0, 1) (`y` are the targets)",
    ),
    Rejection(
        r"within the support \((IndependentConstraint\()?OneHot",
        "Targets of this distribution have to be one-hot",
        "torch.nn.functional.one_hot(y.argmax(-1), y.shape[-1]).to(y) (`y` are the targets)",
    ),
    Rejection(
        r"within the support \((IndependentConstraint\()?IntegerInterval",
        "Targets are no class or count of this distribution: correct the labels, which count from 0, or give "
        "the network an output for each",
    ),
    Rejection(
        r"within the support \((IndependentConstraint\()?GreaterThan(Eq)?\(lower_bound=0(\.0)?\)",
        "Targets of this distribution have to be positive",
        "y.clamp_min(1e-6) (`y` are the targets)",
    ),
    Rejection(
        r"within the support \((IndependentConstraint\()?Interval\(lower_bound=0\.0, upper_bound=1\.0",
        "Targets of this distribution have to be within 0 to 1",
        "y.clamp(1e-6, 1 - 1e-6) (`y` are the targets)",
    ),
    Rejection(
        "within the support",
        "log_prob got a value that the distribution cannot take: check the targets, or keep the bounds of "
        "the distribution beyond them",
    ),
    Rejection(
        "cannot be converted to type .* without overflow",
        "A number does not fit into the dtype, as -1e9 in float16: mask with the smallest number of it",
        "x.masked_fill(y, torch.finfo(x.dtype).min) (`x` are the scores, `y` is the mask)",
        called="masked_fill|masked_fill_",
        place=None,
        n=3,
    ),
    Rejection(
        "elements of target should be between 0 and 1",
        "Targets are beyond 0..1: correct or scale them, as labels of 0 and 255",
        "y / 255 (`y` are the targets)",
        cause="bad_input",
        argument=1,
        called="binary_cross_entropy",
        place=1,
    ),
    Rejection(
        "elements of input should be between 0 and 1",
        "Probabilities are beyond 0..1: give scores, without sigmoid, to a loss that applies it",
        "torch.nn.functional.binary_cross_entropy_with_logits(x, y) (`x` are the scores, `y` the targets)",
        argument=0,
        called="binary_cross_entropy",
        place=None,
        n=2,
    ),
    Rejection(
        "probability tensor contains|invalid multinomial distribution|sum of probabilities",
        "Probabilities to be sampled are negative, nonfinite, or 0 throughout a row",
        "x.clamp_min(0) + 1e-6 (`x` are the probabilities)",
        called="multinomial",
    ),
    Rejection(
        "Expected (input|target)_lengths|(input|target)_lengths must be",
        "CTC got a length beyond that of its tensor: input_lengths count frames after subsampling, "
        "target_lengths the labels",
        "input_lengths.clamp(max=len(log_probs))",
        cause="bad_input",
        extreme="largest",
    ),
    Rejection(
        "Class values must be smaller",
        "one_hot got a class beyond num_classes: correct the labels, or raise num_classes",
        cause="bad_input",
        extreme="largest",
    ),
    Rejection(
        "Class values must be non-negative",
        "one_hot got a negative class: correct the labels, or leave out those that are to be ignored",
        cause="bad_input",
        extreme="smallest",
    ),
    Rejection(
        r"start \(\d+\) \+ length \(\d+\) exceeds dimension size",
        "A slice goes beyond its dimension, as with a length above that of the padded sequences",
        "lengths.clamp(max=x.shape[1]) (`x` are the padded sequences)",
        extreme="largest",
    ),
    Rejection(
        r"input.numel\(\) == 0|to have non-zero size|on tensor with no elements|must be non-empty|zero-size",
        "The largest or smallest value of an empty selection does not exist: leave it out",
        "(x.max() if x.numel() else x.sum()) (`x` is what is selected)",
        called="max|min|amax|amin",
        place=None,
    ),
    Rejection(
        "selected index k out of range",
        "topk asks for more values than there are",
        "x.topk(min(y, x.shape[-1])) (`x` are the values, `y` is their number)",
        called="topk",
        place=None,
        n=2,
    ),
    Rejection(
        "Length of all samples has to be greater than 0",
        "A sequence is empty: leave such samples out, or give it a length of at least 1",
        "lengths.clamp(min=1)",
        cause="bad_input",
        extreme="smallest",
    ),
)


def rejection(error: BaseException) -> Rejection | None:
    """Returns the first entry that an exception is; `None` if it is none of these.

    Example:
        >>> rejection(RuntimeError("Class values must be smaller than num_classes.")).cause
        'bad_input'
    """
    whole = " ".join(f"{type(error).__name__}: {error}".split())
    return next((known for known in REJECTIONS if re.search(known.message, whole)), None)
