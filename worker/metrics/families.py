"""The metrics: what each is called, what it means, and its figures out of a reading."""

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
from worker.metrics.reading import Reading
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


def registry(get: Callable[[], Reading | None]) -> CollectorRegistry:
    """A registry of our metrics alone, which takes a reading for each scrape."""
    made = CollectorRegistry(auto_describe=False)
    made.register(_Collector(get))
    return made


class _Collector(Collector):
    def __init__(self, get: Callable[[], Reading | None]) -> None:
        self._get = get

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering it reads nothing."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Takes a reading; where there is none, `fetch_worker_up` is 0 and nothing is said that nobody knows."""
        began = time.perf_counter()
        reading = self._get()
        yield _gauge(
            "up",
            "Whether the database could be read, with tables of this version: if not, there are no other figures.",
            float(reading is not None),
        )
        yield _gauges("build_info", "The version that these metrics come from.", ["version"], [((__version__,), 1.0)])
        if reading is not None:
            yield from _all(reading)
        took = time.perf_counter() - began
        yield _gauge("scrape_duration_seconds", "How long reading the database took, for this scrape.", took)


def _all(reading: Reading) -> Iterator[Metric]:
    yield _gauges("schema_info", "The version of the tables.", ["schema"], [((reading.schema,), 1.0)])
    yield from _jobs(reading)
    yield from _accounts(reading)
    yield from _holds(reading.standing)
    yield from _answers(reading)
    yield from _downloads(reading)
    yield from _claims(reading)
    yield from _webhooks(reading)


def _jobs(reading: Reading) -> Iterator[Metric]:
    state = reading.standing
    yield _gauges(
        "jobs",
        "Jobs in the table by status. Those that an operator holds are `held` here, not `pending`; final ones go down "
        "when rows are pruned, see fetch_worker_jobs_finished_total.",
        ["status"],
        (((status,), state.jobs[status]) for status in STATES),
    )
    yield _gauges(
        "jobs_unfinished",
        "Jobs that are pending, held by an operator, or downloading. Where more than 100,000 wait their kind is other.",
        ["account", "kind", "status"],
        reading.unfinished.items(),
    )
    yield _gauges(
        "jobs_due",
        "Jobs that are due to be asked about now, and nobody has taken yet; also those that a hold keeps.",
        ["account"],
        (((one.name,), one.due) for one in state.accounts),
    )
    yield _gauge(
        "oldest_due_seconds",
        "For how long the oldest job is due that may be asked about now; 0 if nothing is. What is held is not late.",
        state.oldest_due,
    )
    yield _gauges(
        "account_oldest_due_seconds",
        "The same by account.",
        ["account"],
        (((one.name,), one.oldest_due) for one in state.accounts),
    )
    finished = {(of.account, of.kind, of.label): times for of, times in _times(reading.counters, FINISHED)}
    none = {(account, kind, end): 0 for account, kind, _ in finished for end in FINAL_STATES}  # so that a first is seen
    yield _counter(
        "jobs_finished",
        "Jobs that became final, by final status. One that is retried and ends again counts again.",
        ["account", "kind", "status"],
        (none | finished).items(),
    )
    yield _histogram(
        "detection_delay_seconds",
        "Seconds from ready to seen, as far as the polls can tell.",
        ["account", "kind"],
        _of(reading.counters, DELAY),
        DELAYS,
    )
    yield _histogram(
        "job_polls",
        "Requests about one job, until it was ready or ended.",
        ["account", "kind"],
        _of(reading.counters, POLLED),
        POLLS,
    )


def _accounts(reading: Reading) -> Iterator[Metric]:
    accounts = reading.standing.accounts
    yield _gauges(
        "budget_configured_requests_per_second",
        "SD_API_RPS, as it is set where these metrics are served.",
        ["account"],
        (((one.name,), reading.full_rps(one.name)) for one in accounts),
    )
    yield _gauges(
        "budget_requests_per_second",
        "Requests per second that the account may make now: less than configured after a rate limit.",
        ["account"],
        (((one.name,), one.rps) for one in accounts),
    )
    yield _gauges(
        "budget_ceiling_requests_per_second",
        "What the API took when it last refused a request for being one too many; not there if it never did.",
        ["account"],
        (((one.name,), one.ceiling) for one in accounts if one.ceiling is not None),
    )


def _holds(state: Stats) -> Iterator[Metric]:
    labels = ["scope", "name", "reason"]
    yield _gauges(
        "hold",
        "1 for each account or host that is not asked now, by reason; not there if it is asked. `fetch-worker status` "
        "has the API's own words.",
        labels,
        (((one.scope, one.name, one.reason), 1.0) for one in state.holds),
    )
    yield _gauges(
        "hold_since_timestamp_seconds",
        "Since when it is held.",
        labels,
        (((one.scope, one.name, one.reason), one.since.timestamp()) for one in state.holds),
    )


