"""How TensorBoard shows the suite's scalars: which ones together, and which by their decades."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

#: On a linear axis one spike would hide everything else of them.
_SPANS_DECADES = re.compile(
    r"(grad_norm|grad_norm_clipped|grad_norm_band|update_ratio)(\.\d+)?/(?!nonfinite_fraction$)"
    r"|clip(\.\d+)?/threshold$"
)
#: The least that has a logarithm here: below, a float32 is 0.
_LEAST = 1e-38

_LINES: dict[str, dict[str, tuple[str, ...]]] = {
    "Gradients": {
        "total norm, clipped norm, threshold (log10)": (
            r"log10/grad_norm(\.\d+)?/total$",
            r"log10/grad_norm_clipped(\.\d+)?/total$",
            r"log10/clip(\.\d+)?/threshold$",
        ),
        "layers (log10 of gradient norm)": (r"log10/grad_norm(\.\d+)?/(?!total$).*",),
        "updates by the weights they change (log10)": (r"log10/update_ratio(\.\d+)?/.*",),
    },
    "Guard": {
        "steps skipped, rollbacks, AMP overflows, so far": (r"rollback/(skips|rollbacks|amp_overflows)$",),
        "learning rate scheduled and used": (r"lr_backoff(\.\d+)?/(scheduled_)?lr/.*",),
        "share of steps clipped": (r"clip(\.\d+)?/fraction$",),
        "share of nonfinite gradients": (r"grad_norm(\.\d+)?/nonfinite_fraction$",),
    },
}


def decades(scalars: Mapping[str, float]) -> dict[str, float]:
    """Logarithms of what spans decades.

    Args:
        scalars: Tag to value.

    Returns:
        `log10/<tag>` to log10; of 0 that of the least number that float32 tells from it.

    Example:
        >>> decades({"grad_norm/total": 100.0, "clip/fraction": 0.5})
        {'log10/grad_norm/total': 2.0}
    """
    return {
        f"log10/{tag}": math.log10(max(value, _LEAST)) if value == value else math.nan
        for tag, value in scalars.items()
        if _SPANS_DECADES.match(tag)
    }


def layout(tags: Iterable[str]) -> dict[str, dict[str, list[object]]]:
    """The charts that these tags fill, as `SummaryWriter.add_custom_scalars` takes them.

    A chart is the same in every run that has it, so that TensorBoard shows several runs in one.

    Args:
        tags: All that were logged so far.

    Returns:
        Category to title to the chart; without those that would be empty.

    Example:
        >>> list(layout(["rollback/skips"]))
        ['Guard']
    """
    known = list(tags)
    charts: dict[str, dict[str, list[object]]] = {}
    for category, titles in _LINES.items():
        for title, patterns in titles.items():
            if any(re.match(pattern, tag) for pattern in patterns for tag in known):
                charts.setdefault(category, {})[title] = ["Multiline", list(patterns)]
    for tag in known:
        low = re.fullmatch(r"log10/grad_norm_band(\.\d+)?/low", tag)
        if low is not None:
            index = low[1] or ""
            title = f"total norm{index and f' of optimizer {index[1:]}'} and its usual band (log10)"
            # of `grad_norm/total` TensorBoard would take offence at the first step, which has no band
            members = [f"log10/grad_norm_band{index}/total", tag, f"log10/grad_norm_band{index}/high"]
            charts.setdefault("Gradients", {})[title] = ["Margin", members]
    return charts
