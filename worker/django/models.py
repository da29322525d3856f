"""The tables of jobs and outputs as Django models, to read only. `worker.track` and the workers write them."""

from typing import Any

from django.db import models

from worker.django.database import database_alias


class InJobsDatabase(models.Manager):  # type: ignore[misc]  # Django has no annotations
    """Reads from the database with the jobs, unless a query names another one."""

    def get_queryset(self) -> Any:
        """Return a query of that database."""
        return super().get_queryset().using(self._db or database_alias())


class Job(models.Model):  # type: ignore[misc]  # Django has no annotations
    """A job, with the columns that apps may read."""

    id = models.BigIntegerField(primary_key=True)
    account = models.CharField(max_length=64)
    remote_id = models.CharField(max_length=128)
    kind = models.CharField(max_length=64)
    status = models.CharField(max_length=16)
    reference = models.CharField(max_length=255, null=True)  # NULL means none
    polls = models.IntegerField()
    eta = models.FloatField(null=True)
    submitted_at = models.DateTimeField()
    ready_at = models.DateTimeField(null=True)
    completed_at = models.DateTimeField(null=True)
    deadline_at = models.DateTimeField()
    error_code = models.CharField(max_length=32, null=True)  # the same
    error_message = models.TextField(null=True)  # the same

    objects = InJobsDatabase()

    class Meta:
        """The table of fetch-worker."""

        managed = False
        db_table = "fetch_jobs"

    def __str__(self) -> str:
        """Return the job's number and state."""
        return f"job {self.pk} ({self.status})"


class Output(models.Model):  # type: ignore[misc]  # Django has no annotations
    """An output of a job, with the columns that apps may read."""

    id = models.BigIntegerField(primary_key=True)
    job = models.ForeignKey(Job, on_delete=models.DO_NOTHING, related_name="outputs")
    position = models.IntegerField()
    url = models.TextField()
    status = models.CharField(max_length=16)
    location = models.TextField(null=True)  # NULL means not stored
    size_bytes = models.BigIntegerField(null=True)
    sha256 = models.CharField(max_length=64, null=True)  # the same
    media_type = models.CharField(max_length=100, null=True)  # the same
    attempts = models.IntegerField()
    error_code = models.CharField(max_length=32, null=True)  # the same
    error_message = models.TextField(null=True)  # the same

    objects = InJobsDatabase()

    class Meta:
        """The table of fetch-worker."""

        managed = False
        db_table = "fetch_outputs"

    def __str__(self) -> str:
        """Return the output's number and state."""
        return f"output {self.pk} ({self.status})"
