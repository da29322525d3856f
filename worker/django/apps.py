"""The configuration of the Django app. Django finds it by itself."""

from functools import partial
from typing import Any

from django.apps import AppConfig
from django.core import checks
from django.db.models.signals import post_migrate

from worker.client.connection import use_app_database


class FetchWorkerConfig(AppConfig):  # type: ignore[misc]  # Django has no annotations
    """The app `worker.django`."""

    name = "worker.django"
    label = "fetch_worker"
    verbose_name = "fetch-worker"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Use Django's database, if the jobs are in it."""
        from worker.django.database import django_database  # here: the apps must be loaded

        database = django_database()
        use_app_database(database)
        checks.register(partial(_check, database))
        if database is not None:
            self.database = database
            post_migrate.connect(self._migrate, sender=self, dispatch_uid="fetch-worker")

    def _migrate(self, *, using: str, verbosity: int = 1, **_: Any) -> None:
        """Create or update the tables of fetch-worker, also in the database of a test run."""
        if using != self.database.alias:
            return
        before, after = self.database.migrate()
        if self.database.in_test:
            self.database.empty()  # Django says this, too, after it has emptied its own tables between two tests
        if verbosity >= 1 and before != after:
            print(f"  fetch-worker: tables at version {after}")  # as `manage.py migrate` does


def _check(database: object, **_: Any) -> list[checks.CheckMessage]:
    """Warn, in `manage.py check`, if the jobs are not in Django's database."""
    if database is not None:
        return []
    return [
        checks.Warning(
            "DATABASE_URL names another database than Django's settings: jobs are not part of Django's transactions.",
            hint="Let DATABASE_URL name the same database, or remove it from the environment of the web app.",
            id="fetch_worker.W001",
        )
    ]
