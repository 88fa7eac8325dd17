"""A page of HTML that needs nothing else: headings, sentences, lists, tables, figures, commands."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}"
    "h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}"
    "th{text-align:left;font-weight:600;padding:.2rem 1.5rem .2rem 0;vertical-align:top}"
    "td{padding:.2rem 0;overflow-wrap:anywhere}pre{background:#8882;padding:.7rem;white-space:pre-wrap}"
    "h3{font-size:1rem;margin:1.5rem 0 .3rem}figure{margin:1rem 0}figcaption{font-weight:600}"
    "div.wide{overflow-x:auto}table.many{font-size:.85rem}"
    "table.many th,table.many td{padding:.2rem 1rem .2rem 0;overflow-wrap:normal}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}"
)


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        heading: Above it.
        text: A paragraph; empty for none.
        rows: A table of two columns, without the rows whose second is empty.
        links: Addresses by names of `rows`, which then lead there.
        command: What can be typed; empty for nothing.
        items: A list; numbered if `is_ordered`.
        is_ordered: Whether the order of the list matters.
        table: One of many columns, its head first.
        figures: Pictures as markup, put in as they are.
        level: Of the heading.
    """

    heading: str
    text: str = ""
    rows: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    items: Sequence[str] = ()
    is_ordered: bool = False
    table: Sequence[Sequence[str]] = ()
    figures: Sequence[str] = ()
    level: int = 2

    def html(self) -> str:
        """The section, with everything in it escaped."""
        parts = [f"<h{self.level}>{html.escape(self.heading)}</h{self.level}>"]
        if self.text:
            parts.append(f"<p>{html.escape(self.text)}</p>")
        told = {name: value for name, value in self.rows.items() if value}
        if told:
            rows = (f"<tr><th>{self._linked(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in told.items())
            parts.append(f"<table>{''.join(rows)}</table>")
        if self.command:
            parts.append(f"<pre>{html.escape(self.command)}</pre>")
        if self.items:
            kind = "ol" if self.is_ordered else "ul"
            items = "".join(f"<li>{html.escape(item)}</li>" for item in self.items)
            parts.append(f"<{kind}>{items}</{kind}>")
        if self.table:
            head, *others = self.table
            lines = [_row(head, "th"), *(_row(row, "td") for row in others)]
            parts.append(f'<div class="wide"><table class="many">{"".join(lines)}</table></div>')
        parts += self.figures
        return "\n".join(parts)

    def _linked(self, name: str) -> str:
        text = html.escape(name)
        return f'<a href="{html.escape(self.links[name])}">{text}</a>' if name in self.links else text


def _row(cells: Sequence[str], kind: str) -> str:
    return f"<tr>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"


def page(title: str, sections: Sequence[Section], style: str = "") -> str:
    """A whole page.

    Args:
        title: Of the page; its first heading as well.
        sections: In order.
        style: CSS that the figures need.

    Example:
        >>> "<h1>1 &lt; 2</h1>" in page("1 < 2", [Section("Why", "It is.")])
        True
    """
    body = "\n".join(section.html() for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}{style}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</html>\n"
    )
