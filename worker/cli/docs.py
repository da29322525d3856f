"""`fetch-worker docs`: list the pages of the manual, or print one."""

import re
import sys
from importlib.resources import files
from typing import TYPE_CHECKING, ClassVar

import click
from rich.table import Table

from worker.system.terminal import echo, make_console

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.markdown import Markdown

COMMENT = re.compile(r"^<!--[^\n]*+\n\n?", re.MULTILINE)  # a line that marks a generated part of a page
FIRST_LINE = 2  # of a page: its title, an empty line, and one sentence that says what it is about


@click.command()
@click.argument("topic", metavar="[TOPIC]", required=False)
def docs(topic: str | None) -> None:
    """List the topics of the manual, or print the page of TOPIC."""
    pages = manual_pages()
    if topic is None:
        width = max(map(len, pages))
        for name, text in pages.items():
            echo(f"{name:{width}}  {text.splitlines()[FIRST_LINE]}")
        return
    name = topic.lower().removesuffix(".md")
    if name not in pages:
        raise click.UsageError(f"there is no topic {topic!r}: choose one of {', '.join(pages)}")
    if not sys.stdout.isatty():
        click.echo(pages[name], nl=False)
        return
    make_console().print(_formatted(pages[name]))


def manual_pages() -> dict[str, str]:
    """Return the text of each page of the manual by its topic: the index, then the pages in the order of its links."""
    folder = files("worker") / "docs"
    index = (folder / "index.md").read_text(encoding="utf-8")
    topics = re.findall(r"\]\(([a-z-]+)\.md\)", index)
    pages = {"index": index} | {name: (folder / f"{name}.md").read_text(encoding="utf-8") for name in topics}
    return {name: COMMENT.sub("", text) for name, text in pages.items()}


def _formatted(text: str) -> "Markdown":
    """Return a page for a terminal. Long words in tables are folded; rich would cut them off."""
    from rich.markdown import Markdown, TableElement  # only here: they load a syntax highlighter

    class FoldedTable(TableElement):
        def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
            for part in super().__rich_console__(console, options):
                for column in part.columns if isinstance(part, Table) else ():
                    column.overflow = "fold"
                yield part

    class Page(Markdown):
        elements: ClassVar = {**Markdown.elements, "table_open": FoldedTable}

    return Page(text)
