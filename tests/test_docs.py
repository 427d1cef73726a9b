"""Pages that point to each other do so rightly."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
SOURCES = [
    *PAGES,
    *(f for d in ("src", "csrc", "tests", "benchmarks") for f in ROOT.glob(f"{d}/**/*.*")),
]


def test_links_between_pages_hold() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_design_notes_are_numbered_without_gaps_and_found() -> None:
    notes = sorted((ROOT / "docs" / "design").iterdir())
    for number, note in enumerate(notes, 1):
        assert note.name.startswith(f"{number:03}-")
        assert note.read_text("utf-8").startswith(f"# {number:03} ")
    names = {note.stem for note in notes} | {note.stem[:3] for note in notes}
    for source in SOURCES:
        if source.suffix in (".md", ".py", ".h", ".cpp"):
            for name in re.findall(r"docs/design/([\w-]+)", source.read_text("utf-8")):
                assert name in names | {"NNN-title"}, f"{source.name}: docs/design/{name}"
