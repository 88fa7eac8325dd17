"""What gets a chart of its own: parameters, the modules that hold them, or fewer of what holds those."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

Level = Literal["auto", "parameter", "module", "total"]

#: Charts of one kind that a person still looks through.
FEW = 50
#: With fewer of them there is no telling any more where in a network something is wrong.
LEAST = 10


def chart_names(names: Sequence[str], level: Level) -> list[str]:
    """The name of the chart that each parameter counts in.

    Args:
        names: Of the parameters.
        level: `"parameter"`: each has its own. `"module"`: those of a module share one. `"auto"`: by
            parameter up to 50 of them, by module above; where modules are more than 50, by the deepest
            modules around them that are no more than that, or by neighbours together, as `layers.0-1`.
            `"total"`: there are none.

    Returns:
        One for each parameter, in their order; empty under `"total"`.

    Example:
        >>> chart_names(["body.0.weight", "body.0.bias", "scale"], "module")
        ['body.0', 'body.0', 'scale']
    """
    if level == "total":
        return []
    if level == "parameter" or (level == "auto" and len(names) <= FEW):
        return list(names)
    modules = [tuple((name.rpartition(".")[0] or name).split(".")) for name in names]
    if level == "auto":
        while len(set(modules)) > FEW:
            around = [path[:-1] if len(path) == max(map(len, modules)) else path for path in modules]
            if len(set(around)) < LEAST or () in around:
                return _neighbours_together(modules)
            modules = around
    return [".".join(path) for path in modules]


def _neighbours_together(modules: Sequence[tuple[str, ...]]) -> list[str]:
    """So many of those next to each other in one chart that there are about 50."""
    members: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in dict.fromkeys(modules):
        members[path[:-1]].append(path[-1])
    size = math.ceil(len(set(modules)) / FEW)
    charts: dict[tuple[str, ...], str] = {}
    for parent, owned in members.items():
        for start in range(0, len(owned), size):
            chunk = owned[start : start + size]
            name = chunk[0] if len(chunk) == 1 else f"{chunk[0]}-{chunk[-1]}"
            charts |= {(*parent, own): ".".join([*parent, name]) for own in chunk}
    return [charts[path] for path in modules]
