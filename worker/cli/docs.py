"""`fetch-worker docs`: list the pages of the manual, or print one."""

import re
import sys
from importlib.resources import files

import click

from worker.system.terminal import echo, make_console

COMMENT = re.compile(r"<!--.*?-->\n\n?")  # marks the generated parts of a page
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
    from rich.markdown import Markdown  # only here: it loads a syntax highlighter

    make_console().print(Markdown(pages[name]))


def manual_pages() -> dict[str, str]:
    """Return the text of each page of the manual by its topic: the index, then the pages in the order of its links."""
    folder = files("worker") / "docs"
    index = (folder / "index.md").read_text(encoding="utf-8")
    topics = re.findall(r"\]\(([a-z-]+)\.md\)", index)
    pages = {"index": index} | {name: (folder / f"{name}.md").read_text(encoding="utf-8") for name in topics}
    return {name: COMMENT.sub("", text) for name, text in pages.items()}


COMMANDS: tuple[click.Command, ...] = (docs,)
