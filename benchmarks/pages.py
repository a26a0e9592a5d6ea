"""Tables of results in the pages of the documentation."""

from __future__ import annotations

from pathlib import Path

PAGES = Path(__file__).parents[1] / "docs" / "results"
PICTURES = PAGES.parent / "pictures"
NOT_RUN = "**Not run yet.**"


def between(text: str, name: str) -> str:
    """What stands between the two marks `<!-- name -->` of a page."""
    return text.split(f"<!-- {name} -->")[1].strip()


def fill(page: Path, name: str, table: str) -> None:
    """Put a table between the two marks of a page."""
    mark = f"<!-- {name} -->"
    before, _, after = page.read_text().split(mark)
    page.write_text(f"{before}{mark}\n{table}\n{mark}{after}")
