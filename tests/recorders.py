"""A recorder of answers for tests, without a poller."""

import random
from collections.abc import Sequence

from sqlalchemy import Engine

from tests.rows import BASE
from worker.core.pacing.backlog import OrderBacklog
from worker.core.pacing.policy import Pace
from worker.polling.api_client import ApiClient
from worker.polling.options import AfterCommit, PollOptions
from worker.polling.recorder import Recorder
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import AllowedApi

API = AllowedApi(BASE.removesuffix("/fetch"), frozenset({"api.test"}))


def make_recorder(
    engine: Engine,
    scrubber: Scrubber,
    *,
    pace: Pace,
    late_looks: Sequence[float] = (),
    client: type[ApiClient] = ApiClient,
) -> Recorder:
    """Return a recorder that sends no messages. `client` is the class of the API client."""
    return Recorder(
        engine=engine,
        api=client(API, scrubber, timeout=5.0, connections=1),
        options=PollOptions(keys={}, rps=lambda _: 10.0, pace=pace, api_timeout=5.0, late_looks=late_looks),
        after_commit=AfterCommit(queue_downloads=lambda _: None, notify=lambda _: None),
        backlog=OrderBacklog(),
        rng=random.Random(0),
    )
