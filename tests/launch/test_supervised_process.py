"""When a program is started again."""

import pytest

from worker.launch.supervised_process import Restarts, Timing

pytestmark = pytest.mark.every_python


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 16),
        (6, 30),  # 32 is more than the longest
        (10_000, 30),
    ],
)
def test_restart_delays_grow_up_to_a_limit(failures: int, seconds: float) -> None:
    assert Timing().restart_delay(failures) == seconds


def test_a_failed_start_and_each_quick_exit_double_the_delay() -> None:
    restarts = Restarts(Timing())

    delays = [
        restarts.after_failed_start(100.0),
        restarts.after_exit(1, 0.0, 101.0),
        restarts.after_exit(1, 0.0, 103.0),
    ]

    assert delays == [1.0, 2.0, 4.0]
    assert restarts.at == 107.0


@pytest.mark.parametrize(("code", "lived"), [(1, 60.0), (0, 2.0), (-15, 2.0)])
def test_the_shortest_delay_applies_after_a_long_uptime_and_a_requested_exit(code: int, lived: float) -> None:
    restarts = Restarts(Timing(), failures=5)

    assert restarts.after_exit(code, lived, 0.0) == 1.0


def test_after_three_refusals_in_a_row_there_is_no_restart() -> None:
    restarts = Restarts(Timing())

    delays = [restarts.after_exit(code, 1.0, 0.0) for code in (2, 2, 1, 2, 2, 2)]

    assert [delay is None for delay in delays] == [False] * 5 + [True]
