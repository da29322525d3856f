"""Settings of jobs: their deadlines."""

import pytest

from worker.settings import load


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [("image", 3_600), ("dreambooth/x", 3_600), ("video", 7_200), ("text2video", 7_200), ("training", 14_400)],
)
def test_deadlines_depend_on_the_kind_unless_job_deadline_is_set(
    kind: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JOB_DEADLINE applies to every kind."""
    assert load().deadline_for(kind) == seconds
    monkeypatch.setenv("JOB_DEADLINE", "90")
    assert load().deadline_for(kind) == 90
