"""The metrics: their names, help texts and values."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from worker import __version__
from worker.core.display import display_text
from worker.core.histograms import ANSWER_WORDS, DELAYS, MORE, POLLS, TRANSFERS
from worker.core.lifecycle import FINAL_STATES
from worker.metrics.figures import Figures
from worker.store.counters import (
    ANSWERS,
    ATTEMPTS,
    DELAY,
    FINISHED,
    LEFT_OUT,
    POLLED,
    TRANSFER,
    WEBHOOKS,
    CounterKey,
    Total,
)
from worker.store.reports.stats import STATES, Stats

PREFIX = "fetch_worker_"
TROUBLES = ("none", "storage", "http_error", "unreachable", "gone", "not_media", "truncated", "worker_crash")
ENDINGS = ("delivered", "failed")
Rows = Iterable[tuple[Sequence[str], float]]


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
        yield _gauge(
            "up",
            "Whether the database could be read and its tables have this version. If not, other figures are missing.",
            float(figures is not None),
        )
        yield _gauges(
            "build_info", "The version of fetch-worker that serves these metrics.", ["version"], [((__version__,), 1.0)]
        )
        if figures is not None:
            yield from _all(figures)
        duration = time.perf_counter() - started
        yield _gauge("scrape_duration_seconds", "Duration of this scrape, including the database queries.", duration)


def _all(figures: Figures) -> Iterator[Metric]:
    yield _gauges("schema_info", "The version of the tables.", ["schema"], [((figures.schema,), 1.0)])
    yield from _jobs(figures)
    yield from _accounts(figures)
    yield from _holds(figures.stats)
    yield from _answers(figures)
    yield from _downloads(figures)
    yield from _claims(figures)
    yield from _webhooks(figures)


def _jobs(figures: Figures) -> Iterator[Metric]:
    stats = figures.stats
    yield _gauges(
        "jobs",
        "Jobs in the table by status. Jobs held by an operator are `held`, not `pending`. Final jobs decrease when "
        "rows are pruned; see fetch_worker_jobs_finished_total.",
        ["status"],
        (((status,), stats.jobs[status]) for status in STATES),
    )
    yield _gauges(
        "jobs_unfinished",
        "Jobs that are pending, held by an operator or downloading. Above 100,000 jobs their kind is other.",
        ["account", "kind", "status"],
        figures.unfinished.items(),
    )
    yield _gauges(
        "jobs_due",
        "Jobs that are due for a poll and not claimed, including those of held accounts and hosts.",
        ["account"],
        (((account.name,), account.due) for account in stats.accounts),
    )
    yield _gauge(
        "oldest_due_seconds",
        "Seconds since the oldest job became due that may be polled now; 0 if there is none. Held jobs don't count.",
        stats.oldest_due,
    )
    yield _gauges(
        "account_oldest_due_seconds",
        "Seconds since the oldest job of the account became due that may be polled now.",
        ["account"],
        (((account.name,), account.oldest_due) for account in stats.accounts),
    )
    finished = {(key.account, key.kind, key.label): times for key, times in _counts(figures.counters, FINISHED)}
    zeros = {
        (account, kind, end): 0 for account, kind, _ in finished for end in FINAL_STATES
    }  # so that a first increase is visible
    yield _counter(
        "jobs_finished",
        "Jobs that became final, by final status. A retried job counts again when it becomes final again.",
        ["account", "kind", "status"],
        (zeros | finished).items(),
    )
    yield _histogram(
        "detection_delay_seconds",
        "Seconds from ready to seen, estimated from the polls.",
        ["account", "kind"],
        _named(figures.counters, DELAY),
        DELAYS,
    )
    yield _histogram(
        "job_polls",
        "Requests about a job until it was ready or final.",
        ["account", "kind"],
        _named(figures.counters, POLLED),
        POLLS,
    )


def _accounts(figures: Figures) -> Iterator[Metric]:
    accounts = figures.stats.accounts
    yield _gauges(
        "budget_configured_requests_per_second",
        "SD_API_RPS in the process that serves these metrics.",
        ["account"],
        (((account.name,), figures.full_rps(account.name)) for account in accounts),
    )
    yield _gauges(
        "budget_requests_per_second",
        "Requests per second that the account may make now. Lower than configured after the API refused requests.",
        ["account"],
        (((account.name,), account.rps) for account in accounts),
    )
    yield _gauges(
        "budget_ceiling_requests_per_second",
        "Requests per second that the API accepted when it last refused one for the rate; missing if it never did.",
        ["account"],
        (((account.name,), account.ceiling) for account in accounts if account.ceiling is not None),
    )


def _holds(stats: Stats) -> Iterator[Metric]:
    labels = ["scope", "name", "reason"]
    yield _gauges(
        "hold",
        "1 for each held account or host, by reason; missing if it is not held. `fetch-worker status` shows the "
        "message of the API.",
        labels,
        (((hold.scope, hold.name, hold.reason), 1.0) for hold in stats.holds),
    )
    yield _gauges(
        "hold_since_timestamp_seconds",
        "Start of the hold.",
        labels,
        (((hold.scope, hold.name, hold.reason), hold.since.timestamp()) for hold in stats.holds),
    )


def _answers(figures: Figures) -> Iterator[Metric]:
    answers = {
        (key.account, ANSWER_WORDS.get(key.label, key.label)): times
        for key, times in _counts(figures.counters, ANSWERS)
    }
    accounts = {account.name for account in figures.stats.accounts}
    zeros = {(account, word): 0 for account in accounts for word in ANSWER_WORDS.values()}
    yield _counter(
        "api_answers",
        "Recorded answers of the API, by class. Answers that a process received before a crash may be missing.",
        ["account", "answer"],
        (zeros | answers).items(),
    )


def _downloads(figures: Figures) -> Iterator[Metric]:
    stats = figures.stats
    unstored = {group.code or "none": group.count for group in stats.unstored}
    yield _gauges(
        "outputs_unstored",
        "Outputs that are not stored yet, by the code of their last error.",
        ["trouble"],
        (((code,), unstored.get(code, 0)) for code in sorted({*TROUBLES, *unstored})),
    )
    yield _gauge(
        "outputs_unstored_oldest_seconds",
        "Seconds since the oldest output that is not stored was first seen; 0 if there is none.",
        stats.oldest_unstored,
    )
    attempts = list(_named(figures.counters, ATTEMPTS))
    outcomes = {"stored": 0} | {total.key.label: total.times for total in attempts}
    yield _counter(
        "download_attempts",
        "Finished download attempts, by outcome: stored, or the code of the error.",
        ["outcome"],
        (((outcome,), times) for outcome, times in outcomes.items()),
    )
    zeros = {(account.name,): 0 for account in figures.stats.accounts}
    yield _counter(
        "outputs_left_out",
        "Outputs beyond the first 1,000 of an answer, which are not stored.",
        ["account"],
        (zeros | {(key.account,): times for key, times in _counts(figures.counters, LEFT_OUT)}).items(),
    )
    yield _counter("stored_bytes", "Bytes of stored outputs.", [], [((), sum(total.total for total in attempts))])
    yield _histogram(
        "download_duration_seconds",
        "Duration of the download attempts that stored their output.",
        [],
        _named(figures.counters, TRANSFER),
        TRANSFERS,
    )


def _claims(figures: Figures) -> Iterator[Metric]:
    yield _gauges(
        "claims",
        "Jobs and outputs that are claimed by a process.",
        ["scope"],
        (((scope,), count) for scope, count in figures.claims.items()),
    )
    yield _gauge(
        "claims_stuck",
        "Claims on jobs and outputs whose lease ended more than 30 s plus RECOVERY_SECONDS ago.",
        figures.stuck,
    )


def _webhooks(figures: Figures) -> Iterator[Metric]:
    yield _gauge("webhooks_pending", "Webhooks that are not delivered yet.", figures.webhooks.count)
    yield _gauge("webhooks_refused", "Pending webhooks that the receiver has refused so far.", figures.webhooks.refused)
    yield _gauge(
        "webhooks_late", "Webhooks that are due for more than a minute and were not sent.", figures.webhooks_late
    )
    ended = dict.fromkeys(ENDINGS, 0) | {key.label: times for key, times in _counts(figures.counters, WEBHOOKS)}
    yield _counter(
        "webhooks_ended",
        "Finished webhooks: delivered, or given up after a day or a 410.",
        ["outcome"],
        (((outcome,), times) for outcome, times in ended.items()),
    )


# ── types ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _gauges(name: str, text: str, labels: Sequence[str], rows: Rows) -> Metric:
    metric = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for values, value in sorted(rows):
        metric.add_metric([display_text(label) for label in values], value)
    return metric


def _counter(name: str, text: str, labels: Sequence[str], rows: Rows) -> Metric:
    metric = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for values, value in sorted(rows):
        metric.add_metric([display_text(label) for label in values], value)
    return metric


def _histogram(name: str, text: str, labels: Sequence[str], totals: Iterable[Total], bounds: Sequence[float]) -> Metric:
    metric = HistogramMetricFamily(PREFIX + name, text, labels=labels)
    times: defaultdict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for total in totals:
        key: tuple[str, ...] = (total.key.account, total.key.kind) if labels else ()
        times[key][total.key.label] = total.times
        sums[key] += total.total
    unlabelled: list[tuple[str, ...]] = [()]  # a histogram without labels is present from the beginning
    for key in sorted(times) if labels else unlabelled:
        metric.add_metric([display_text(label) for label in key], _cumulative(times[key], bounds), sums[key])
    return metric


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
