"""Metadata hook of hatchling: the README without relative links, for the package index."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def without_relative_links(markdown: str, repository: str | None) -> str:
    """Returns Markdown with links to a repository's main branch; without one, their text, and no pictures."""

    def absolute(link: re.Match[str]) -> str:
        if repository is None:
            return "" if link[1] else link[2]
        kind = "raw" if link[1] else "blob"
        return f"{link[1]}[{link[2]}]({repository}/{kind}/main/{link[3]})"

    return re.sub(r"(!?)\[([^]]*)\]\((?!https?:|#)([^)]+)\)", absolute, markdown)


class ReadmeHook(MetadataHookInterface):
    """Sets the field `readme`, which pyproject.toml declares as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the README to the metadata of the package."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = without_relative_links(text, metadata.get("urls", {}).get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
