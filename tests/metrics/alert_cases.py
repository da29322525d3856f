"""Series of metrics, and the minutes at which each alert fires or is silent."""

from dataclasses import dataclass

Labels = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Case:
    """An alert, series with one value per minute, the minutes at which it fires or is silent, and its labels."""

    alert: str
    series: dict[str, str]
    fires: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()
    labels: Labels = ({},)


def hold(scope: str, name: str, reason: str, values: str) -> dict[str, str]:
    """Return the series of a hold."""
    return {f'fetch_worker_hold{{scope="{scope}", name="{name}", reason="{reason}"}}': values}


def trouble(code: str, values: str, jobs: str | None = None) -> dict[str, str]:
    """Return the series of a trouble: `values` are the numbers of troubles, `jobs` of jobs (by default the same)."""
    counts = {"troubles": values, "trouble_jobs": values if jobs is None else jobs}
    return {f'fetch_worker_{name}{{code="{code}"}}': counts[name] for name in counts}


def _delays(fast: str, slow: str) -> dict[str, str]:
    """Return the series for jobs seen within 5 s and within 300 s."""
    labels = 'account="shop", kind="image"'
    rows = {"5.0": fast, "300.0": slow, "+Inf": slow}
    buckets = {f'fetch_worker_detection_delay_seconds_bucket{{{labels}, le="{le}"}}': rows[le] for le in rows}
    return buckets | {f"fetch_worker_detection_delay_seconds_count{{{labels}}}": slow}


def _ended(completed: str, failed: str) -> dict[str, str]:
    series = 'fetch_worker_jobs_finished_total{account="shop", kind="image", status='
    return {f'{series}"completed"}}': completed, f'{series}"failed"}}': failed}


def _due(account: str, jobs: str, oldest: str, rps: str = "20x99") -> dict[str, str]:
    """Return the series of an account with due jobs, and its rate limit of 20 requests per second."""
    series = {
        "jobs_due": jobs,
        "account_oldest_due_seconds": oldest,
        "budget_requests_per_second": rps,
        "budget_configured_requests_per_second": "20x99",
    }
    return {f'fetch_worker_{name}{{account="{account}"}}': series[name] for name in series}


def _webhooks(refused: str, delivered: str) -> dict[str, str]:
    """Return the series of webhooks that wait and were refused, and of those that were delivered."""
    return {
        **trouble("webhooks_refused", "1x200", refused),
        "fetch_worker_webhooks_refused": refused,
        'fetch_worker_webhooks_ended_total{outcome="delivered"}': delivered,
    }


def _simple(alert: str, code: str, after: int) -> Case:
    """Return the case of an alert that fires during one kind of trouble, after some minutes, and during no other."""
    other = "no_worker" if code != "no_worker" else "storage"
    series = trouble(code, f"0x3 2x{after + 4} 0x2") | trouble(other, "1x60")
    return Case(alert, series, (4 + after, 8 + after), (3, 3 + after, 9 + after), ({"code": code},))


