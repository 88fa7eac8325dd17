"""Groups of parameters that share a chart, and the norm of each group."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from lightning_gradguard.core.parameter_names import match_names

Level = Literal["auto", "parameter", "module", "total"]

#: Charts of one kind by default, of which there are three, and rows of the heat map.
MAX_CHARTS, MAX_ROWS = 24, 50
#: Fewer groups no longer locate a problem within a network.
MIN_CHARTS = 8


class ChartGroups:
    """Charts that the included parameters count in, kept from step to step."""

    def __init__(
        self,
        level: Level,
        include: Sequence[str] | None,
        exclude: Sequence[str],
        norm_type: float,
        most: int = MAX_CHARTS,
    ) -> None:
        self._level: Level = level
        self._include = include
        self._exclude = exclude
        self._norm_type = norm_type
        self._most = most
        self._charts: dict[str, str] = {}

    def select(self, names: Sequence[str]) -> dict[int, str]:
        """Returns the chart of each parameter that has one, by index.

        Charts stay when a step gives gradients to some parameters only.
        """
        if not self._charts.keys() >= set(names):
            known = list(dict.fromkeys([*self._charts, *names]))
            shown = set(known if self._include is None else match_names(known, self._include))
            shown -= set(match_names(known, self._exclude))
            named = zip(known, chart_names(known, self._level, self._most) or [""] * len(known), strict=True)
            self._charts = {name: chart if name in shown else "" for name, chart in named}
        return {i: self._charts[name] for i, name in enumerate(names) if self._charts[name]}

    def norms(
        self, names: Sequence[str], norms: Sequence[float], relative_to: Sequence[float] | None = None
    ) -> dict[str, float]:
        """Returns the norm of each chart, divided by that of `relative_to` if there is one."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, chart in self.select(names).items():
            groups[chart].append(i)
        values = {}
        for chart, members in groups.items():
            value = _total_norm([norms[i] for i in members], self._norm_type)
            if relative_to is not None:
                value /= _total_norm([relative_to[i] for i in members], self._norm_type) or math.inf
            values[chart] = value
        return values


def chart_names(names: Sequence[str], level: Level, most: int = MAX_CHARTS) -> list[str]:
    """Returns the name of the chart that each parameter counts in.

    Args:
        names: Names of the parameters.
        level: `"parameter"`: each has its own. `"module"`: those of a module share one. `"auto"`: by
            parameter up to half of `most` of them, by module above; where modules are more than `most`, by
            the deepest modules around them that are not, or by neighbours together, as `layers.0-1`.
            `"total"`: there are none.
        most: Charts under `"auto"`.

    Returns:
        One for each parameter, in their order; empty under `"total"`.

    Example:
        >>> chart_names(["body.0.weight", "body.0.bias", "scale"], "module")
        ['body.0', 'body.0', 'scale']
    """
    if level == "total":
        return []
    if level == "parameter" or (level == "auto" and len(names) <= most // 2):
        return list(names)
    modules = [tuple((name.rpartition(".")[0] or name).split(".")) for name in names]
    if level == "auto":
        while len(set(modules)) > most:
            around = [path[:-1] if len(path) == max(map(len, modules)) else path for path in modules]
            if len(set(around)) < MIN_CHARTS or () in around:
                return _group_neighbours(modules, most)
            modules = around
    return [".".join(path) for path in modules]


def _group_neighbours(modules: Sequence[tuple[str, ...]], most: int) -> list[str]:
    """Groups adjacent modules into about as many charts as `most`."""
    members: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in dict.fromkeys(modules):
        members[path[:-1]].append(path[-1])
    size = math.ceil(len(set(modules)) / most)
    charts: dict[tuple[str, ...], str] = {}
    for parent, owned in members.items():
        for start in range(0, len(owned), size):
            chunk = owned[start : start + size]
            name = chunk[0] if len(chunk) == 1 else f"{chunk[0]}-{chunk[-1]}"
            charts |= {(*parent, own): ".".join([*parent, name]) for own in chunk}
    return [charts[path] for path in modules]


def _total_norm(norms: Sequence[float], norm_type: float) -> float:
    if len(norms) == 1:
        return norms[0]
    largest = max(norms)
    if any(map(math.isnan, norms)):
        return math.nan
    if norm_type == math.inf or largest in (0.0, math.inf):
        return largest
    # relative to the largest, for its powers may overflow
    return float(largest * sum((norm / largest) ** norm_type for norm in norms) ** (1 / norm_type))
