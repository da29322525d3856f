"""The page that asks for confirmation before an action."""

from collections.abc import Sequence

from flask_admin import BaseView

Row = tuple[str, object, str]  # name and value of a hidden field, and its text; empty if it is not shown


def ask_for_confirmation(
    view: BaseView,
    action: str,
    target: str,
    rows: Sequence[Row],
    *,
    meaning: str,
    button: str,
    back: str,
    title: str | None = None,
) -> str:
    """Return the page. Its form sends the action and the rows to `target`. `title` is the button as a question."""
    page: str = view.render(
        "confirm.html",
        title=title or f"{button}?",
        meaning=meaning,
        button=button,
        rows=rows,
        target=target,
        chosen=action,
        back=back,
    )
    return page
