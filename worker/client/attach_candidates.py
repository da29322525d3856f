"""Candidates for an uncertain order: recent outputs at the API that no job here knows. Nothing is attached."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from pydantic import SecretStr

from worker.client.connection import cached_settings, existing_job, transaction
from worker.coordination.rate_limiter import RateLimiter
from worker.core.circuit_breaker import CircuitBreaker, Scope
from worker.core.redaction.masking import mask_personal_data
from worker.errors import NotTrackable, Unavailable
from worker.polling.api_client import ApiClient
from worker.settings import Settings
from worker.store.breakers import all_breakers
from worker.store.candidates import known_remote_ids
from worker.store.engine import database_now
from worker.store.jobs import job_row
from worker.store.orders import order_row
from worker.system.redaction import shared_scrubber
from worker.vendor.order_endpoint import order_target
from worker.vendor.recent_outputs import (
    LIST_PATHS,
    ListPage,
    ListReply,
    ListRequest,
    NoSuchList,
    OutputType,
    RecentOutput,
    output_type_of,
)

MAX_CANDIDATES = 20
MAX_PAGES = 5  # requests per call: the list can be as long as the history of the account
MAX_LINKS = 10  # of one candidate
BUDGET_SECONDS = 10.0  # the longest wait for the request budget, which polls may use up
_OLDEST = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A remote job that may be that of the order. `outputs` is their number, `links` are the first of them."""

    remote_id: str
    created_at: datetime | None
    outputs: int
    links: tuple[str, ...]


class Candidates(NamedTuple):
    """The candidates for a job, newest first. `known` counts the listed remote ids that jobs here have already."""

    job_id: int
    sent_at: datetime | None
    output_type: OutputType
    found: tuple[Candidate, ...]
    known: int


class _Query(NamedTuple):
    """What to ask the API. `rate` is in requests per second."""

    job_id: int
    account: str
    sent_at: datetime | None
    request: ListRequest
    key: SecretStr
    rate: float


def attach_candidates(job_id: int) -> Candidates:
    """Ask the API for its recent outputs, and return those that may be the job of an uncertain order.

    The requests count in the request budget of the account, and a hold of the account or the host prevents them.
    Raises JobNotFound, NotTrackable if the job is not uncertain or makes nothing that the API lists, and Unavailable if
    the API can't be asked or does not give the list.
    """
    settings = cached_settings()
    query = _query(settings, job_id)
    known, unknown = set[str](), dict[str, RecentOutput]()
    for page in _pages(settings, query):
        ids = [output.remote_id for output in page.outputs]
        with transaction(settings) as connection:
            known |= known_remote_ids(connection, query.account, ids)
        unknown |= {output.remote_id: output for output in page.outputs if output.remote_id not in known}
        if len(unknown) >= MAX_CANDIDATES:
            break
    newest = list(unknown.values())
    if all(output.created_at for output in newest):
        newest.sort(key=lambda output: output.created_at or _OLDEST, reverse=True)
    found = tuple(
        Candidate(output.remote_id, output.created_at, len(output.urls), output.urls[:MAX_LINKS])
        for output in newest[:MAX_CANDIDATES]
    )
    return Candidates(query.job_id, query.sent_at, query.request.output_type, found, len(known))


def _query(settings: Settings, job_id: int) -> _Query:
    """Read what to ask for. Raises an error if the API can't, or must not, be asked about this job."""
    with transaction(settings) as connection:
        job_id = existing_job(connection, job_id)
        job, order = job_row(connection, job_id), order_row(connection, job_id)
        breakers, now = all_breakers(connection), database_now(connection)
    if job is None or order is None or job.status != "uncertain":
        raise NotTrackable(f"job {job_id} is not uncertain")
    target = order_target(order.endpoint, settings.api)
    output_type = output_type_of(target.order.family, job.kind)
    if output_type is None:
        raise NotTrackable(
            f"the API lists recent images, videos and audio, and job {job_id} ({job.kind}) makes something else: look"
            f" for its remote id at the API, and name it: `fetch-worker attach {job_id} REMOTE_ID`"
        )
    account = job.account
    key = settings.keys.get(account)
    if key is None:
        raise Unavailable(f"no key for account {account}: set SD_API_KEY, SD_API_KEYS or SD_API_KEYS_FILE")
    breaker = breakers.get(("account", account), CircuitBreaker("account", account))
    _check_hold(breakers, "account", account, now)
    _check_hold(breakers, "host", target.host, now)
    request = ListRequest(target.order.site, LIST_PATHS[0], output_type)
    rate = breaker.rate(settings.rps(account), now)
    return _Query(job_id, account, order.attempted_at, request, key, rate)


def _check_hold(breakers: dict[tuple[Scope, str], CircuitBreaker], scope: Scope, name: str, now: datetime) -> None:
    breaker = breakers.get((scope, name))
    if breaker is not None and breaker.held(now):
        reason = mask_personal_data(breaker.why or "")
        raise Unavailable(f"the {scope} {name} is held ({reason}): `fetch-worker status` says until when")


def _pages(settings: Settings, query: _Query) -> Iterator[ListPage]:
    """Yield pages of the list, until one has nothing new. Raises Unavailable if there is no first page."""
    client = ApiClient(
        settings.api,
        shared_scrubber(settings.secret_texts),
        timeout=settings.sd_api_timeout,
        connections=1,
        ca_bundle=settings.ca_bundle,
        proxy=settings.proxy,
        user_agent=settings.user_agent,
    )
    limiter = RateLimiter(settings.redis)
    with closing(client.session):
        request, page = _first_page(client, limiter, query)
        seen = set[str]()
        while not seen.issuperset(ids := {output.remote_id for output in page.outputs}):
            yield page
            seen |= ids
            if page.is_last or request.page == MAX_PAGES:
                return
            request = request._replace(page=request.page + 1)
            try:
                reply = _ask(client, limiter, query, request)
            except Unavailable:
                return  # the pages so far are of use
            if not isinstance(reply, ListPage):
                return
            page = reply


def _first_page(client: ApiClient, limiter: RateLimiter, query: _Query) -> tuple[ListRequest, ListPage]:
    """Return the first page, and the request for it: with the first path that the API has."""
    reply: ListReply | None = None
    for path in LIST_PATHS:
        request = query.request._replace(path=path)
        reply = _ask(client, limiter, query, request)
        if isinstance(reply, ListPage):
            return request, reply
        if not isinstance(reply, NoSuchList):
            raise Unavailable(f"the API does not give its list of recent outputs: {reply.message}")
    raise Unavailable(f"the API has no list of recent outputs for account {query.account}")


def _ask(client: ApiClient, limiter: RateLimiter, query: _Query, request: ListRequest) -> ListReply:
    """Send one request when the budget of the account allows it. Raises Unavailable if it does not, or no answer comes.

    An accepted request counts for the learned rate, as a poll does.
    """
    _wait_for_budget(limiter, query)
    reply = client.recent_outputs(request, query.key)
    if isinstance(reply, ListPage):
        limiter.count_accepted(query.account, 1)
    return reply


def _wait_for_budget(limiter: RateLimiter, query: _Query) -> None:
    give_up_at = time.monotonic() + BUDGET_SECONDS
    while True:
        reservation = limiter.take(query.account, 1, rate=query.rate)
        if reservation.send_times:
            time.sleep(max(0.0, reservation.send_times[0] - time.monotonic()))
            return
        if time.monotonic() + reservation.wait > give_up_at:
            raise Unavailable(f"the request budget of account {query.account} is used up: try again later")
        time.sleep(max(reservation.wait, 0.01))
