"""Live snapshot for `top` and the admin overview: rates, holds, late work, downloads and problems."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from worker.operations.late_webhooks import LateWebhook
from worker.operations.troubles import Trouble
from worker.operations.unstored import UnstoredByHost
from worker.store.reports.work_state import HeldHost

NO_WORKER = "no worker polls"  # the reason of late jobs if no process makes requests


@dataclass(frozen=True, slots=True)
class Counted:
    """The number of jobs in a state. `more` means that counting stopped at this number."""

    state: str
    count: int
    more: bool


@dataclass(frozen=True, slots=True)
class AccountNow:
    """An account: the requests per second that it makes and may make, its orders and slots, and its hold, if held.

    `used` is `None` until two snapshots were read. `left` is the number of requests that can be sent at once, or `None`
    if Redis is not reachable. `until` is when the hold ends or is probed, or `None` if an operator must end it.
    """

    account: str
    used: float | None
    rps: float
    ceiling: float | None
    left: int | None
    ordered: int
    uncertain: int
    slots_taken: int
    slots: int
    reason: str | None
    since: datetime | None
    until: datetime | None


@dataclass(frozen=True, slots=True)
class LateJob:
    """A due job that was not polled: how late it is, why, and how long it is past its deadline, if it is."""

    id: int
    account: str
    kind: str
    late_seconds: float
    past_deadline_seconds: float | None
    why: str


@dataclass(frozen=True, slots=True)
class OverdueJob:
    """A job past its deadline that is not polled soon, and so does not expire."""

    id: int
    account: str
    kind: str
    past_deadline_seconds: float
    asked_in_seconds: float


@dataclass(frozen=True, slots=True)
class LostClaimNow:
    """A claim whose process will not complete the work, with its holder and whether that process is known to be dead.

    `over_seconds` is the time since the lease ended. It is negative while the lease still runs: then the process is
    dead, or has held the claim for longer than any work takes.
    """

    what: str
    id: int
    holder: str
    dead: bool
    over_seconds: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """A running download. `bytes` and `bytes_per_second` are `None` until they are known."""

    output_id: int
    job_id: int
    host: str
    attempts: int
    age_seconds: float | None
    bytes: int | None
    bytes_per_second: float | None
    holder: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A job that failed or expired."""

    id: int
    account: str
    kind: str
    status: str
    code: str
    at: datetime


@dataclass(frozen=True, slots=True)
class KindNow:
    """Jobs of a kind that became ready or final: the delay from ready to seen, and the requests per job."""

    account: str
    kind: str
    jobs: int
    delay_p50: float | None
    delay_p95: float | None
    polls_per_job: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of all work at one moment.

    `kinds_seconds` is the period that `kinds` covers, or `None` for all time. `asked_seconds` is the time since the
    last request for due work, or `None` if there never was one. `late` lists the latest of `late_count` jobs. `overdue`
    is empty if too many jobs are pending to check each of them.
    """

    at: datetime
    asked_seconds: float | None
    asking: int
    budget_known: bool
    troubles: Sequence[Trouble]
    jobs: Sequence[Counted]
    accounts: Sequence[AccountNow]
    hosts: Sequence[HeldHost]
    late: Sequence[LateJob]
    late_count: Counted
    overdue: Sequence[OverdueJob]
    claims: Sequence[LostClaimNow]
    transfers: Sequence[Transfer]
    unstored: Sequence[UnstoredByHost]
    unstored_more: bool
    webhooks: Sequence[LateWebhook]
    failures: Sequence[Failure]
    kinds: Sequence[KindNow]
    kinds_seconds: float | None