def _answers(reading: Reading) -> Iterator[Metric]:
    counted = {
        (of.account, ANSWER_WORDS.get(of.label, of.label)): times for of, times in _times(reading.counters, ANSWERS)
    }
    accounts = {one.name for one in reading.standing.accounts}
    none = {(account, word): 0 for account in accounts for word in ANSWER_WORDS.values()}
    yield _counter(
        "api_answers",
        "Answers of the API that were recorded, by class. A call whose process died before that is not among them.",
        ["account", "answer"],
        (none | counted).items(),
    )


def _downloads(reading: Reading) -> Iterator[Metric]:
    state = reading.standing
    found = {one.code or "none": one.count for one in state.unstored}
    yield _gauges(
        "outputs_unstored",
        "Outputs that are paid for and not stored yet, by their last trouble.",
        ["trouble"],
        (((code,), found.get(code, 0)) for code in sorted({*TROUBLES, *found})),
    )
    yield _gauge(
        "outputs_unstored_oldest_seconds",
        "For how long the oldest of them is known; 0 if none is.",
        state.oldest_unstored,
    )
    attempts = list(_of(reading.counters, ATTEMPTS))
    outcomes = {"stored": 0} | {one.key.label: one.times for one in attempts}
    yield _counter(
        "download_attempts",
        "Download attempts that came to an end, by outcome: stored, or the code of the trouble.",
        ["outcome"],
        (((outcome,), times) for outcome, times in outcomes.items()),
    )
    none = {(one.name,): 0 for one in reading.standing.accounts}
    yield _counter(
        "outputs_left_out",
        "Outputs that an answer listed after its 1,000th, which are not stored.",
        ["account"],
        (none | {(of.account,): times for of, times in _times(reading.counters, LEFT_OUT)}).items(),
    )
    yield _counter("stored_bytes", "Bytes of outputs that were stored.", [], [((), sum(one.total for one in attempts))])
    yield _histogram(
        "download_duration_seconds",
        "Seconds of the attempts that stored their output.",
        [],
        _of(reading.counters, TRANSFER),
        TRANSFERS,
    )


def _claims(reading: Reading) -> Iterator[Metric]:
    yield _gauges(
        "claims",
        "What processes have taken and not finished yet.",
        ["scope"],
        (((scope,), count) for scope, count in reading.claims.items()),
    )
    yield _gauge(
        "claims_stuck",
        "Claims on jobs and outputs whose lease is over for more than 30 s and RECOVERY_SECONDS, and nobody took up.",
        reading.stuck,
    )


def _webhooks(reading: Reading) -> Iterator[Metric]:
    yield _gauge("webhooks_pending", "Webhooks that are not delivered yet.", reading.webhooks.count)
    yield _gauge("webhooks_refused", "Of those: tried, and not taken so far.", reading.webhooks.refused)
    yield _gauge("webhooks_late", "Due for more than a minute, and nobody sends them.", reading.webhooks_late)
    ended = dict.fromkeys(ENDINGS, 0) | {figure.label: times for figure, times in _times(reading.counters, WEBHOOKS)}
    yield _counter(
        "webhooks_ended",
        "Webhooks that came to an end: delivered, or given up after a day or a 410.",
        ["outcome"],
        (((outcome,), times) for outcome, times in ended.items()),
    )


# ── forms ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _gauges(name: str, text: str, labels: Sequence[str], rows: Rows) -> Metric:
    made = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for values, value in sorted(rows):
        made.add_metric([display_text(label) for label in values], value)
    return made


def _counter(name: str, text: str, labels: Sequence[str], rows: Rows) -> Metric:
    made = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for values, value in sorted(rows):
        made.add_metric([display_text(label) for label in values], value)
    return made


def _histogram(
    name: str, text: str, labels: Sequence[str], counted: Iterable[Total], bounds: Sequence[float]
) -> Metric:
    made = HistogramMetricFamily(PREFIX + name, text, labels=labels)
    times: defaultdict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for one in counted:
        key: tuple[str, ...] = (one.key.account, one.key.kind) if labels else ()
        times[key][one.key.label] = one.times
        sums[key] += one.total
    whole: list[tuple[str, ...]] = [()]  # one that has no labels is there from the beginning
    for key in sorted(times) if labels else whole:
        made.add_metric([display_text(label) for label in key], _cumulative(times[key], bounds), sums[key])
    return made


def _cumulative(times: dict[str, int], bounds: Sequence[float]) -> list[tuple[str, float]]:
    """Each bucket with all below it, as Prometheus wants them. What is in no bucket of now counts as beyond them."""
    found, below = [], 0
    for bound in bounds:
        below += times.get(f"{bound:g}", 0)
        found.append((repr(bound), float(below)))
    return [*found, (MORE, float(sum(times.values())))]


def _of(counters: Iterable[Total], name: str) -> Iterator[Total]:
    return (one for one in counters if one.key.name == name)


def _times(counters: Iterable[Total], name: str) -> Iterator[tuple[CounterKey, int]]:
    return ((one.key, one.times) for one in _of(counters, name))
