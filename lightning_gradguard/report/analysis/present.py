"""Finds out what a run had in place, so that a report does not advise it."""

from __future__ import annotations

import math
import re

from lightning_gradguard.core.remedies import Present
from lightning_gradguard.report.analysis.run_log import RunLog, Series

#: Norms that differ by less are one clip value; at least so many, and such a share of all, are no accident.
CAPPED, MIN_CAPPED, MIN_CAPPED_SHARE = 1e-4, 3, 0.1
#: Parameters of recurrent modules, or modules that are called so.
_RECURRENT = re.compile(r"weight_hh|(^|[._])(rnn|lstm|gru|cell)", re.IGNORECASE)
#: Modules of attention, whose layers are added to what they get, and of normalization, likewise.
_ATTENTION = re.compile(r"attn|attention|transformer", re.IGNORECASE)
_NORMALIZATION = re.compile(r"(^|[._])(\w*norm\d*|bn\d*|ln(_?\w)?)([._]|$)", re.IGNORECASE)


def present_in(log: RunLog) -> set[Present]:
    """Returns what a run had in place: callbacks that logged or acted, and a network without recurrence."""
    kinds = {incident.kind for incident in log.incidents}
    actions = {incident.action for incident in log.incidents}
    layers = [name for gradients in log.gradients for name in gradients.layers]
    has_attention = any(map(_ATTENTION.search, layers))
    found: dict[Present, bool] = {
        "clipping": any(len(g.clip_fraction) or len(g.clipped) or _is_capped(g.total) for g in log.gradients),
        "rollback": len(log.skips) > 0 or not actions.isdisjoint(("skipped", "rolled_back")),
        "backoff": len(log.backoff_scale) > 0 or "backed_off" in actions,
        "check": log.was_checked
        or not kinds.isdisjoint(("poor_initialization", "dead_units", "saturated_units")),
        "feed_forward": bool(layers) and not any(map(_RECURRENT.search, layers)),
        "no_attention": bool(layers) and not has_attention,
        "residual": has_attention,
        "normalized": any(map(_NORMALIZATION.search, layers)),
    }
    return {name for name, is_present in found.items() if is_present}


def _is_capped(norms: Series) -> bool:
    """True if many norms are the largest one, as code that clips ahead of the measurement leaves them."""
    values = [value for _, value in norms.finite()]
    largest = max(values, default=0.0)
    capped = sum(math.isclose(value, largest, rel_tol=CAPPED) for value in values)
    return capped >= max(MIN_CAPPED, MIN_CAPPED_SHARE * len(values))
