"""The metrics: their names, help texts and values."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from worker import __version__
from worker.core import queues
from worker.core.answer_names import ANSWER_NAMES, metric_label
from worker.core.display import display_text
from worker.core.histograms import DELAYS, MORE, POLLS, TRANSFERS
from worker.core.lifecycle import FINAL_STATES
from worker.metrics.figures import Figures
from worker.operations.troubles import count_by_code, count_jobs_by_code
from worker.ordering.order_recorder import NAMES as ORDER_ANSWERS
from worker.store.counters import (
    ANSWERS,
    ATTEMPTS,
    DELAY,
    FINISHED,
    LEFT_OUT,
    ORDERS,
    POLLED,
    TRANSFER,
    WEBHOOKS,
    CounterKey,
    Total,
)
from worker.store.reports.stats import STATES

PREFIX = "fetch_worker_"
TROUBLES = ("none", "storage", "http_error", "unreachable", "gone", "not_media", "truncated", "worker_crash")
ENDINGS = ("delivered", "failed")
GAUGE, COUNTER, HISTOGRAM = GaugeMetricFamily, CounterMetricFamily, HistogramMetricFamily

Row = tuple[Any, ...]  # the values of the labels, and the value; of a histogram the values of the labels, buckets, sum


class Definition(NamedTuple):
    """A metric: its type, its name without the prefix, its labels, and its help text."""

    family: Callable[..., Any]
    name: str
    labels: tuple[str, ...]
    text: str


METRICS = (
    Definition(GAUGE, "up", (),
        "Whether the database could be read and its tables have this version. If not, other figures are missing."),
    Definition(GAUGE, "build_info", ("version",), "The version of fetch-worker that serves these metrics."),
    Definition(GAUGE, "schema_info", ("schema",), "The version of the tables."),
    Definition(GAUGE, "troubles", ("code",),
        "Troubles by code, the same ones as `fetch-worker status` shows. The manual explains each code."),
    Definition(GAUGE, "trouble_jobs", ("code",),
        "Jobs, outputs or messages that the troubles of a code concern. Counting stops at 10,001 for each trouble."),
    Definition(GAUGE, "processes", ("queue",), "Running worker processes that consume a queue."),
    Definition(GAUGE, "redis_unreachable_processes", (), "Running worker processes that can't reach Redis."),
    Definition(GAUGE, "last_request_timestamp_seconds", (),
        "When a job was last polled; missing if none ever was."),
    Definition(GAUGE, "jobs", ("status",),
        "Jobs in the table by status. Jobs held by an operator are `held`, not `pending`. Final jobs decrease when "
        "rows are pruned; see fetch_worker_jobs_finished_total. Numbers of more than 100,000 jobs are "
        "at most half a minute old, also in the other metrics."),
    Definition(GAUGE, "jobs_unfinished", ("account", "kind", "status"),
        "Jobs that are not final: ordered, uncertain, pending, held by an operator or downloading. Above 100,000 jobs "
        "the kind of pending and held ones is other."),
    Definition(GAUGE, "orders_waiting", ("account",),
        "Orders that wait to be sent, including those of held accounts and hosts. Counting stops at 10,001."),
    Definition(GAUGE, "orders_at_api", ("account",),
        "Orders that take a slot: they are being sent, or the API works on their job."),
    Definition(GAUGE, "order_slots", ("account",),
        "Orders of the account that may wait at the API at once, from SD_API_SLOTS or as its refusals showed."),
    Definition(GAUGE, "orders_uncertain", ("account",),
        "Orders that were sent and whose answer is lost. `fetch-worker list --status uncertain` lists them."),
    Definition(COUNTER, "orders", ("account", "answer"),
        "Orders that were sent, by the class of the answer; one that was not taken counts each time that it is sent."),
    Definition(GAUGE, "jobs_due", ("account",),
        "Jobs that are due for a poll and not claimed, including those of held accounts and hosts."),
    Definition(GAUGE, "oldest_due_seconds", (),
        "Seconds since the oldest job became due that may be polled now; 0 if there is none. Held jobs don't count."),
    Definition(GAUGE, "account_oldest_due_seconds", ("account",),
        "Seconds since the oldest job of the account became due that may be polled now."),
    Definition(COUNTER, "jobs_finished", ("account", "kind", "status"),
        "Jobs that became final, by final status. A retried job counts again when it becomes final again."),
    Definition(HISTOGRAM, "detection_delay_seconds", ("account", "kind"),
        "Seconds from ready to seen, estimated from the polls."),
    Definition(HISTOGRAM, "job_polls", ("account", "kind"), "Requests about a job until it was ready or final."),
    Definition(GAUGE, "budget_configured_requests_per_second", ("account",),
        "SD_API_RPS in the worker processes, as they recorded it."),
    Definition(GAUGE, "budget_requests_per_second", ("account",),
        "Requests per second that the account may make now. Lower than configured after the API refused requests."),
    Definition(GAUGE, "budget_ceiling_requests_per_second", ("account",),
        "Requests per second that the API accepted when it last refused one for the rate; missing if it never did."),
    Definition(GAUGE, "hold", ("scope", "name", "reason"),
        "1 for each held account or host, by reason; missing if it is not held. `fetch-worker status` shows the "
        "message of the API."),
    Definition(GAUGE, "hold_since_timestamp_seconds", ("scope", "name", "reason"), "Start of the hold."),
    Definition(COUNTER, "api_answers", ("account", "answer"),
        "Recorded answers of the API, by class. Answers that a process received before a crash may be missing."),
    Definition(GAUGE, "outputs_unstored", ("trouble",),
        "Outputs that are not stored yet, by the code of their last error."),
    Definition(GAUGE, "outputs_unstored_oldest_seconds", (),
        "Seconds since the oldest output that is not stored was first seen; 0 if there is none."),
    Definition(COUNTER, "download_attempts", ("outcome",),
        "Finished download attempts, by outcome: stored, or the code of the error."),
    Definition(COUNTER, "outputs_left_out", ("account",),
        "Outputs beyond the first 1,000 of an answer, which are not stored."),
    Definition(COUNTER, "stored_bytes", (), "Bytes of stored outputs."),
    Definition(HISTOGRAM, "download_duration_seconds", (),
        "Duration of the download attempts that stored their output."),
    Definition(GAUGE, "claims", ("scope",), "Jobs, outputs, webhooks and orders that are claimed by a process."),
    Definition(GAUGE, "claims_stuck", (),
        "Claims on jobs and outputs whose lease ended more than 30 s plus RECOVERY_SECONDS ago."),
    Definition(GAUGE, "webhooks_pending", (), "Webhooks that are not delivered yet."),
    Definition(GAUGE, "webhooks_refused", (), "Pending webhooks that the receiver has refused so far."),
    Definition(GAUGE, "webhooks_late", (),
        "Webhooks that are due for more than a minute and were not sent."),
    Definition(COUNTER, "webhooks_ended", ("outcome",),
        "Finished webhooks: delivered, or given up after a day or a 410."),
    Definition(GAUGE, "scrape_duration_seconds", (), "Duration of this scrape, including the database queries."),
)  # fmt: skip


def registry(get: Callable[[], Figures | None]) -> CollectorRegistry:
    """Return a registry with these metrics only. It calls `get` for each scrape."""
    metrics = CollectorRegistry(auto_describe=False)
    metrics.register(_Collector(get))
    return metrics


class _Collector(Collector):
    def __init__(self, get: Callable[[], Figures | None]) -> None:
        self._get = get

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registering the collector does not read the database."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics. Without figures, `fetch_worker_up` is 0 and only metrics about the scrape are present."""
        started = time.perf_counter()
        figures = self._get()
        rows: dict[str, Any] = {"up": [((), float(figures is not None))], "build_info": [((__version__,), 1.0)]}
        if figures is not None:
            rows |= _rows(figures)
        rows["scrape_duration_seconds"] = [((), time.perf_counter() - started)]
        for definition in METRICS:
            if definition.name in rows:
                yield _metric(definition, rows[definition.name])


