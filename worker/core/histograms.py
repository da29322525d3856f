"""Histograms: their bucket bounds, the bucket of a value, and quantiles. Pure.

A histogram is stored as one count per bucket. A bucket is named by its upper bound in the notation of Prometheus
(`0.5`, `+Inf`), so the counts of many processes can be added. All values are seconds or requests.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

MORE = "+Inf"

# Seconds from ready to seen.
DELAYS = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
# Keyed requests about one job, until it was ready or ended.
POLLS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0, 300.0)
# Seconds of one successful download attempt.
TRANSFERS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)


def bucket(value: float, bounds: Sequence[float]) -> str:
    """Return the name of the bucket of a value, which is its upper bound. The bound itself is part of the bucket.

    >>> bucket(0.3, DELAYS), bucket(0.5, DELAYS), bucket(9e9, DELAYS)
    ('0.5', '0.5', '+Inf')
    """
    place = bisect_left(bounds, value)
    return f"{bounds[place]:g}" if place < len(bounds) else MORE


def bucket_names(bounds: Sequence[float]) -> list[str]:
    """Return the names of all buckets, in order.

    >>> bucket_names((1.0, 2.5))
    ['1', '2.5', '+Inf']
    """
    return [*(f"{bound:g}" for bound in bounds), MORE]


def quantile(counts: Mapping[str, float], bounds: Sequence[float], share: float) -> float | None:
    """Return a quantile, with linear interpolation in its bucket. None if the histogram is empty.

    For the last bucket, which has no upper bound, the last bound is returned, as in Prometheus.

    >>> quantile({"1": 2, "1.5": 2}, DELAYS, 0.5), quantile({"1": 2, "1.5": 2}, DELAYS, 0.75), quantile({}, DELAYS, 0.5)
    (1.0, 1.25, None)
    """
    total = sum(counts.values())
    if total <= 0:
        return None
    rank, below, lower_bound = share * total, 0.0, 0.0
    for bound in bounds:
        count = counts.get(f"{bound:g}", 0)
        if count and below + count >= rank:
            return lower_bound + (bound - lower_bound) * max(0.0, rank - below) / count
        below += count
        lower_bound = bound
    return bounds[-1]
