"""What a tag means: those of the suite, and those under which others log gradient norms and losses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

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
    "loss",
]

_OPTIMIZER = r"(?:\.(?P<optimizer>\d+))?"
_NAME = r"(?P<name>.+?)"
#: Pattern of a whole tag to what it means; the first that fits counts.
_TABLE: tuple[tuple[str, Role], ...] = (
    (rf"grad_norm{_OPTIMIZER}/total", "total"),
    (rf"grad_norm{_OPTIMIZER}/nonfinite_fraction", "nonfinite_fraction"),
    (rf"grad_norm{_OPTIMIZER}/{_NAME}", "layer"),
    (rf"grad_norm_clipped{_OPTIMIZER}/total", "clipped"),
    (rf"weight_norm{_OPTIMIZER}/{_NAME}", "weight"),
    (rf"update_ratio{_OPTIMIZER}/{_NAME}", "ratio"),
    (rf"clip{_OPTIMIZER}/threshold", "threshold"),
    (rf"clip{_OPTIMIZER}/coefficient", "coefficient"),
    (rf"clip{_OPTIMIZER}/fraction", "fraction"),
    (r"rollback/skips", "skips"),
    (r"rollback/rollbacks", "rollbacks"),
    (rf"lr_backoff{_OPTIMIZER}/scale", "scale"),
    (rf"lr_backoff{_OPTIMIZER}/lr/{_NAME}", "rate"),
    # of all steps that came to the host, logged at the end
    (r"summary/largest_(?:logged_)?norm", "largest"),
    # Lightning: `track_grad_norm` of 1.x, and `pytorch_lightning.utilities.grad_norm`
    (r"grad_(?:[\d.]+|inf)_norm_total(?:_step)?", "total"),
    (rf"grad_(?:[\d.]+|inf)_norm[/_]{_NAME}(?:_step)?", "layer"),
    # Composer's OptimizerMonitor
    (r"l2_norm/grad/global", "total"),
    (rf"l2_norm/grad/{_NAME}", "layer"),
    (rf"l2_norm/param/{_NAME}", "weight"),
    # one number: Hugging Face's Trainer, NeMo, Megatron, torchtitan, OLMo, fairseq
    (
        r"(?:(?:train|training|optim|optimizer)[/_])?(?:total_|global_)?(?:grad(?:ient)?[_-]norm|gnorm)(?:_step)?",
        "total",
    ),
)
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
    """What a tag means.

    Args:
        role: The number that it is.
        optimizer: Index of the optimizer.
        name: Of the parameter, module or parameter group.
        rank: Of several tags with the same role, the one with the lowest rank counts.
    """

    role: Role
    optimizer: int = 0
    name: str = ""
    rank: int = 0


def meaning_of(tag: str) -> Meaning | None:
    """What a tag means; `None` if that is not known.

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
    for rank, (pattern, role) in enumerate(_TABLE):
        found = re.fullmatch(pattern, tag)
        if found:
            groups = found.groupdict()
            return Meaning(role, int(groups.get("optimizer") or 0), groups.get("name") or "", rank)
    for rank, pattern in enumerate(_LOSSES):
        if re.fullmatch(pattern, tag, re.IGNORECASE):
            return Meaning("loss", rank=rank)
    return None


def family(name: str, optimizer_index: int, n_optimizers: int) -> str:
    """The part of a tag before its first slash; with several optimizers, their index joins it.

    Example:
        >>> family("grad_norm", 1, n_optimizers=2), family("grad_norm", 0, n_optimizers=1)
        ('grad_norm.1', 'grad_norm')
    """
    return name if n_optimizers < 2 else f"{name}.{optimizer_index}"
