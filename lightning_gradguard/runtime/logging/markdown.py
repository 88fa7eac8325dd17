"""Markdown for loggers."""

from __future__ import annotations


def cell(text: str) -> str:
    r"""Returns text that stays within its cell of a Markdown table.

    Example:
        >>> print(cell("a|b"))
        a\|b
    """
    return " ".join(text.split()).replace("|", "\\|")
