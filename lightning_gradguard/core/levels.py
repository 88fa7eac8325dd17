"""What gets a chart of its own: parameters, the modules that hold them, or fewer of what holds those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Level = Literal["auto", "parameter", "module", "total"]

#: Charts of one kind that a person still looks through.
FEW = 50


def chart_names(names: Sequence[str], level: Level) -> list[str]:
    """The name of the chart that each parameter counts in.

    Args:
        names: Of the parameters.
        level: `"parameter"`: each has its own. `"module"`: those of a module share one. `"auto"`: by
            parameter up to 50 of them, by module above; where modules are more than 50, by the deepest
            modules around them that are no more than that. `"total"`: there are none.

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
    modules = [(name.rpartition(".")[0] or name).split(".") for name in names]
    depth = max(map(len, modules), default=1)
    if level == "auto":
        while depth > 1 and len({tuple(path[:depth]) for path in modules}) > FEW:
            depth -= 1
    return [".".join(path[:depth]) for path in modules]
