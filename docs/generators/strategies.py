"""The table of docs/strategies.md, which the tests write and verify."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "strategies.md"
FEATURES = ("monitor", "clip", "skip", "rollback", "backoff", "check")


class StrategiesPage:
    """The page, to compare with, or to write.

    Args:
        is_written: True to write lines into the page instead of verifying them.
    """

    def __init__(self, is_written: bool) -> None:
        self.is_written = is_written

    def has(self, strategy: str, precision: str, outcome: Sequence[bool] | str) -> None:
        """Verifies, or writes, the row of a strategy.

        Args:
            strategy: First column.
            precision: Second column.
            outcome: True for each feature that was verified; or a text for all of them.
        """
        cells = [outcome] * 6 if isinstance(outcome, str) else ["verified" if p else "idle" for p in outcome]
        start = f"| {strategy} | {precision} |"
        line = " ".join([start, *(f"{cell} |" for cell in cells)])
        lines = PAGE.read_text().splitlines()
        first = next(i for i, text in enumerate(lines) if text.startswith("| strategy | precision |")) + 2
        end = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
        if not self.is_written:
            assert line in lines[first:end], (
                f"docs/strategies.md lacks the row (`make strategies` writes it):\n{line}"
            )
            return
        rows = sorted({*(text for text in lines[first:end] if not text.startswith(start)), line})
        PAGE.write_text("\n".join([*lines[:first], *rows, *lines[end:], ""]))
