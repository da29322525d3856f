"""Which answers are kept: those that no rule reads, and the one that a job ends by without an output."""

from collections.abc import Callable, Sequence

from worker.core.lifecycle import EndJob
from worker.core.reply import RawAnswer, Unread
from worker.polling.kept_text import KeptText
from worker.polling.request_pool import PollAnswer
from worker.store.kept_answers import KeptAnswer
from worker.store.results import Outcome


def kept_answers(
    asked: Sequence[PollAnswer], outcomes: Sequence[Outcome], text: Callable[[RawAnswer], KeptText]
) -> list[KeptAnswer]:
    """Return what is to be kept of a batch. `text` makes of an answer what may be stored."""
    return [
        kept_answer(one, one.raw, text)
        for one, outcome in zip(asked, outcomes, strict=True)
        if one.raw is not None and (type(one.reply) is Unread or type(outcome.step) is EndJob)
    ]


def kept_answer(asked: PollAnswer, raw: RawAnswer, text: Callable[[RawAnswer], KeptText]) -> KeptAnswer:
    """Return an answer as it is kept."""
    kept = text(raw)
    return KeptAnswer(asked.job.id, raw.http_status, kept.shape, kept.text, type(asked.reply) is not Unread)
