"""The table of messages with which torch rejects values, with causes and cures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

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
    """

    message: str
    why: str
    cure: str = ""
    cause: Cause = "forward_pass"
    argument: int | None = None
    extreme: Literal["", "largest", "smallest"] = ""

    @property
    def advice(self) -> str:
        """The cause and the cure in words."""
        return f"{self.why}. Use {self.cure}." if self.cure else f"{self.why}."


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
    ),
    Rejection(
        "failed to converge",
        "The matrix is ill-conditioned, or has equal singular values: add a small diagonal of different "
        "numbers",
        "x + torch.linspace(1e-3, 2e-3, x.shape[-1], device=x.device).diag() (`x` is the matrix)",
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
        r"within the support \((IndependentConstraint\()?(IntegerInterval|Boolean)",
        "Targets are no class or count of this distribution: correct the labels, which count from 0, or give "
        "the network an output for each",
    ),
    Rejection(
        r"within the support \((IndependentConstraint\()?GreaterThan",
        "Targets of this distribution have to be positive",
        "y.clamp_min(1e-6) (`y` are the targets)",
    ),
    Rejection(
        "within the support",
        "log_prob got a value that the distribution cannot take: check the targets, and keep them inside its "
        "range, for Beta and others on 0..1",
        "y.clamp(1e-6, 1 - 1e-6) (`y` are the targets)",
    ),
    Rejection(
        "cannot be converted to type .* without overflow",
        "A number does not fit into the dtype, as -1e9 in float16: mask with the smallest number of it",
        "x.masked_fill(mask, torch.finfo(x.dtype).min) (`x` are the scores)",
    ),
    Rejection(
        "elements of target should be between 0 and 1",
        "Targets are beyond 0..1: correct or scale them, as labels of 0 and 255",
        "y / 255 (`y` are the targets)",
        cause="bad_input",
        argument=1,
    ),
    Rejection(
        "elements of input should be between 0 and 1",
        "Probabilities are beyond 0..1: give scores, without sigmoid, to a loss that applies it",
        "torch.nn.functional.binary_cross_entropy_with_logits(x, y) (`x` are the scores, `y` the targets)",
        argument=0,
    ),
    Rejection(
        "probability tensor contains|invalid multinomial distribution|sum of probabilities",
        "Probabilities to be sampled are negative, nonfinite, or 0 throughout a row",
        "torch.multinomial(x.clamp_min(0) + 1e-6, 1) (`x` are the probabilities)",
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
        "F.one_hot got a class beyond num_classes: correct the labels, or raise num_classes",
        cause="bad_input",
        extreme="largest",
    ),
    Rejection(
        "Class values must be non-negative",
        "F.one_hot got a negative class: correct the labels, or leave out those that are to be ignored",
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
        "x.max() if x.numel() else x.sum() (`x` is what is selected)",
    ),
    Rejection(
        "selected index k out of range",
        "topk asks for more values than there are",
        "x.topk(min(k, x.shape[-1])) (`x` are the values)",
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