IMAGE = {"account": "shop", "kind": "image"}
SHOP = ({"account": "shop"},)
REFUSED = ({"scope": "account", "name": "shop", "reason": "key rejected"},)
SIMPLE = (
    ("FetchWorkerNoWorker", "no_worker", 2),
    ("FetchWorkerPollingStalled", "polling_stalled", 3),
    ("FetchWorkerUncertainOrders", "uncertain_orders", 5),
    ("FetchWorkerStorageRefuses", "storage", 2),
    ("FetchWorkerNoDownloader", "no_downloader", 3),
    ("FetchWorkerWrongPath", "wrong_path", 5),
    ("FetchWorkerApiOutage", "api_unreachable", 30),
    ("FetchWorkerApiUnreachable", "api_unreachable", 5),
    ("FetchWorkerHostNotAllowed", "host_not_allowed", 5),
    ("FetchWorkerOutputsUnreachable", "outputs_unreachable", 15),
    ("FetchWorkerWebhooksRefused", "webhooks_refused", 10),
    ("FetchWorkerWebhooksGivenUp", "webhooks_given_up", 1),
    ("FetchWorkerWebhooksLate", "webhooks_late", 5),
    ("FetchWorkerOnDoneRefused", "on_done_refused", 5),
    ("FetchWorkerOnDoneLate", "on_done_late", 5),
    ("FetchWorkerLostClaims", "lost_claims", 5),
    ("FetchWorkerPastDeadline", "past_deadline", 10),
)
CASES = [
    *(_simple(*row) for row in SIMPLE),
    Case("FetchWorkerMetricsDown", {}, fires=(3, 9), silent=(2,)),
    Case("FetchWorkerMetricsDown", {"fetch_worker_up": "1x4 0x4 1x9"}, fires=(8, 9), silent=(4, 7, 10)),
    Case("FetchWorkerMetricsDown", {"fetch_worker_up": "1x4 _x9"}, fires=(13,), silent=(4, 6)),
    Case(
        "FetchWorkerAccountRefused",
        hold("account", "shop", "key rejected", "_x2 1x9 _x9")
        | hold("account", "else", "rate limited", "1x20")
        | trouble("account_refused", "0x2 1x9 0x9", "0x2 1 0 0 0 1 0x9"),  # its only job is probed now and then
        fires=(5, 11),
        silent=(1, 3, 18),
        labels=REFUSED,
    ),
    Case("FetchWorkerAccountRefused", hold("account", "shop", "by hand", "1x20"), silent=(20,)),
    Case(  # an account that nobody uses
        "FetchWorkerAccountRefused",
        hold("account", "shop", "key rejected", "1x20") | trouble("account_refused", "1x20", "0x20"),
        silent=(20,),
    ),
    Case(
        "FetchWorkerNoKey",
        hold("account", "shop", "no key", "_x2 1x9"),
        fires=(5,),
        silent=(4,),
        labels=({"scope": "account", "name": "shop", "reason": "no key"},),
    ),
    Case(
        "FetchWorkerLinksEnding",
        trouble("links_ending", "0x3 1x9") | {"fetch_worker_outputs_unstored_oldest_seconds": "43000+60x12"},
        fires=(9,),
        silent=(3, 8),
    ),
    Case("FetchWorkerLinksEnding", {"fetch_worker_outputs_unstored_oldest_seconds": "7200x20"}, silent=(20,)),
    Case("FetchWorkerWebhooksRefusedLong", _webhooks("0x3 40x200", "0+5x200"), fires=(70,), silent=(3, 60)),
    Case("FetchWorkerWebhooksRefusedLong", _webhooks("1x200", "0x200"), fires=(61,), silent=(50,)),
    Case(  # one of a hundred is refused once
        "FetchWorkerWebhooksRefusedLong", _webhooks("6x200", "0+600x200"), silent=(100, 199)
    ),
    Case(
        "FetchWorkerBacklog",
        _due("shop", "12000x20", "0+60x20") | _due("else", "9x20", "0x20") | trouble("backlog", "0x3 1x9 0x9"),
        fires=(10, 12),
        silent=(3, 8, 15),
        labels=SHOP,
    ),
    Case(
        "FetchWorkerAccountSlowed",
        _due("shop", "0x99", "0x99", "20x9 5x40 18x99")
        | _due("else", "0x99", "0x99")
        | trouble("account_slowed", "1x99"),
        fires=(26, 49),
        silent=(9, 24, 55),
        labels=SHOP,
    ),
    Case("FetchWorkerRedisAway", {"fetch_worker_redis_unreachable_processes": "0x3 2x9"}, fires=(9,), silent=(3, 8)),
    Case(
        "FetchWorkerHeldByOperator",
        hold("account", "shop", "by hand", "1x400"),
        fires=(361,),
        silent=(300,),
        labels=({"scope": "account", "name": "shop", "reason": "by hand"},),
    ),
    Case("FetchWorkerDetectionDelayHigh", _delays("0+1x99", "0+10x99"), (60, 90), (10,), (IMAGE,)),
    Case("FetchWorkerDetectionDelayHigh", _delays("0+10x99", "0+10x99"), silent=(60, 90)),
    Case("FetchWorkerDetectionDelayHigh", _delays("0x99", "0+0.1x99"), silent=(60, 90)),
    Case("FetchWorkerJobsFail", _ended("0+6x99", "0+4x99"), (60,), (5,), (IMAGE,)),
    Case("FetchWorkerJobsFail", _ended("0+9x99", "0+1x99"), silent=(60,)),
    Case("FetchWorkerJobsFail", _ended("0x99", "0+0.2x99"), silent=(60,)),
]
