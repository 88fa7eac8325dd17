"""A self-contained HTML page of sections: sentences, tables, lists, commands, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Args:
        heading: Heading of the section.
        text: A paragraph; empty for none.
        rows: A table of two columns; rows with an empty second column are omitted.
        links: Link targets by names of `rows`, and by texts of `table`.
        command: A shell command; empty for none.
        items: A list, numbered if `is_ordered`.
        is_ordered: True if the order of the list matters.
        table: A table of several columns, its head first.
        figures: Captions and their SVG markup, which is not escaped.
        level: Level of the heading.
        anchor: Name of the section in links; empty for none.
        colours: Classes by names of `rows` and texts of `table`: `bad`, `worrying` or `good`.
    """

    heading: str
    text: str = ""
    rows: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    items: Sequence[str] = ()
    is_ordered: bool = False
    table: Sequence[Sequence[str]] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    level: int = 2
    anchor: str = ""
    colours: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """True if there is nothing below the heading, and it is no place that a link leads to."""
        content = self.text, self.rows, self.command, self.items, self.table, self.figures, self.anchor
        return not any(content)


def render_page(title: str, sections: Sequence[Section], *, is_wide: bool = False) -> str:
    """Renders a page of the sections that are not empty; everything but figures is escaped.

    It is wide enough for tables of many columns if it `is_wide`.

    Example:
        >>> "<h1>1 &lt; 2</h1>" in render_page("1 < 2", [Section("Why", "It is.")])
        True
    """
    kept = [section for section in sections if not section.is_empty]
    return _template().render(title=title, sections=kept, is_wide=is_wide)


@cache
def _template() -> Template:
    # a report without a page, and a run without an incident, need no template engine
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lightning_gradguard.runtime.logging", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2")