def _metric(definition: Definition, rows: Iterable[Row]) -> Metric:
    metric = definition.family(PREFIX + definition.name, definition.text, labels=definition.labels)
    for labels, *values in sorted(rows):
        metric.add_metric([display_text(label) for label in labels], *values)
    family: Metric = metric
    return family


def _rows(figures: Figures) -> dict[str, Any]:
    """Return the rows of each metric about the database, by its name."""
    stats, counters = figures.stats, figures.counters
    accounts = stats.accounts
    holds = [((hold.scope, hold.name, hold.reason), hold.since.timestamp()) for hold in stats.holds]
    orders = figures.work.orders.accounts.values()
    unstored = {group.code or "none": group.count for group in stats.unstored}
    attempts = list(_named(counters, ATTEMPTS))
    return {
        "schema_info": [((figures.schema,), 1.0)],
        "troubles": [((code,), count) for code, count in count_by_code(figures.troubles).items()],
        "trouble_jobs": [((code,), count) for code, count in count_jobs_by_code(figures.troubles).items()],
        "processes": [((queue,), len(figures.work.running(queue))) for queue in queues.ALL],
        "redis_unreachable_processes": [((), sum(not process.redis_answers for process in figures.work.running()))],
        "last_request_timestamp_seconds": [
            ((), moment.timestamp()) for moment in (figures.work.last_request_at,) if moment is not None
        ],
        "jobs": [((status,), stats.jobs[status]) for status in STATES],
        "jobs_unfinished": figures.unfinished.items(),
        "orders_waiting": [((order.account,), order.waiting) for order in orders],
        "orders_at_api": [((order.account,), order.taken) for order in orders],
        "order_slots": [((order.account,), order.slots) for order in orders],
        "orders_uncertain": [((order.account,), order.uncertain) for order in orders],
        "orders": _orders(counters, {order.account for order in orders}).items(),
        "jobs_due": [((account.name,), account.due) for account in accounts],
        "oldest_due_seconds": [((), stats.oldest_due)],
        "account_oldest_due_seconds": [((account.name,), account.oldest_due) for account in accounts],
        "jobs_finished": _finished(counters).items(),
        "detection_delay_seconds": _histogram(_named(counters, DELAY), DELAYS),
        "job_polls": _histogram(_named(counters, POLLED), POLLS),
        "budget_configured_requests_per_second": [((account.name,), account.configured) for account in accounts],
        "budget_requests_per_second": [((account.name,), account.rps) for account in accounts],
        "budget_ceiling_requests_per_second": [
            ((account.name,), account.ceiling) for account in accounts if account.ceiling is not None
        ],
        "hold": [(labels, 1.0) for labels, _ in holds],
        "hold_since_timestamp_seconds": holds,
        "api_answers": _answers(counters, {account.name for account in accounts}).items(),
        "outputs_unstored": [((code,), unstored.get(code, 0)) for code in {*TROUBLES, *unstored}],
        "outputs_unstored_oldest_seconds": [((), stats.oldest_unstored)],
        "download_attempts": ({("stored",): 0} | {(total.key.label,): total.times for total in attempts}).items(),
        "outputs_left_out": _left_out(counters, {account.name for account in accounts}).items(),
        "stored_bytes": [((), sum(total.total for total in attempts))],
        "download_duration_seconds": _histogram(_named(counters, TRANSFER), TRANSFERS, labelled=False),
        "claims": [((scope,), count) for scope, count in figures.claims.items()],
        "claims_stuck": [((), figures.stuck)],
        "webhooks_pending": [((), figures.webhooks.count)],
        "webhooks_refused": [((), figures.webhooks.refused)],
        "webhooks_late": [((), figures.webhooks_late)],
        "webhooks_ended": _ended(counters).items(),
    }


