"""The transactions that claim and release jobs for one poller."""

import logging
import random
import time
from collections.abc import Container, Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection, Engine

from worker.coordination.leases import LeaseKeeper
from worker.core import circuit_breaker
from worker.core.circuit_breaker import Scope
from worker.polling.api_client import ApiClient
from worker.store.breakers import locked_breaker, save_breaker
from worker.store.claims import ClaimedJob, claim_jobs, release_claimed_jobs, release_jobs
from worker.store.due_groups import DueGroup
from worker.store.engine import RELAXED, database_now
from worker.store.jobs import readdress

log = logging.getLogger(__name__)

PROBE_MARGIN = timedelta(seconds=5)  # beyond the request's time-out: to write the answer before another process probes
REFUSED_WAIT = timedelta(seconds=60)  # until the next claim of a job whose address is refused: settings may change
MOVED_WAIT = timedelta(seconds=1)  # until the next claim of a job with a new address


class JobClaims:
    """Claims and releases jobs. Not thread-safe: call it from the poll loop only.

    If the database fails, `release` and `release_unconfirmed` raise its error and continue at their next call.
    """

    def __init__(
        self, engine: Engine, api: ApiClient, leases: LeaseKeeper, *, api_timeout: float, rng: random.Random
    ) -> None:
        self._engine = engine
        self._relaxed = engine.execution_options(**{RELAXED: True})  # a claim that is rolled back is made again
        self._api = api
        self._leases = leases
        self._probe_lease = timedelta(seconds=api_timeout) + PROBE_MARGIN
        self._rng = rng
        self._unconfirmed_tokens: list[str] = []
        self._unreleased: list[ClaimedJob] = []
        self._renewing_leases = False

    def keep_leases(self, active: bool) -> None:
        """Have the leases renewed while the poller is `active`: while it has claimed jobs."""
        if active != self._renewing_leases:
            if active:
                self._leases.hold()
            else:
                self._leases.drop()
            self._renewing_leases = active

    def claim(
        self,
        due: Mapping[str, Sequence[DueGroup]],
        granted: Mapping[str, int],
        room: dict[str, int],
        short_accounts: Container[str],
    ) -> dict[str, list[ClaimedJob]]:
        """Claim jobs of each account: as many as were granted, and as there is room for at their hosts.

        Of `short_accounts`, the most urgent jobs are claimed.
        """
        claimed: dict[str, list[ClaimedJob]] = {account: [] for account, count in granted.items() if count}
        if not claimed:
            return claimed
        began = time.monotonic()
        token = self._new_token()
        with self._relaxed.begin() as connection:
            now = database_now(connection)
            for account in claimed:
                for group in due[account]:
                    limit = min(granted[account] - len(claimed[account]), room[group.host])
                    if limit > 0:
                        group_jobs = self._claim_group(
                            connection, group, limit, now, token, urgent=account in short_accounts
                        )
                        room[group.host] -= len(group_jobs)
                        claimed[account] += self._permitted(connection, group_jobs, now)
        self._unconfirmed_tokens.clear()
        log.debug("claimed jobs=%s ms=%.1f", sum(map(len, claimed.values())), 1e3 * (time.monotonic() - began))
        return claimed

    def claim_probe(self, groups: Sequence[DueGroup], probed: Sequence[tuple[Scope, str]]) -> list[ClaimedJob]:
        """Claim one job as a probe of these circuit breakers, if no other process probes them and a job is due."""
        token = self._new_token()
        with self._engine.begin() as connection:
            now = database_now(connection)
            breakers = [locked_breaker(connection, scope, name) for scope, name in probed]
            jobs: list[ClaimedJob] = []
            if all(breaker.allows(now) == "probe" for breaker in breakers):
                for group in groups:
                    if not jobs:
                        jobs = self._permitted(connection, self._claim_group(connection, group, 1, now, token), now)
            if jobs:
                for breaker in breakers:
                    save_breaker(
                        connection, circuit_breaker.with_probe_started(breaker, now=now, lease=self._probe_lease)
                    )
        self._unconfirmed_tokens.clear()
        return jobs

    def _new_token(self) -> str:
        """Return a token for a claim. It counts as unconfirmed until the claim's transaction is committed."""
        token = self._leases.new_token()
        self._unconfirmed_tokens.append(token)
        return token

    def _claim_group(
        self, connection: Connection, group: DueGroup, limit: int, now: datetime, token: str, *, urgent: bool = False
    ) -> list[ClaimedJob]:
        late = max(now - group.due_at, timedelta(0))
        around = [now - late * self._rng.random() for _ in range(2)] if urgent else ()
        return claim_jobs(
            connection,
            group,
            limit=limit,
            token=token,
            holder=self._leases.holder,
            lease=self._leases.lease,
            now=now,
            around=around,
        )

    def _permitted(self, connection: Connection, jobs: Sequence[ClaimedJob], now: datetime) -> list[ClaimedJob]:
        """Return the jobs whose address may still get the key. The others are released without a request."""
        permitted = []
        for job in jobs:
            refusal = self._api.permits(job.address, job.remote_id)
            if refusal is None:
                permitted.append(job)
                continue
            address = self._api.corrected_address(job.address, job.remote_id)
            if address is not None and readdress(connection, [job.id], address.base, address.host):
                release_jobs(connection, [job.id], job.token, due_at=now + MOVED_WAIT)
                continue
            log.error("a job's fetch address is refused job=%s reason=%s", job.id, refusal)
            release_jobs(connection, [job.id], job.token, due_at=now + REFUSED_WAIT)
        return permitted

    def release(self, jobs: Sequence[ClaimedJob]) -> None:
        """Release jobs that were not polled, and those of calls that failed: they are due again at once."""
        self._unreleased += jobs
        if not self._unreleased:
            return
        by_token: dict[str, list[int]] = {}
        for job in self._unreleased:
            by_token.setdefault(job.token, []).append(job.id)
        with self._engine.begin() as connection:
            now = database_now(connection)
            for token, ids in by_token.items():
                release_jobs(connection, ids, token, due_at=now)
        self._unreleased.clear()

    def release_unconfirmed(self) -> None:
        """Release the claims of a transaction of which it is unknown whether it was committed."""
        if self._unconfirmed_tokens:
            with self._engine.begin() as connection:
                released = release_claimed_jobs(
                    connection, self._leases.holder, self._unconfirmed_tokens, now=database_now(connection)
                )
            self._unconfirmed_tokens.clear()
            if released:
                log.warning("claims whose commit was interrupted are released jobs=%s", released)
