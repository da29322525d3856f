"""Options of the stand-in: durations, key, rate limit, picture size, scenarios."""

from dataclasses import dataclass
from math import isfinite

from worker.sandbox.pictures import MAX_SIZE, MIN_SIZE
from worker.sandbox.scenarios import check_scenario

MAX_OUTPUTS = 4
LIMIT_STYLES = ("http429", "http200")
PLANS = {"pay-as-you-go": 5, "standard": 10, "premium": 15, "enterprise": 0}  # orders that may wait; 0: no limit


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxOptions:
    """Behaviour of the stand-in. Raises ValueError with a readable message for invalid values."""

    seed: int | None = None  # the same seed gives the same ids, durations and outputs; None: ids never used before
    min_seconds: float = 2.0  # a job is ready at least this long after its submission
    max_seconds: float = 8.0
    min_outputs: int = 1  # pictures of a job without `samples` in its order
    max_outputs: int = 4
    key: str = "sandbox-key"
    rps: float = 0.0  # requests with a key per second before the rate limit applies; 0: no limit
    limit_style: str = "http429"
    plan: str = "enterprise"  # how many orders may wait at once, by PLANS
    slots: int | None = None  # how many orders may wait at once, instead of the plan's number; 0: no limit
    size: int = 512  # width and height in pixels
    failure_rate: float = 0.0  # share of the jobs that end as failed
    eta: bool = True  # whether the answer to an order has an estimate
    scenarios: tuple[str, ...] = ()  # used by the jobs in turn; an order may name its own
    ids_after: int = 0  # added to the first id of each family

    def __post_init__(self) -> None:
        durations = isfinite(self.max_seconds) and 0 <= self.min_seconds <= self.max_seconds
        checks = {
            "seconds must be 0 or more, and the minimum must not exceed the maximum": durations,
            f"outputs must be between 1 and {MAX_OUTPUTS}, and the minimum must not exceed the maximum": (
                1 <= self.min_outputs <= self.max_outputs <= MAX_OUTPUTS
            ),
            "the key must not be empty": bool(self.key),
            "rps must be 0 (no limit) or more": isfinite(self.rps) and self.rps >= 0,
            f"the limit style must be one of {', '.join(LIMIT_STYLES)}": self.limit_style in LIMIT_STYLES,
            f"the plan must be one of {', '.join(PLANS)}": self.plan in PLANS,
            "the slots must be 0 (no limit) or more": self.slots is None or self.slots >= 0,
            f"the size must be between {MIN_SIZE} and {MAX_SIZE} pixels": MIN_SIZE <= self.size <= MAX_SIZE,
            "the failure rate must be between 0 and 1": 0 <= self.failure_rate <= 1,
            "ids_after must be 0 or more": self.ids_after >= 0,
        }
        for message, is_valid in checks.items():
            if not is_valid:
                raise ValueError(message)
        for name in self.scenarios:
            check_scenario(name)

    @property
    def queue_limit(self) -> int:
        """How many orders may wait at once; 0: no limit."""
        return PLANS[self.plan] if self.slots is None else self.slots

    def scenario(self, number: int) -> str:
        """Return the scenario of the order with this number; empty if there is none."""
        return self.scenarios[number % len(self.scenarios)] if self.scenarios else ""
