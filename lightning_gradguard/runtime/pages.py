"""A page of HTML that needs nothing else: headings, sentences, tables, commands."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}"
    "h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}"
    "th{text-align:left;font-weight:600;padding:.2rem 1.5rem .2rem 0;vertical-align:top}"
    "td{padding:.2rem 0;overflow-wrap:anywhere}pre{background:#8882;padding:.7rem;white-space:pre-wrap}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}"
)


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        heading: Above it.
        text: A paragraph; empty for none.
        rows: A table of two columns, without the rows whose second is empty.
        command: What can be typed; empty for nothing.
    """

    heading: str
    text: str = ""
    rows: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    def html(self) -> str:
        """The section, with everything in it escaped."""
        parts = [f"<h2>{html.escape(self.heading)}</h2>"]
        if self.text:
            parts.append(f"<p>{html.escape(self.text)}</p>")
        told = {name: value for name, value in self.rows.items() if value}
        if told:
            rows = (f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in told.items())
            parts.append(f"<table>{''.join(rows)}</table>")
        if self.command:
            parts.append(f"<pre>{html.escape(self.command)}</pre>")
        return "\n".join(parts)


def page(title: str, sections: Sequence[Section]) -> str:
    """A whole page.

    Args:
        title: Of the page; its first heading as well.
        sections: In order.

    Example:
        >>> "<h1>1 &lt; 2</h1>" in page("1 < 2", [Section("Why", "It is.")])
        True
    """
    body = "\n".join(section.html() for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</html>\n"
    )
