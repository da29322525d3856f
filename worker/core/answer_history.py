"""The last answers about a job, as one text keeps them: newest first, each with the job's age then. Pure."""

import re
from dataclasses import dataclass

KEPT = 600  # characters
BETWEEN = "\N{SYMBOL FOR NEWLINE}"  # one that can be printed, as all text in the tables
_LINE = re.compile(r"(\d{1,12}\.\d) s: (.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the API said when a job was `age` seconds old; None where that was not noted."""

    age: float | None
    note: str


def answer_line(age: float, note: str) -> str:
    """One answer, of KEPT characters at most.

    >>> answer_line(12.34, "processing")
    '12.3 s: processing'
    """
    return f"{max(age, 0.0):.1f} s: {note.replace(BETWEEN, ' ')}"[:KEPT]


def answers(kept: str | None) -> list[Answer]:
    """The answers that a text holds, newest first. The last of them may be cut short.

    >>> answers(f"12.3 s: processing{BETWEEN}4.0 s: processing")
    [Answer(age=12.3, note='processing'), Answer(age=4.0, note='processing')]
    >>> answers("processing"), answers(None)
    ([Answer(age=None, note='processing')], [])
    """
    return [_answer(line) for line in (kept or "").split(BETWEEN) if line]


def _answer(line: str) -> Answer:
    found = _LINE.fullmatch(line)
    return Answer(None, line) if found is None else Answer(float(found[1]), found[2])
