"""The last answers about a job, as one text keeps them: newest first, each with the job's age then. Pure."""

import re
from dataclasses import dataclass

MAX_NOTE = 600  # characters
NOTE_SEPARATOR = "\N{SYMBOL FOR NEWLINE}"  # one that can be printed, as all text in the tables
_LINE = re.compile(r"(\d{1,12}\.\d) s: (.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class AnswerNote:
    """What the API said when a job was `age` seconds old; None where that was not noted."""

    age: float | None
    note: str


def format_note(age: float, note: str) -> str:
    """One answer, of KEPT characters at most.

    >>> format_note(12.34, "processing")
    '12.3 s: processing'
    """
    return f"{max(age, 0.0):.1f} s: {note.replace(NOTE_SEPARATOR, ' ')}"[:MAX_NOTE]


def parse_history(kept: str | None) -> list[AnswerNote]:
    """The answers that a text holds, newest first. The last of them may be cut short.

    >>> parse_history(f"12.3 s: processing{BETWEEN}4.0 s: processing")
    [AnswerNote(age=12.3, note='processing'), AnswerNote(age=4.0, note='processing')]
    >>> parse_history("processing"), parse_history(None)
    ([AnswerNote(age=None, note='processing')], [])
    """
    return [_answer(line) for line in (kept or "").split(NOTE_SEPARATOR) if line]


def _answer(line: str) -> AnswerNote:
    found = _LINE.fullmatch(line)
    return AnswerNote(None, line) if found is None else AnswerNote(float(found[1]), found[2])
