"""Markdown that loggers show."""

from __future__ import annotations


def cell(text: str) -> str:
    r"""Text that stays within its cell of a table in Markdown.

    Example:
        >>> print(cell("a|b"))
        a\|b
    """
    return " ".join(text.split()).replace("|", "\\|")
