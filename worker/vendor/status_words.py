"""Custom status words from SD_API_STATUS_WORDS, each mapped to a status that the worker knows."""

import json

from worker.core.plain_text import plain_text

MAPPABLE_STATUSES = frozenset({"success", "processing", "failed", "error"})  # the possible meanings of a word
MAX_WORD = 100  # characters of a status that are compared
MAX_WORDS = 1_000
EXAMPLE = '{"done": "success"}'


def parse_status_words(text: str) -> dict[str, str]:
    """Return the words and their statuses from a JSON object, in lower case. Raises ValueError if it is invalid.

    >>> parse_status_words('{" Done ": "SUCCESS"}')
    {'done': 'success'}
    """
    try:
        mapping = json.loads(text)
    except (ValueError, RecursionError):
        mapping = None
    if not isinstance(mapping, dict):
        raise ValueError(f"must be a JSON object of status words and their meanings, for example {EXAMPLE}")
    statuses: dict[str, str] = {}
    for name, meaning in mapping.items():
        word = plain_text(name.strip()).strip().lower()
        if not 0 < len(word) <= MAX_WORD:
            raise ValueError(f"has a word of {len(word)} characters: a status word has 1 to {MAX_WORD}")
        status = meaning.strip().lower() if isinstance(meaning, str) else ""
        if status not in MAPPABLE_STATUSES:
            allowed = ", ".join(sorted(MAPPABLE_STATUSES))
            raise ValueError(f"must map {word[:60]!r} to one of {allowed}, for example {EXAMPLE}")
        if word in MAPPABLE_STATUSES and status != word:
            raise ValueError(f"can't change the meaning of {word!r}: only words that the worker does not know")
        if statuses.setdefault(word, status) != status:
            raise ValueError(f"gives {word[:60]!r} two meanings: upper and lower case are the same")
    if len(statuses) > MAX_WORDS:
        raise ValueError(f"has {len(statuses)} words: {MAX_WORDS} at most")
    return statuses
