"""Tests of a Django app, as its developers write them. Django's test runner runs them in `test_runner`."""

from django.db import connection, transaction
from django.test import TestCase, TransactionTestCase

import worker
from worker import aio
from worker.django.models import Job
from worker.testing import kit


class Rolled(TestCase):  # type: ignore[misc]  # Django has no annotations
    """Each test is rolled back."""

    def test_first(self) -> None:
        """The job is in the test's database."""
        assert worker.find() == []
        worker.track("1")
        assert len(worker.find()) == 1
        name = str(connection.settings_dict["NAME"])
        assert "test" in name or "memory" in name

    test_second = test_first  # nothing is left of the first

    async def test_coroutines(self) -> None:
        """They see what Django's own asynchronous calls see, and are rolled back, too."""
        assert await aio.find() == []
        job_id = await aio.track("1")
        assert await Job.objects.filter(pk=job_id).aexists()
        assert await aio.get(job_id) is not None

    test_coroutines_again = test_coroutines

    def test_wake_up_after_the_commit(self) -> None:
        """A view's callbacks can be captured, as for any Django code."""
        with self.captureOnCommitCallbacks() as callbacks, transaction.atomic():
            worker.track("1", submitted_at="2026-01-01T00:00:00Z", deadline=3e8)
        assert len(callbacks) == 1

    def test_a_whole_job(self) -> None:
        """The test kit works in the transaction of the test."""
        from pathlib import Path
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder, kit(Path(folder)) as made:
            job_id = worker.track(made.api.submit("a lake at dawn", samples=2))
            job = made.worker.run(job_id)
            assert (job.status, len(job.outputs)) == ("completed", 2)


class Committed(TransactionTestCase):  # type: ignore[misc]  # the same
    """Tests with real transactions."""

    def test_commit(self) -> None:
        """The row is there for everybody, and gone in the next test."""
        assert worker.find() == []
        with transaction.atomic():
            job_id = worker.track("committed")
        assert worker.get(job_id) is not None
        assert Job.objects.count() == 1

    test_commit_again = test_commit
    test_commit_once_more = test_commit
