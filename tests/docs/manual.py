"""The pages of the manual and the README as tests read them: code blocks, tables, links, headings."""

import re
from pathlib import Path

import worker

ROOT = Path(__file__).resolve().parents[2]
DOCS = Path(worker.__file__).parent / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {"README": README, **PAGES}
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(language: str, text: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def block_with(part: str, text: str) -> str:
    """Return the first Python block that contains this text."""
    return next(block for block in blocks("python", text) if part in block)


def prose(text: str) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def rows(text: str) -> list[list[str]]:
    """Return the rows of all tables of a text, without their heads."""
    lines = [line for line in prose(text).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rules = {place for place, row in enumerate(cells) if all(set(cell) <= set("-:") for cell in row)}
    return [row for place, row in enumerate(cells) if place not in rules and place + 1 not in rules]


def section(title: str, text: str) -> str:
    """Return the part of a page under a heading of the second level."""
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
