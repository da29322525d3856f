"""The number of examples: a few hundred in every test run, ten thousand with `-m long`.

The few hundred are the same in every run, so that results are reproducible. The ten thousand are new in each run.
"""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

QUICK, LONG = 300, 10_000
LONG_SECONDS = 900

EFFORTS = pytest.mark.parametrize(
    "examples",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(LONG, id="long", marks=[pytest.mark.long, pytest.mark.timeout(LONG_SECONDS)]),
    ],
)


def effort(examples: int, *, of: int = 1, steps: int = 50) -> settings:
    """Return the settings for `examples` / `of` examples. `steps` is for state machines."""
    return settings(
        max_examples=max(examples // of, 1),
        stateful_step_count=steps,
        derandomize=examples <= QUICK,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),  # the tests look for slow inputs
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )


def with_effort(examples: int, *, of: int = 1) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the decorator for a property."""
    return effort(examples, of=of)
