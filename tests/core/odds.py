"""The odds of a survival model, added up bucket by bucket: an independent check of `SurvivalModel.next_ages`."""

import math

from worker.core.pacing.survival import BUCKETS, EDGES, SurvivalModel, bucket


def next_age(model: SurvivalModel, not_ready_age: float, price: float) -> float:
    """Return the age at which the odds since `not_ready_age` reach one price."""
    return model.next_ages(not_ready_age, (price,))[0]


def odds(model: SurvivalModel, not_ready_age: float, age: float) -> float:
    """Return I(not_ready_age, age), the value of a poll at `age`: the integral over the buckets of the hazard."""
    odds, factor = 0.0, 1.0
    for at in range(bucket(not_ready_age), BUCKETS):
        start, end = max(not_ready_age, EDGES[at]), min(age, EDGES[at + 1] if at + 1 < BUCKETS else math.inf)
        if start >= end:
            break
        hazard, length = model.hazard(at), end - start
        power = min(hazard * length, 300.0)
        odds += (factor * math.expm1(power) / hazard - length) if power > 1e-9 else (factor - 1) * length
        factor = min(factor * math.exp(power), 1e100)
    return odds
