"""The kinds of work that the worker of the test kit does: polls, orders and downloads, one request at a time."""

import random
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from typing import Protocol

from pydantic import SecretStr
from sqlalchemy import Engine

from worker.coordination.leases import LeaseKeeper
from worker.coordination.rate_limiter import RateLimiter, Reservation
from worker.core.pacing.backlog import OrderBacklog
from worker.downloads.downloader import Downloader
from worker.downloads.options import download_options
from worker.errors import WorkerError
from worker.net.address_guard import Guard, guarded_adapter
from worker.net.pooled_adapter import PooledAdapter
from worker.ordering.candidate_checks import CandidateChecks
from worker.ordering.options import AfterRecording, order_options
from worker.ordering.order_client import OrderClient
from worker.ordering.submitter import Submitter
from worker.polling.api_client import MAX_ANSWER_BYTES, ApiClient
from worker.polling.options import AfterCommit, PollOptions
from worker.polling.poller import Poller
from worker.settings import Settings
from worker.storage.select import storage_for
from worker.store.candidates import accounts_with_candidates, next_candidate
from worker.store.due_work import due_outputs, next_download, next_request, waiting_jobs
from worker.store.engine import database_now
from worker.store.orders import accounts_with_orders, next_order
from worker.system.redaction import Scrubber, shared_scrubber
from worker.testing.stand_in import KEY, FetchApi

LEASE = timedelta(days=365)  # longer than any jump of the clock: no other process claims jobs here


class KitError(WorkerError):
    """The test kit cannot continue. The message says what to do."""


class Work(Protocol):
    """One kind of work that worker processes do."""

    def do(self) -> bool:
        """Do what is due now. Return whether there was anything to do."""
        ...

    def next(self, after: datetime) -> datetime | None:
        """Return when the next work is due, or None if there is none."""
        return None


class PollWork(Work):
    """The work of `worker.poll`, one request at a time, so that the order of requests is the same in every run."""

    def __init__(self, engine: Engine, settings: Settings, api: FetchApi) -> None:
        self._engine = engine
        self._api = api
        self._keys: dict[str, SecretStr] = {}
        self._poller = Poller(
            engine=engine,
            api=_api_client(settings),
            budget=_NoRateLimit(),
            leases=_Leases(engine, lease=LEASE),
            options=_poll_options(settings, self._keys),
            after_commit=AfterCommit(queue_downloads=_do_nothing, notify=_do_nothing),
            rng=random.Random(0),  # the same poll times in every run of a test
        )

    def do(self) -> bool:
        with self._engine.connect() as connection:
            now = database_now(connection)
            jobs = waiting_jobs(connection)
        if all(job.due_at > now for job in jobs):
            return False
        self._api.expect((job.remote_id, job.submitted_at) for job in jobs)
        self._keys.update({job.account: SecretStr(KEY) for job in jobs})  # every account in a test has a key
        polled = self._poller.poll_once().asked
        if self._poller.unwritten:
            raise KitError("an open transaction of your test locks a job's row: commit it or roll it back first")
        return polled > 0

    def next(self, after: datetime) -> datetime | None:
        with self._engine.connect() as connection:
            return next_request(connection, after=after)

    def close(self) -> None:
        """End its thread."""
        self._poller.close()


class OrderWork(Work):
    """The work of `worker.submit`, one request at a time."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._keys: dict[str, SecretStr] = {}
        options = replace(order_options(settings), keys=self._keys, threads=1)
        self._submitter = Submitter(
            engine=engine,
            client=OrderClient(options, _scrubber(settings), adapters()[0]),
            budget=_NoRateLimit(),
            leases=_Leases(engine, lease=LEASE),
            options=options,
            backlog=OrderBacklog(),
            after=AfterRecording(poll=lambda: None, queue_downloads=_do_nothing, notify=_do_nothing),
            rng=random.Random(0),
        )

    def do(self) -> bool:
        with self._engine.connect() as connection:
            accounts = accounts_with_orders(connection)
        if not accounts:
            return False
        self._keys.update({account: SecretStr(KEY) for account in accounts})  # every account in a test has a key
        return self._submitter.submit_once().sent > 0

    def next(self, after: datetime) -> datetime | None:
        with self._engine.connect() as connection:
            return next_order(connection, after=after)

    def close(self) -> None:
        """End its thread."""
        self._submitter.close()


class CandidateWork(Work):
    """The checks of the jobs that calls of the API's webhook name for uncertain orders."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._keys: dict[str, SecretStr] = {}
        self._checks = CandidateChecks(
            engine=engine,
            api=_api_client(settings),
            budget=_NoRateLimit(),
            options=_poll_options(settings, self._keys),
            attached=lambda: None,
        )

    def do(self) -> bool:
        with self._engine.connect() as connection:
            accounts = accounts_with_candidates(connection)
        if not accounts:
            return False
        self._keys.update({account: SecretStr(KEY) for account in accounts})  # every account in a test has a key
        return self._checks.run() > 0

    def next(self, after: datetime) -> datetime | None:
        with self._engine.connect() as connection:
            return next_candidate(connection, after=after)


class DownloadWork(Work):
    """The work of `worker.download`."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._downloader = Downloader(
            engine=engine,
            leases=_Leases(engine, lease=LEASE),
            storage=storage_for(settings),
            guard=Guard(settings.allowed_networks),
            adapter=adapters()[1],
            scrubber=_scrubber(settings),
            options=download_options(settings),
            notify=_do_nothing,
            pause=_do_nothing,
        )

    def do(self) -> bool:
        with self._engine.connect() as connection:
            due = due_outputs(connection, now=database_now(connection))
        for output_id in due:
            self._downloader.run(output_id)
        return bool(due)

    def next(self, after: datetime) -> datetime | None:
        with self._engine.connect() as connection:
            return next_download(connection, after=after)


class _Leases(LeaseKeeper):
    """Leases without renewal, and so without a thread."""

    def hold(self) -> None:
        """Do nothing: no lease ends while a test runs."""

    drop = hold


class _NoRateLimit(RateLimiter):
    """A rate limiter without a limit. Answers of the API that refuse a request still hold the account."""

    def __init__(self) -> None:
        pass

    def take(self, account: str, requests: int, *, rate: float) -> Reservation:
        return Reservation((0.0,) * requests, 0.0, account)

    def give_back(self, reservation: Reservation, unused: int) -> None:
        pass

    def count_accepted(self, account: str, requests: int) -> float:
        return float(requests)


@cache
def adapters() -> tuple[PooledAdapter, PooledAdapter]:
    """Return the adapters for the API and for downloads. Made once per process: loading CA certificates is slow."""
    loopback = Settings(output_allowed_networks="127.0.0.0/8").allowed_networks
    return PooledAdapter(limit=MAX_ANSWER_BYTES, connections=1), guarded_adapter(Guard(loopback), connections=1)


def _api_client(settings: Settings) -> ApiClient:
    return ApiClient(
        settings.api,
        _scrubber(settings),
        timeout=settings.sd_api_timeout,
        connections=1,
        adapter=adapters()[0],
        status_words=settings.status_words,
    )


def _poll_options(settings: Settings, keys: Mapping[str, SecretStr]) -> PollOptions:
    return PollOptions(keys=keys, rps=settings.rps, pace=settings.pace, api_timeout=settings.sd_api_timeout, threads=1)


def _scrubber(settings: Settings) -> Scrubber:
    return shared_scrubber(settings.secret_texts)


def _do_nothing(_: object) -> None:
    """Replaces sending a message, and waiting, in a worker process."""
