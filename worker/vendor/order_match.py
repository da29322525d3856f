"""Compare an order with the answer about a job that may be the one it created.

Most answers repeat some fields of their order in `meta`. The API changes some of them: it adds words to the prompt, and
it rounds sizes. So a field counts as different only if no known change explains it.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from worker.core.plain_text import plain_text

SIZE_STEP = 64  # pixels: sizes are rounded to multiples of 8 or 64
_YES = frozenset({"yes", "true", "1"})


class OrderMatch(NamedTuple):
    """What the comparison says. `differs` is the first field that differs, or None.

    `is_proven`: a field that hardly two orders share is equal.
    """

    differs: str | None = None
    is_proven: bool = False


def order_match(payload: str, fields: Mapping[str, Any] | None) -> OrderMatch:
    """Compare the payload of an order, as JSON, with the fields of an answer. Never raises.

    >>> order_match('{"prompt": "a lake", "width": 512}', {"meta": {"prompt": "a lake", "W": 512}})
    OrderMatch(differs=None, is_proven=True)
    >>> order_match('{"prompt": "a lake"}', {"meta": {"prompt": "a harbour"}})
    OrderMatch(differs='prompt', is_proven=False)
    """
    order, echo = _object(payload), (fields or {}).get("meta")
    if not isinstance(echo, Mapping):
        return OrderMatch()
    is_proven = False
    for name, names, compare, proves in _FIELDS:
        if name == "prompt" and str(order.get("enhance_prompt", "")).lower() in _YES:
            continue
        sent, answered = _value(order, names), _value(echo, names)
        is_equal = None if sent is None or answered is None else compare(sent, answered)
        if is_equal is False:
            return OrderMatch(differs=name)
        is_proven = is_proven or (proves and is_equal is True)
    return OrderMatch(is_proven=is_proven)


def _object(payload: str) -> Mapping[str, Any]:
    try:
        order = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    return order if isinstance(order, dict) else {}


def _value(fields: Mapping[str, Any], names: tuple[str, ...]) -> object:
    """Return the first value that is set, or None."""
    return next((fields[name] for name in names if fields.get(name) not in (None, "", [])), None)


def _same_text(sent: object, answered: object) -> bool | None:
    """Return whether a text is, or contains, the one that was sent. None if either is no text."""
    if not isinstance(sent, str) or not isinstance(answered, str):
        return None
    return _words(sent) in _words(answered)


def _words(text: str) -> str:
    return " ".join(plain_text(text).casefold().split())


def _same_size(sent: object, answered: object) -> bool | None:
    first, second = _number(sent), _number(answered)
    return None if first is None or second is None else abs(first - second) < SIZE_STEP


def _same_number(sent: object, answered: object) -> bool | None:
    first, second = _number(sent), _number(answered)
    return None if first is None or second is None else first == second


def _same_seed(sent: object, answered: object) -> bool | None:
    """Compare seeds. Zero and negative ones ask for a random seed."""
    number = _number(sent)
    return None if number is None or number <= 0 else _same_number(sent, answered)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


_Comparison = Callable[[object, object], bool | None]
_FIELDS: tuple[tuple[str, tuple[str, ...], _Comparison, bool], ...] = (
    ("prompt", ("prompt", "text"), _same_text, True),
    ("seed", ("seed",), _same_seed, True),
    ("width", ("width", "W"), _same_size, False),
    ("height", ("height", "H"), _same_size, False),
    ("samples", ("samples", "n_samples"), _same_number, False),
)
