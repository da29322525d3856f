"""Compare an order with the answer about a job that may be the one it created.

Most answers repeat some fields of their order in `meta`. The API changes some of them: it adds words to the prompt,
translates it, and rounds sizes. So a field counts as different only if no known change explains it.
"""

import html
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from worker.core.numbers import number, positive_number
from worker.core.plain_text import plain_text
from worker.vendor.answer_fields import json_object

SIZE_STEP = 64  # pixels: sizes are rounded to multiples of 8 or 64
_YES = frozenset({"yes", "true", "1"})


def differing_field(payload: str, fields: Mapping[str, Any] | None) -> str | None:
    """Return the first field in which an answer differs from an order, or None. `payload` is JSON. Never raises.

    None does not prove that the answer is about the order: it may repeat nothing, or the same text of another order.

    >>> differing_field('{"prompt": "a lake", "width": 512}', {"meta": {"prompt": "a lake, 8k", "W": 512}})
    >>> differing_field('{"prompt": "a lake"}', {"meta": {"prompt": "a harbour"}})
    'prompt'
    """
    order, echo = json_object(payload.encode("utf-8", "replace")) or {}, (fields or {}).get("meta")
    if not isinstance(echo, Mapping):
        return None
    for field in _FIELDS:
        if any(str(order.get(option, "")).lower() in _YES for option in field.changed_by):
            continue
        sent, answered = _value(order, field.names), _value(echo, field.names)
        if sent is not None and answered is not None and field.compare(sent, answered) is False:
            return field.names[0]
    return None


def _value(fields: Mapping[str, Any], names: tuple[str, ...]) -> object:
    """Return the first value that is set, or None."""
    return next((fields[name] for name in names if fields.get(name) not in (None, "", [])), None)


def _same_text(sent: object, answered: object) -> bool | None:
    """Return whether a text is, or contains, the one that was sent. None if either is no text."""
    if not isinstance(sent, str) or not isinstance(answered, str):
        return None
    return _words(sent) in _words(answered)  # an empty text is in all


def _words(text: str) -> str:
    return " ".join(plain_text(html.unescape(html.unescape(text))).casefold().split())


def _same_size(sent: object, answered: object) -> bool | None:
    first, second = number(sent), number(answered)
    return None if first is None or second is None else abs(first - second) < SIZE_STEP


def _same_number(sent: object, answered: object) -> bool | None:
    first, second = number(sent), number(answered)
    return None if first is None or second is None else first == second


def _same_seed(sent: object, answered: object) -> bool | None:
    """Compare seeds. Zero and negative ones ask for a random seed."""
    return None if positive_number(sent) is None else _same_number(sent, answered)


class _Field(NamedTuple):
    """A field of orders under its names, and the options with which the API changes it."""

    names: tuple[str, ...]
    compare: Callable[[object, object], bool | None]
    changed_by: tuple[str, ...] = ()


_FIELDS = (
    _Field(("prompt", "text"), _same_text, ("enhance_prompt", "multi_lingual")),
    _Field(("seed",), _same_seed),
    _Field(("width", "W"), _same_size, ("upscale", "panorama")),
    _Field(("height", "H"), _same_size, ("upscale", "panorama")),
    _Field(("samples", "n_samples"), _same_number),
)
