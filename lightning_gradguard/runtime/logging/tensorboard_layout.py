"""Layout of the suite's scalars in TensorBoard: charts of several tags, and log10 copies."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial

from lightning_gradguard.core import tags as t

#: The smallest positive number on a log10 axis: below, a float32 is 0.
_SMALLEST = 1e-38


def _log10(form: str) -> str:
    return t.tag(t.LOG10, t.pattern(form))


#: Category to title to the patterns of the tags in that chart.
_CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Gradients": {
        "total norm, clipped norm, threshold (log10)": (
            f"{_log10(t.GRAD_NORM_TOTAL)}$",
            f"{_log10(t.CLIPPED_NORM_TOTAL)}$",
            f"{_log10(t.CLIP_THRESHOLD)}$",
        ),
        "gradient norm of layers": (t.pattern(t.GRAD_NORM, "(?!total$|nonfinite_fraction$).*"),),
        "updates by the weights they change": (t.pattern(t.UPDATE_RATIO),),
    },
    "Guard": {
        "steps skipped, rollbacks, AMP overflows, so far": (
            f"{t.SKIPS}$",
            f"{t.ROLLBACKS}$",
            f"{t.AMP_OVERFLOWS}$",
        ),
        "learning rate scheduled and used": (t.pattern(t.SCHEDULED_LR), t.pattern(t.LR)),
        "share of steps clipped": (f"{t.pattern(t.CLIP_FRACTION)}$",),
        "share of nonfinite gradients": (f"{t.pattern(t.NONFINITE_FRACTION)}$",),
    },
}


def decades(scalars: Mapping[str, float]) -> dict[str, float]:
    """Returns the log10 copies, by tag, of the scalars that share a chart on a logarithmic axis.

    The log10 of 0 is that of the smallest positive float32.

    Example:
        >>> decades({"grad_norm/total": 100.0, "clip/fraction": 0.5})
        {'log10/grad_norm/total': 2.0}
    """
    return {
        copy: math.nan if math.isnan(value) else math.log10(max(value, _SMALLEST))
        for tag, value in scalars.items()
        if (copy := t.log10_tag(tag))
    }


def layout(tags: Iterable[str]) -> dict[str, dict[str, list[object]]]:
    """Returns the charts that these tags fill, as `SummaryWriter.add_custom_scalars` takes them.

    A chart is the same in every run that has it, so that TensorBoard shows several runs in one. Those that
    would be empty are omitted.

    Example:
        >>> list(layout(["rollback/skips"]))
        ['Guard']
    """
    known = list(tags)
    charts: dict[str, dict[str, list[object]]] = {}
    for category, titles in _CHARTS.items():
        for title, patterns in titles.items():
            if any(re.match(pattern, tag) for pattern in patterns for tag in known):
                charts.setdefault(category, {})[title] = ["Multiline", list(patterns)]
    for tag in known:
        low = re.fullmatch(_log10(t.BAND_LOW), tag)
        if low is not None:
            own = partial(t.tag, optimizer=int(low[1][1:]), of=2) if low[1] else t.tag
            title = f"total norm{low[1] and f' of optimizer {low[1][1:]}' or ''} and its usual band (log10)"
            # TensorBoard rejects `grad_norm/total` here, whose first steps have no band
            members = [t.tag(t.LOG10, own(form)) for form in (t.BAND_TOTAL, t.BAND_LOW, t.BAND_HIGH)]
            charts.setdefault("Gradients", {})[title] = ["Margin", members]
    return charts
