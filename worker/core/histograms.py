"""What is measured: the bounds of the histograms, which bucket a value falls into, and what a histogram tells. Pure.

A histogram is kept as one count per bucket, named by its upper bound as Prometheus writes it (`0.5`, `+Inf`), so that
counts of many processes simply add up. Everything is in seconds, or in requests.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

MORE = "+Inf"

# Seconds from ready to seen.
DELAYS = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
# Keyed requests about one job, until it was ready or ended.
POLLS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0, 300.0)
# Seconds of one download attempt that stored its output.
TRANSFERS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)

# The classes of answers as they are counted, and the words that operators are told.
ANSWER_WORDS = {
    "processing": "processing",
    "ready": "ready",
    "empty": "empty",
    "anotherjob": "another_job",
    "failed": "failed",
    "unknownid": "unknown_id",
    "apierror": "api_error",
    "odd": "odd",
    "ratelimited": "rate_limited",
    "accountrefused": "account_refused",
    "apidown": "unreachable",
}
COUNTED_AS = {"unread": "odd"}  # the label that these answers have in the counters of every release


def bucket(value: float, bounds: Sequence[float]) -> str:
    """The name of the bucket that a value falls into: its upper bound, which belongs to it.

    >>> bucket(0.3, DELAYS), bucket(0.5, DELAYS), bucket(9e9, DELAYS)
    ('0.5', '0.5', '+Inf')
    """
    place = bisect_left(bounds, value)
    return f"{bounds[place]:g}" if place < len(bounds) else MORE


def bucket_names(bounds: Sequence[float]) -> list[str]:
    """The names of all buckets, in order.

    >>> bucket_names((1.0, 2.5))
    ['1', '2.5', '+Inf']
    """
    return [*(f"{bound:g}" for bound in bounds), MORE]


def quantile(counts: Mapping[str, float], bounds: Sequence[float], share: float) -> float | None:
    """The value that a share of what was counted does not exceed, straight between the bounds of its bucket.

    None where nothing was counted. Beyond the last bound that bound is all that can be said, as Prometheus has it.

    >>> quantile({"1": 2, "1.5": 2}, DELAYS, 0.5), quantile({"1": 2, "1.5": 2}, DELAYS, 0.75), quantile({}, DELAYS, 0.5)
    (1.0, 1.25, None)
    """
    whole = sum(counts.values())
    if whole <= 0:
        return None
    wanted, below, least = share * whole, 0.0, 0.0
    for bound in bounds:
        here = counts.get(f"{bound:g}", 0)
        if here and below + here >= wanted:
            return least + (bound - least) * max(0.0, wanted - below) / here
        below += here
        least = bound
    return bounds[-1]
