"""Tags: the only module in which a tag is spelled, and in which it is read back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

#: A parameter, a module, a parameter group or a criterion stands in place of `<name>`; with several
#: optimizers, the index of the optimizer joins the family: `grad_norm.1/total`.
GRAD_NORM_TOTAL = "grad_norm/total"
GRAD_NORM = "grad_norm/<name>"
NONFINITE_FRACTION = "grad_norm/nonfinite_fraction"
CLIPPED_NORM_TOTAL = "grad_norm_clipped/total"
BAND_LOW = "grad_norm_band/low"
BAND_TOTAL = "grad_norm_band/total"
BAND_HIGH = "grad_norm_band/high"
WEIGHT_NORM = "weight_norm/<name>"
UPDATE_RATIO = "update_ratio/<name>"
CLIP_THRESHOLD = "clip/threshold"
CLIP_COEFFICIENT = "clip/coefficient"
CLIP_FRACTION = "clip/fraction"
SKIPS = "rollback/skips"
ROLLBACKS = "rollback/rollbacks"
AMP_OVERFLOWS = "rollback/amp_overflows"
LR_SCALE = "lr_backoff/scale"
FOUND_LR = "summary/found_lr"
UNSCALED_ROLLBACKS = "summary/unscaled_rollbacks"
ROLLBACKS_AT_ANY_RATE = "summary/rollbacks_at_any_rate"
LR = "lr_backoff/lr/<name>"
SCHEDULED_LR = "lr_backoff/scheduled_lr/<name>"
INITIALIZATION = "init/<name>"
DEAD_SHARE = "dead_share/<name>"
SATURATED_SHARE = "saturated_share/<name>"
OUTPUT_GRADIENT = "output_gradient/<name>"
#: Final numbers of a run.
CLIPPED_FRACTION = "summary/clipped_fraction"
USUAL_COEFFICIENT = "summary/clip_coefficient"
LARGEST_NORM = "summary/largest_norm"
LARGEST_LOGGED_NORM = "summary/largest_logged_norm"
#: Largest norm of a run above which it is not called clean: that of an explosion, or of data out of scale.
USUAL_LARGEST_NORM = 1e3
N_INCIDENTS = "summary/incidents"
OVER_CONSTANT = "summary/over_constant"
#: Losses of a treatment's runs.
HELD_OUT_LOSS = "loss/held_out"
TRAINING_LOSS = "loss/training"
#: Settings of the callbacks among the hyperparameters of W&B and MLflow.
SETTINGS = "gradguard"
#: Texts, figures and histograms.
INCIDENTS = "incidents"
SUMMARY = "summary"
HEAT_MAP = "grad_norm/layers"
OUTPUT_HEAT_MAP = "output_gradient/layers"
GRAD_HISTOGRAM = "grad_histogram/<name>"
#: The log10 copy of another tag, and the tags that have one: those that share a chart on a logarithmic axis.
LOG10 = "log10/<name>"
SPANS_DECADES = (GRAD_NORM_TOTAL, CLIPPED_NORM_TOTAL, BAND_LOW, BAND_TOTAL, BAND_HIGH, CLIP_THRESHOLD)
#: Of these, TensorBoard gets the copy alone.
BAND = (BAND_LOW, BAND_TOTAL, BAND_HIGH)

Role = Literal[
    "total",
    "layer",
    "weight",
    "ratio",
    "clipped",
    "threshold",
    "coefficient",
    "fraction",
    "nonfinite_fraction",
    "skips",
    "rollbacks",
    "scale",
    "rate",
    "largest",
    "run_fraction",
    "run_coefficient",
    "run_over_constant",
    "initialization",
    "loss",
]
#: Tags of the suite that are read back; the first that matches counts.
_OWN: dict[str, Role] = {
    GRAD_NORM_TOTAL: "total",
    NONFINITE_FRACTION: "nonfinite_fraction",
    GRAD_NORM: "layer",
    CLIPPED_NORM_TOTAL: "clipped",
    WEIGHT_NORM: "weight",
    UPDATE_RATIO: "ratio",
    CLIP_THRESHOLD: "threshold",
    CLIP_COEFFICIENT: "coefficient",
    CLIP_FRACTION: "fraction",
    SKIPS: "skips",
    ROLLBACKS: "rollbacks",
    LR_SCALE: "scale",
    LR: "rate",
    LARGEST_NORM: "largest",
    LARGEST_LOGGED_NORM: "largest",
    CLIPPED_FRACTION: "run_fraction",
    USUAL_COEFFICIENT: "run_coefficient",
    OVER_CONSTANT: "run_over_constant",
    INITIALIZATION: "initialization",
}
_NAME = r"(?P<name>.+?)"
_INDEX = r"(?:\.(?P<optimizer>\d+))?"
_LOOP = r"(?:train|training|optim|optimizer)"
#: Patterns of tags under which others log.
_FOREIGN: dict[str, Role] = {
    # Lightning: `track_grad_norm` of 1.x, and `pytorch_lightning.utilities.grad_norm`
    r"grad_(?:[\d.]+|inf)_norm_total(?:_step)?": "total",
    rf"grad_(?:[\d.]+|inf)_norm[/_]{_NAME}(?:_step)?": "layer",
    # Composer's OptimizerMonitor
    r"l2_norm/grad/global": "total",
    rf"l2_norm/grad/{_NAME}": "layer",
    rf"l2_norm/param/{_NAME}": "weight",
    # one number: Hugging Face's Trainer, NeMo, Megatron, torchtitan, OLMo, fairseq
    rf"(?:{_LOOP}[/_])?(?:total_|global_)?(?:grad(?:ient)?[_-]norm|gnorm)(?:_step)?": "total",
}
#: Tags of a training loss, the likeliest first.
_LOSSES = (
    r"(?:train|training)[/_.-](?:total_)?loss(?:_step)?",
    r"(?:total_)?loss(?:_step)?|loss[/_](?:train|training|total)(?:_step)?|lm loss",
    r"(?:train|training)[/_.-]loss_epoch",
    r"(?!.*(?:val|eval|test|dev))(?!(?:init|summary)/).*loss(?:_step)?",
)
#: Copies on a logarithmic scale are no norms; a parameter may be called `log2`.
_LOGARITHM = re.compile(r"log_?(?:10|2)?/|[^/]*_log_?(?:10|2)/")


@dataclass(frozen=True)
class Meaning:
    """The meaning of a tag.

    Args:
        role: The number that it is.
        optimizer: Index of the optimizer.
        name: Name of the parameter, module or parameter group.
        rank: Of several tags with the same role, the one with the lowest rank counts.
    """

    role: Role
    optimizer: int = 0
    name: str = ""
    rank: int = 0


@cache
def tag(form: str, name: str = "", *, optimizer: int = 0, of: int = 1) -> str:
    """Returns the tag that a number is logged under.

    Args:
        form: A tag of this module.
        name: Stands in place of `<name>`.
        optimizer: Index of the optimizer.
        of: Number of optimizers; a single one has no index.

    Example:
        >>> tag(GRAD_NORM, "body.0", optimizer=1, of=2), tag(LR, "0")
        ('grad_norm.1/body.0', 'lr_backoff/lr/0')
    """
    family, slash, what = form.replace("<name>", name).partition("/")
    return f"{family}.{optimizer}{slash}{what}" if of > 1 else f"{family}{slash}{what}"


def pattern(form: str, name: str = ".*", index: str = r"(\.\d+)?") -> str:
    r"""Returns the regular expression of a tag, as TensorBoard takes it.

    Args:
        form: A tag of this module.
        name: Regular expression that stands in place of `<name>`.
        index: Regular expression of the optimizer's index.

    Example:
        >>> pattern(GRAD_NORM_TOTAL)
        'grad_norm(\\.\\d+)?/total'
    """
    family, slash, what = form.partition("/")
    return f"{family}{index}{slash}{what}".replace("<name>", name)


@cache
def log10_tag(tag: str) -> str:
    """Returns the tag of the log10 copy; empty where no chart needs one.

    Example:
        >>> log10_tag("grad_norm.0/total"), log10_tag("clip/fraction"), log10_tag("grad_norm/net.0")
        ('log10/grad_norm.0/total', '', '')
    """
    return LOG10.replace("<name>", tag) if _SPANS_DECADES.fullmatch(tag) else ""


@cache
def is_band(tag: str) -> bool:
    """True for the ends of the usual band, and for the total norm within it."""
    return _BAND.fullmatch(tag) is not None


def meaning_of(tag: str) -> Meaning | None:
    """Returns the meaning of a tag; `None` if it is unknown.

    Example:
        >>> meaning_of("grad_norm.1/body.0.weight")
        Meaning(role='layer', optimizer=1, name='body.0.weight', rank=2)
        >>> meaning_of("grad_2.0_norm_total").role, meaning_of("train/grad_norm").role
        ('total', 'total')
        >>> meaning_of("log10/grad_norm/total") is None
        True
    """
    if _LOGARITHM.match(tag):
        return None
    for rank, (known, role) in enumerate(_KNOWN):
        found = re.fullmatch(known, tag)
        if found:
            groups = found.groupdict()
            return Meaning(role, int(groups.get("optimizer") or 0), groups.get("name") or "", rank)
    for rank, known in enumerate(_LOSSES):
        if re.fullmatch(known, tag, re.IGNORECASE):
            return Meaning("loss", rank=rank)
    return None


_SPANS_DECADES = re.compile("|".join(map(pattern, SPANS_DECADES)), re.DOTALL)
_BAND = re.compile("|".join(map(pattern, BAND)))
_KNOWN: tuple[tuple[str, Role], ...] = (
    *((pattern(form, _NAME, _INDEX), role) for form, role in _OWN.items()),
    *_FOREIGN.items(),
)
