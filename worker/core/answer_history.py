"""The last answers about a job, stored as one text: newest first, each with the age of the job. Pure."""

import re
from dataclasses import dataclass

MAX_NOTE = 600  # characters
NOTE_SEPARATOR = "\N{SYMBOL FOR NEWLINE}"  # printable, like all text in the tables
_LINE = re.compile(r"(\d{1,12}\.\d) s: (.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class AnswerNote:
    """A note about an answer. `age` is the age of the job in seconds, or None if it was not stored."""

    age: float | None
    note: str


def format_note(age: float, note: str) -> str:
    """Return one answer as text, at most MAX_NOTE characters.

    >>> format_note(12.34, "processing"), format_note(-0.0, "processing")
    ('12.3 s: processing', '0.0 s: processing')
    """
    return f"{max(0.0, age):.1f} s: {note.replace(NOTE_SEPARATOR, ' ')}"[:MAX_NOTE]


def parse_history(history: str | None) -> list[AnswerNote]:
    """Return the answers in a stored text, newest first. The last one may be cut off.

    >>> parse_history(f"12.3 s: processing{NOTE_SEPARATOR}4.0 s: processing")
    [AnswerNote(age=12.3, note='processing'), AnswerNote(age=4.0, note='processing')]
    >>> parse_history("processing"), parse_history(None)
    ([AnswerNote(age=None, note='processing')], [])
    """
    return [_answer(line) for line in (history or "").split(NOTE_SEPARATOR) if line]


def _answer(line: str) -> AnswerNote:
    match = _LINE.fullmatch(line)
    return AnswerNote(None, line) if match is None else AnswerNote(float(match[1]), match[2])
