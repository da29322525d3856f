"""Status words that the settings teach: each with the word of the API that it stands for."""

import json

from worker.core.plain_text import plain_text
from worker.vendor.replies import MAPPABLE_STATUSES

MAX_WORD = 100  # characters of a status that are looked at
MAX_WORDS = 1_000
EXAMPLE = '{"done": "success"}'


def parse_status_words(text: str) -> dict[str, str]:
    """Return the words in a JSON object, in lower case. Raises ValueError that says what to do.

    >>> parse_status_words('{" Done ": "SUCCESS"}')
    {'done': 'success'}
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise ValueError(f"must be a JSON object of status words and their meanings, for example {EXAMPLE}")
    words: dict[str, str] = {}
    for name, meaning in given.items():
        word = plain_text(name.strip()).strip().lower()
        if not 0 < len(word) <= MAX_WORD:
            raise ValueError(f"has a word of {len(word)} characters: a status word has 1 to {MAX_WORD}")
        means = meaning.strip().lower() if isinstance(meaning, str) else ""
        if means not in MAPPABLE_STATUSES:
            raise ValueError(
                f"must say for {word[:60]!r} one of {', '.join(sorted(MAPPABLE_STATUSES))}, for example {EXAMPLE}"
            )
        if word in MAPPABLE_STATUSES and means != word:
            raise ValueError(f"can't give {word!r} another meaning: it teaches words that the worker does not know")
        if words.setdefault(word, means) != means:
            raise ValueError(f"gives {word[:60]!r} two meanings: small and capital letters are the same")
    if len(words) > MAX_WORDS:
        raise ValueError(f"has {len(words)} words: {MAX_WORDS} at most")
    return words