# Zeros are added, so that a first increase is visible.


def _finished(counters: Sequence[Total]) -> dict[tuple[str, str, str], int]:
    finished = {(key.account, key.kind, key.label): times for key, times in _counts(counters, FINISHED)}
    return {(account, kind, end): 0 for account, kind, _ in finished for end in FINAL_STATES} | finished


def _answers(counters: Sequence[Total], accounts: Iterable[str]) -> dict[tuple[str, str], int]:
    answers = {(key.account, metric_label(key.label)): times for key, times in _counts(counters, ANSWERS)}
    return {(account, name.metric): 0 for account in accounts for name in ANSWER_NAMES.values()} | answers


def _orders(counters: Sequence[Total], accounts: Iterable[str]) -> dict[tuple[str, str], int]:
    answers = {(key.account, key.label): times for key, times in _counts(counters, ORDERS)}
    return {(account, name): 0 for account in accounts for name in ORDER_ANSWERS.values()} | answers


def _left_out(counters: Sequence[Total], accounts: Iterable[str]) -> dict[tuple[str], int]:
    return {(account,): 0 for account in accounts} | {
        (key.account,): times for key, times in _counts(counters, LEFT_OUT)
    }


def _ended(counters: Sequence[Total]) -> dict[tuple[str], int]:
    return {(end,): 0 for end in ENDINGS} | {(key.label,): times for key, times in _counts(counters, WEBHOOKS)}


def _histogram(totals: Iterable[Total], bounds: Sequence[float], *, labelled: bool = True) -> list[Row]:
    """Return the rows of a histogram. One without labels is present from the beginning."""
    times: defaultdict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for total in totals:
        labels = (total.key.account, total.key.kind) if labelled else ()
        times[labels][total.key.label] = total.times
        sums[labels] += total.total
    all_labels = list(times) if labelled else [()]
    return [(labels, _cumulative(times[labels], bounds), sums[labels]) for labels in all_labels]


def _cumulative(times: dict[str, int], bounds: Sequence[float]) -> list[tuple[str, float]]:
    """Return cumulative buckets. Counts of buckets that no longer exist are added to the last one (+Inf)."""
    buckets, below = [], 0
    for bound in bounds:
        below += times.get(f"{bound:g}", 0)
        buckets.append((repr(bound), float(below)))
    return [*buckets, (MORE, float(sum(times.values())))]


def _named(counters: Iterable[Total], name: str) -> Iterator[Total]:
    return (total for total in counters if total.key.name == name)


def _counts(counters: Iterable[Total], name: str) -> Iterator[tuple[CounterKey, int]]:
    return ((total.key, total.times) for total in _named(counters, name))
