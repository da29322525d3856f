"""How much is tried: a few hundred examples with every run of the tests, ten thousand with `-m long`.

The few are the same ones each time, so that a run says the same twice; the ten thousand are new ones each time.
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
    """The settings for so many examples, or for one in `of` of them; `steps` is for state machines."""
    return settings(
        max_examples=max(examples // of, 1),
        stateful_step_count=steps,
        derandomize=examples <= QUICK,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),  # slow inputs are what is looked for
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )


def tried(examples: int, *, of: int = 1) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for a property."""
    return effort(examples, of=of)
