"""What each class of answers is called: in JSON, in the counters, in the metrics, and for people. Pure."""

from collections.abc import Mapping
from typing import NamedTuple

from worker.core.reply import (
    AccountRefused,
    AnotherJob,
    ApiDown,
    ApiError,
    Empty,
    Failed,
    Processing,
    RateLimited,
    Ready,
    Reply,
    UnknownId,
    Unread,
)


class AnswerName(NamedTuple):
    """The names of a class of answers.

    `code` is in JSON documents, `counter` in the table of counters, `metric` a label of the metrics. These three are
    the same in all releases. `words` follow a number in a sentence for people: "9 not ready".
    """

    code: str
    counter: str
    metric: str
    words: str


ANSWER_NAMES: Mapping[type[Reply], AnswerName] = {
    Processing: AnswerName("processing", "processing", "processing", "not ready"),
    Ready: AnswerName("ready", "ready", "ready", "ready"),
    Empty: AnswerName("empty", "empty", "empty", "without output"),
    AnotherJob: AnswerName("another_job", "anotherjob", "another_job", "about another job"),
    Failed: AnswerName("failed", "failed", "failed", "failed"),
    UnknownId: AnswerName("unknown_id", "unknownid", "unknown_id", "unknown"),
    ApiError: AnswerName("api_error", "apierror", "api_error", "with an error"),
    Unread: AnswerName("unread", "odd", "odd", "not understood"),
    RateLimited: AnswerName("rate_limited", "ratelimited", "rate_limited", "rate limited"),
    AccountRefused: AnswerName("account_refused", "accountrefused", "account_refused", "account refused"),
    ApiDown: AnswerName("api_down", "apidown", "unreachable", "unreachable"),
}
_METRICS = {name.counter: name.metric for name in ANSWER_NAMES.values()}


def metric_label(counter: str) -> str:
    """Return the label in the metrics for a label in the table of counters.

    >>> metric_label("apidown"), metric_label("odd"), metric_label("of an older release")
    ('unreachable', 'odd', 'of an older release')
    """
    return _METRICS.get(counter, counter)


def describe_answers(counts: Mapping[type[Reply], int]) -> str:
    """Return how many answers of each class came, the most frequent class first.

    >>> describe_answers({Ready: 4, UnknownId: 1, Processing: 1_200})
    '1,200 not ready, 4 ready, 1 unknown'
    """
    classes = sorted((reply for reply in ANSWER_NAMES if counts.get(reply)), key=lambda reply: -counts[reply])
    return ", ".join(f"{counts[reply]:,} {ANSWER_NAMES[reply].words}" for reply in classes)
