"""Counts of the orders that the stand-in took and refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

MAX_DIGESTS = 50_000  # the oldest are dropped first
NOT_COMPARED = ("key", "track_id", "webhook")  # fields in which two orders of the same thing may differ


@dataclass(slots=True)
class Charges:
    """The orders so far. An order is charged when it is taken, even if its answer never arrives."""

    charged: int = 0
    refused: int = 0
    double: int = 0  # charged orders with the same body as an earlier one, apart from key, track_id and webhook
    most_queued: int = 0  # the highest number of jobs that waited at once
    _digests: dict[bytes, None] = field(default_factory=dict)

    def charge(self, store: str, body: Mapping[str, Any], queued: int) -> None:
        """Count an order that was taken. `queued` jobs wait now, with this one."""
        compared = {name: value for name, value in body.items() if name not in NOT_COMPARED}
        digest = sha256(f"{store}|{json.dumps(compared, sort_keys=True, default=str)}".encode()).digest()
        self.charged += 1
        self.double += digest in self._digests
        self.most_queued = max(self.most_queued, queued)
        self._digests[digest] = None
        if len(self._digests) > MAX_DIGESTS:
            del self._digests[next(iter(self._digests))]
