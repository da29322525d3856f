"""A Django project for the tests: `python -m tests.django.project SCENARIO`, in a process of its own.

A process can configure Django only once. The databases are in the variable PROJECT_DATABASES, as JSON. A scenario
prints what it saw as one JSON document.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pymysql

pymysql.install_as_MySQLdb()

import django  # noqa: E402  # PyMySQL must be in place before Django looks for a driver
from asgiref.sync import async_to_sync  # noqa: E402  # the same
from django.conf import settings  # noqa: E402

settings.configure(
    SECRET_KEY="k",
    DEBUG=True,
    USE_TZ=os.environ.get("PROJECT_USE_TZ", "1") == "1",
    TIME_ZONE="America/Chicago",
    DATABASES=json.loads(os.environ["PROJECT_DATABASES"]),
    FETCH_WORKER_DATABASE=os.environ.get("PROJECT_ALIAS", "default"),
    INSTALLED_APPS=[
        "django.contrib.admin",
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.messages",
        "django.contrib.sessions",
        "worker.django",
    ],
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    ],
    TEMPLATES=[
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "APP_DIRS": True,
            "OPTIONS": {
                "context_processors": [
                    "django.template.context_processors.request",
                    "django.contrib.auth.context_processors.auth",
                    "django.contrib.messages.context_processors.messages",
                ]
            },
        }
    ],
    ROOT_URLCONF="tests.django.urls",
    ALLOWED_HOSTS=["testserver"],
    LOGGING_CONFIG=None,
    STATIC_URL="/static/",
)
django.setup()

from django.core.management import call_command  # noqa: E402  # Django must be set up
from django.db import connection, transaction  # noqa: E402  # the same

import worker.aio  # noqa: E402  # the same
from worker.client import workers  # noqa: E402  # the same
from worker.django.models import Job  # noqa: E402  # the same

READY = {"status": "success", "id": 9, "output": ["https://cdn/1.png"], "future_links": ["https://cdn/2.png"]}


class Rollback(Exception):
    """Raised to roll a transaction back."""


def transactions() -> Any:
    """Track in committed and rolled-back transactions, nested ones included. Return what is left."""
    call_command("migrate", verbosity=0)
    woken: list[int] = []
    workers._workers.wake = lambda settings: woken.append(Job.objects.count())  # type: ignore[method-assign]
    soon: Any = {"submitted_at": "2026-01-01T00:00:00Z", "deadline": 3e8}
    worker.track("alone", **soon)
    seen: dict[str, Any] = {"alone": list(woken)}
    with transaction.atomic():
        first = worker.track("committed", reference="order", **soon)
        try:
            with transaction.atomic():
                worker.track("inner", **soon)
                raise Rollback
        except Rollback:
            pass
        with transaction.atomic():
            worker.track("nested", **soon)
        job = worker.get(first)
        assert job is not None
        seen["inside"] = [job.reference, job.submitted_at.isoformat(), len(woken)]
        seen["orm inside"] = sorted(Job.objects.values_list("remote_id", flat=True))
    seen["woken after the commit"] = sorted(set(woken))
    try:
        with transaction.atomic():
            worker.track("outer", **soon)
            with transaction.atomic():
                worker.track("deep", **soon)
            raise Rollback
    except Rollback:
        pass
    seen["after a rollback"] = [len(woken), worker.get(remote_id="outer")]
    tracked = worker.track(READY)
    (output,) = worker.get(tracked).outputs  # type: ignore[union-attr]
    seen["outputs"] = [output.url, output.status]
    with transaction.atomic():
        worker.cancel(tracked)
        with transaction.atomic():
            refused = refusal()
        seen["refused"] = refused
    seen["left"] = sorted(Job.objects.values_list("remote_id", "status"))
    return seen


def first_requests() -> Any:
    """Roll the first job back and commit the others. Return when each block was about to end."""
    soon: Any = {"submitted_at": "2026-01-01T00:00:00Z", "deadline": 3e8}
    moments: dict[str, float] = {}
    for number, remote_id in enumerate(json.loads(os.environ["PROJECT_REMOTE_IDS"])):
        with suppress(Rollback), transaction.atomic():
            worker.track(remote_id, **soon)
            time.sleep(float(os.environ["PROJECT_HOLD_SECONDS"]))
            moments[remote_id] = time.time()
            if number == 0:
                raise Rollback
    return moments


def orders() -> Any:
    """Order in committed and rolled-back transactions, and attach an uncertain order. Return what is left."""
    call_command("migrate", verbosity=0)
    woken: list[int] = []
    workers._workers.wake = lambda settings: woken.append(Job.objects.count())  # type: ignore[method-assign]

    def order(name: str) -> int:
        return worker.order("v6/images/text2img", {"prompt": name}, reference=name)

    with transaction.atomic():
        order("committed")
        try:
            with transaction.atomic():
                order("inner")
                raise Rollback
        except Rollback:
            pass
        with transaction.atomic():
            nested = order("nested")
        seen: dict[str, Any] = {"woken inside": list(woken)}
    seen["woken after the commit"] = sorted(set(woken))
    try:
        with transaction.atomic():
            order("outer")
            raise Rollback
    except Rollback:
        pass
    seen["left"] = sorted(Job.objects.values_list("reference", "status"))
    with transaction.atomic():
        Job.objects.filter(pk=nested).update(status="uncertain")
        worker.track("12", endpoint="v6/images/text2img")
        try:
            worker.attach(nested, "12")
        except worker.NotTrackable as refused:
            seen["refused"] = str(refused)[:36]
        seen["attached"] = worker.attach(nested, "13")
    seen["jobs"] = sorted(Job.objects.values_list("remote_id", "status"))
    return seen


def refusal() -> str:
    """Return the message of a refused order. It leaves the transaction usable."""
    try:
        worker.track("../x")
    except worker.NotTrackable as refused:
        return str(refused)[:20]
    return ""


def broken() -> Any:
    """Cause an error of the database inside a transaction. Only its savepoint is rolled back."""
    call_command("migrate", verbosity=0)
    with transaction.atomic():
        worker.track("before")
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE fetch_outputs RENAME TO hidden_outputs")
        message = ""
        try:
            worker.track(READY)
        except worker.WorkerError as error:
            message = type(error).__name__
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE hidden_outputs RENAME TO fetch_outputs")
        worker.track("after")
    return {"error": message, "left": sorted(Job.objects.values_list("remote_id", flat=True))}


def migrations() -> Any:
    """Return what `makemigrations` would write, and the tables that `migrate` made."""
    call_command("makemigrations", check_changes=True, dry_run=True, verbosity=0)
    call_command("migrate", verbosity=0)
    call_command("migrate", verbosity=0)
    tables = [name for name in connection.introspection.table_names() if name.startswith("fetch_")]
    return {"jobs": Job.objects.count(), "tables": sorted(tables)}


def admin_pages() -> Any:
    """Return what the admin shows, and what it refuses."""
    from django.contrib.auth.models import User
    from django.test import Client

    call_command("migrate", verbosity=0)
    job_id = worker.track(READY, reference="order-77")
    User.objects.create_superuser("ann", password="w")
    client = Client()
    client.login(username="ann", password="w")
    base = "/admin/fetch_worker/job/"
    pages = {
        "list": client.get(base),
        "search": client.get(base, {"q": "order-77"}),
        "job": client.get(f"{base}{job_id}/change/"),
        "add": client.get(f"{base}add/"),
        "delete": client.get(f"{base}{job_id}/delete/"),
        "change": client.post(f"{base}{job_id}/change/", {"status": "failed"}),
    }
    job = worker.get(job_id)
    return {
        "status": {name: page.status_code for name, page in pages.items()},
        "shows": ["order-77" in pages["list"].content.decode(), "https" in pages["job"].content.decode()],
        "state": job.status if job else None,
    }


def signal() -> Any:
    """Return what a receiver of the signal gets."""
    from worker.django.signals import job_final
    from worker.django.tasks import send_job_final

    call_command("migrate", verbosity=0)
    received: list[Any] = []
    job_final.connect(lambda sender, job, **_: received.append([sender.__name__, job.id, job.status]), weak=False)
    job_id = worker.track("1", on_done=send_job_final)
    worker.cancel(job_id)
    send_job_final(job_id)
    send_job_final(4_711)
    return {"received": received, "id": int(job_id)}


def threads() -> Any:
    """Use the coroutines and `changes`, which work in threads. Return what they saw, and the open connections."""
    call_command("migrate", verbosity=0)
    job_id = worker.track("1")

    async def from_a_view() -> list[str]:
        job = await worker.aio.get(job_id)
        states = [job.status if job else "none"]
        async for changed in worker.aio.changes(job_id):
            states.append(changed.status)
            if not changed.final:
                await worker.aio.cancel(job_id)
        return states

    seen = {"aio": async_to_sync(from_a_view)(), "wait": worker.wait(job_id).status, "connections": 1}
    until = time.monotonic() + 10
    while connection.vendor == "postgresql" and time.monotonic() < until:
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
            (seen["connections"],) = cursor.fetchone()
        if seen["connections"] == 1:
            break
        time.sleep(0.1)
    return seen


def second_database() -> Any:
    """Use a second database for the jobs. Return where they are, and what the models and the admin find."""
    from django.db import connections

    call_command("migrate", verbosity=0)
    call_command("migrate", database="jobs", verbosity=0)
    with transaction.atomic(using="jobs"):
        job_id = worker.track(READY)
    pages = admin_pages()
    return {
        "tables": {alias: "fetch_jobs" in connections[alias].introspection.table_names() for alias in connections},
        "found": [Job.objects.count(), Job.objects.get(pk=job_id).outputs.count()],
        "status": pages["status"],
    }


def system_check() -> Any:
    """Return what `manage.py check` warns of."""
    from django.core.checks import run_checks

    return [message.id for message in run_checks() if message.id.startswith("fetch_worker")]


def elsewhere() -> Any:
    """Track with DATABASE_URL naming another database than Django's."""
    from worker.client.connection import app_database, cached_settings
    from worker.client.connection import transaction as own_transaction

    with own_transaction(cached_settings()) as used:
        return {"joined": app_database() is not None, "database": used.engine.url.database}


if __name__ == "__main__":
    scenario: Callable[[], Any] = globals()[sys.argv[1]]
    print(json.dumps(scenario()))
