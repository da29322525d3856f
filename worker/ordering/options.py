"""How one process sends orders: its settings, its limits, and what it calls after a commit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import SecretStr

from worker.core.pacing.policy import Pace
from worker.settings import Settings
from worker.system.redaction import Scrubber, long_secret_scrubber
from worker.vendor.fetch_url import AllowedApi

MAX_SENDING = 64  # requests at once, of all accounts: each has a thread and a connection of its own
MAX_SENDING_PER_ACCOUNT = 32  # so that an account whose answers are slow leaves room for the others


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderOptions:
    """The settings for orders of one process.

    `keys` are the API keys by account, which can change at any time. `rps` returns the requests per second of an
    account, and `slots` the configured number of its slots, for all processes together. `timeout` is in seconds.
    `payload_secrets` finds keys in payloads.
    """

    api: AllowedApi
    keys: Mapping[str, SecretStr]
    rps: Callable[[str], float]
    slots: Callable[[str], int | None]
    pace: Pace
    timeout: float
    user_agent: str
    proxy: str | None
    status_words: Mapping[str, str]
    payload_secrets: Callable[[], Scrubber] = lambda: Scrubber(())
    threads: int = MAX_SENDING


def order_options(settings: Settings) -> OrderOptions:
    """Return the options from the settings."""
    return OrderOptions(
        api=settings.api,
        keys=settings.keys,
        rps=settings.rps,
        slots=settings.slots,
        pace=settings.pace,
        timeout=settings.order_timeout,
        user_agent=settings.user_agent,
        proxy=settings.proxy,
        status_words=settings.status_words,
        payload_secrets=lambda: long_secret_scrubber(settings.secret_texts),
    )


@dataclass(frozen=True, slots=True)
class AfterRecording:
    """What to call when answers to orders are committed."""

    poll: Callable[[], object]  # jobs are due soon
    queue_downloads: Callable[[Sequence[int]], object]  # of outputs
    notify: Callable[[Sequence[int]], object]  # of jobs that failed
