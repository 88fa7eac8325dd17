"""The package and its documentation use the words of torch, Lightning and optax (see CONTRIBUTING)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_gradguard"
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]

#: Words that have a standard one: a nonfinite value is not `sick`, a snapshot is restored, not `put back`.
FORBIDDEN = (
    *("absurd", "anybody", "came to", "comes? to", "deaths?", "die[sd]", "gave up", "give up", "given up"),
    *("gives up", "giving up", "go(es)? back", "going back", "gone back", "grown", "heard", "hears"),
    *("hindsight", "judge[sd]?", "judging", "ledgers?", "left out", "lets? go", "let happen", "look again"),
    *("nobody", "proven", "put back", "refuse[sd]?", "refusals?", "riders?", "rivals?", "said", "says?"),
    *("sick(ness)?", "somebody", "someone", "spares?", "spoil(s|ed|ing)?", "tells?", "told", "way back"),
    *("went back", "whoever"),
)
#: In identifiers, an underscore takes the place of a space and ends a word.
WORDS = re.compile(rf"(?<![a-z])({'|'.join(FORBIDDEN)})(?![a-z])".replace(" ", r"[\s_]+"), re.IGNORECASE)
#: Keys of checkpoints and fields of files that version 0.5 wrote.
KEYS_OF_FILES = re.compile(r"\b(has_given_up|ledgers|left_out)\b")
FIRST_WORDS = ("How", "What", "Where", "Whether", "Which", "Who", "Whose")
#: Of a function, beside verbs in the third person.
FIRST_WORDS_OF_FUNCTIONS = ("True", "Called")


def hits(path: Path) -> Iterator[str]:
    text = KEYS_OF_FILES.sub("", path.read_text(encoding="utf-8"))
    for match in WORDS.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield f"{path.relative_to(ROOT)}:{line}: {' '.join(match[0].split())}"


def docstrings(path: Path) -> Iterator[tuple[int, bool, str]]:
    """Yields line, kind and text: a property is described by a noun, a function by a verb."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node)
        ):
            is_function = isinstance(node, ast.FunctionDef) and not any(
                ast.unparse(decorator).endswith("property") for decorator in node.decorator_list
            )
            yield getattr(node, "lineno", 1), is_function, text


def begins_well(text: str, is_function: bool) -> bool:
    first = text.split()[0].rstrip(",;")
    if is_function:
        return first.endswith("s") or first in FIRST_WORDS_OF_FUNCTIONS
    return first not in FIRST_WORDS


@pytest.mark.parametrize("paths", [MODULES, PAGES], ids=["package", "documentation"])
def test_words_are_those_of_the_field(paths: list[Path]) -> None:
    found = [hit for path in paths for hit in hits(path)]
    assert not found, "\n".join(["words to replace:", *found])


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in MODULES
        for line, is_function, text in docstrings(path)
        if not begins_well(text, is_function)
    ]
    assert not found, "\n".join(["docstrings to rewrite:", *found])
