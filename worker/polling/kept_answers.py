"""Selects the answers to store: those that no rule reads, and the one that ends a job without an output."""

from collections.abc import Callable, Sequence

from worker.core.lifecycle import EndJob
from worker.core.reply import RawAnswer, Unread
from worker.polling.kept_text import KeptText
from worker.polling.request_pool import PollAnswer
from worker.store.kept_answers import KeptAnswer
from worker.store.results import Outcome


def kept_answers(
    answers: Sequence[PollAnswer], outcomes: Sequence[Outcome], text: Callable[[RawAnswer], KeptText]
) -> list[KeptAnswer]:
    """Return the answers of a batch to store. `text` returns the text of an answer that may be stored."""
    return [
        kept_answer(answer, answer.raw, text)
        for answer, outcome in zip(answers, outcomes, strict=True)
        if answer.raw is not None and (type(answer.reply) is Unread or type(outcome.step) is EndJob)
    ]


def kept_answer(answer: PollAnswer, raw: RawAnswer, text: Callable[[RawAnswer], KeptText]) -> KeptAnswer:
    """Return an answer as it is stored."""
    kept_text = text(raw)
    return KeptAnswer(answer.job.id, raw.http_status, kept_text.shape, kept_text.text, type(answer.reply) is not Unread)
