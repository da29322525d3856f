"""What the stand-in can be told: durations, key, limits, size of pictures, scenarios."""

from dataclasses import dataclass
from math import isfinite

from worker.sandbox.pictures import LARGEST, SMALLEST
from worker.sandbox.scenarios import check_scenario

MOST_OUTPUTS = 4
LIMIT_STYLES = ("http429", "http200")
PLANS = {"pay-as-you-go": 5, "standard": 10, "premium": 15, "enterprise": 0}  # orders that may wait; 0: no limit


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxOptions:
    """How the stand-in behaves. Raises ValueError, with a sentence, for what makes no sense."""

    seed: int | None = None  # the same seed gives the same ids, durations and outputs; None: ids never used before
    min_seconds: float = 2.0  # a job is ready this long after its submission at the earliest
    max_seconds: float = 8.0
    min_outputs: int = 1  # pictures of a job whose submission has no `samples`
    max_outputs: int = 4
    key: str = "sandbox-key"
    rps: float = 0.0  # keyed calls per second before the limit answers; 0: no limit
    limit_style: str = "http429"
    plan: str = "enterprise"  # how many orders may wait at once, by PLANS
    size: int = 512  # pixels, both ways
    failure_rate: float = 0.0  # share of the jobs that end as failed
    eta: bool = True  # whether the answer to a submission has an estimate
    scenarios: tuple[str, ...] = ()  # jobs take them in turn; an order may name its own
    ids_after: int = 0  # added to the first id of each family

    def __post_init__(self) -> None:
        if not (isfinite(self.max_seconds) and 0 <= self.min_seconds <= self.max_seconds):
            raise ValueError("seconds must be numbers from 0 up, the least not above the most")
        if not 1 <= self.min_outputs <= self.max_outputs <= MOST_OUTPUTS:
            raise ValueError(f"outputs must be between 1 and {MOST_OUTPUTS}, the least not above the most")
        if not self.key:
            raise ValueError("the key must not be empty")
        if not (isfinite(self.rps) and self.rps >= 0):
            raise ValueError("rps must be 0 (no limit) or more")
        if self.limit_style not in LIMIT_STYLES:
            raise ValueError(f"the limit style is one of {', '.join(LIMIT_STYLES)}")
        if self.plan not in PLANS:
            raise ValueError(f"the plan is one of {', '.join(PLANS)}")
        if not SMALLEST <= self.size <= LARGEST:
            raise ValueError(f"the size must be between {SMALLEST} and {LARGEST} pixels")
        if not 0 <= self.failure_rate <= 1:
            raise ValueError("the failure rate must be between 0 and 1")
        if self.ids_after < 0:
            raise ValueError("ids must be counted from 0 or more")
        for name in self.scenarios:
            check_scenario(name)
