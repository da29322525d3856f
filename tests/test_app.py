"""The Celery app: stable names for web apps, no secrets, and no message that waits in memory."""

import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from celery import Celery
from celery.events.dispatcher import EventDispatcher

from worker.app import FixedScheduler, make_app
from worker.settings import load
from worker.system.redaction import shared_scrubber

pytestmark = pytest.mark.every_python


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The app's configuration, made by a separate process with a key in its environment."""
    monkeypatch.setenv("SD_API_KEY", "canary-key-3141592653")
    script = "import json; from worker.app import app; print(json.dumps(dict(app.conf), default=repr))"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    configuration: dict[str, object] = json.loads(process.stdout)
    return configuration


def test_the_configuration_holds_no_key(configured: dict[str, object]) -> None:
    assert "canary-key" not in json.dumps(configured)


@pytest.fixture
def app() -> Celery:
    """The app with its tasks, in an environment without settings."""
    from worker.app import app

    app.loader.import_default_modules()
    return app


def test_tasks_that_answer_keep_a_result_and_messages_that_are_no_hints_are_acknowledged_late(app: Celery) -> None:
    tasks = {name: task for name, task in app.tasks.items() if name.startswith("worker.")}
    assert set(tasks) == {
        "worker.order",
        "worker.track",
        "worker.get",
        "worker.nudge",
        "worker.cancel",
        "worker.retry",
        "worker.submit",
        "worker.poll",
        "worker.sweep",
        "worker.download",
        "worker.prune",
    }
    with_result = {name for name, task in tasks.items() if not task.ignore_result}
    assert with_result == {"worker.order", "worker.track", "worker.get"}
    assert {name for name, task in tasks.items() if task.acks_late} == {"worker.order", "worker.track", "worker.nudge"}


def test_the_queues_belong_to_fetch_worker_only(app: Celery) -> None:
    names = [queue.name for queue in app.conf.task_queues]
    assert names == ["fetch-worker", "fetch-worker.polls", "fetch-worker.downloads"]
    assert app.conf.task_default_queue == "fetch-worker"
    assert "global_keyprefix" not in app.conf.broker_transport_options


def test_unacknowledged_messages_have_separate_keys_from_the_web_apps(app: Celery) -> None:
    options = app.conf.broker_transport_options
    assert options["unacked_key"] == "fetch-worker.unacked"
    assert options["socket_timeout"] == 10


def test_the_settings_that_celery_shows_have_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_API_KEY", "canary-key-3141592653")
    monkeypatch.setenv("SD_API_KEYS", '{"shop": "canary-key-2718281828"}')

    settings = load()

    assert "canary-key" not in repr(settings)
    assert "canary-key" not in settings.model_dump_json()
    assert set(settings.keys) == {"default", "shop"}


def test_celery_variables_of_the_web_app_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://ours:6379/3")
    for name in ("BROKER_URL", "BROKER_READ_URL", "BROKER_WRITE_URL", "RESULT_BACKEND"):
        monkeypatch.setenv(f"CELERY_{name}", "amqp://theirs//")
    monkeypatch.setenv("CELERY_CONFIG_MODULE", "their.settings")
    monkeypatch.setenv("CELERY_LOADER", "their.loader")
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "their.settings")

    app = make_app(load())

    for connection in (app.connection(), app.connection_for_read(), app.connection_for_write()):
        assert (connection.hostname, connection.virtual_host) == ("ours", "3")
    assert app.backend.connparams["host"] == "ours"
    assert app.conf.task_default_queue == "fetch-worker"


def test_beat_keeps_no_file_and_sends_each_task_at_its_start(tmp_path: Path) -> None:
    app = make_app(load())
    scheduler = FixedScheduler(app)

    assert set(scheduler.schedule) == {"poll", "sweep", "prune"}
    assert all(entry.is_due().is_due for entry in scheduler.schedule.values())
    assert app.conf.beat_scheduler == "worker.app:FixedScheduler"
    assert list(tmp_path.iterdir()) == []


def test_given_a_key_in_the_fields_of_an_event_when_sent_then_it_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, object] = {}
    monkeypatch.setattr(EventDispatcher, "send", lambda _, kind, **fields: sent.update(fields))
    shared_scrubber(["Kq3vZ8mT1xRw5yLb7nPd0cGh2sJf6aUe"])
    dispatcher = make_app(load()).events.Dispatcher(enabled=False)

    dispatcher.send("task-received", args="('Kq3vZ8mT1xRw5yLb7nPd0cGh2sJf6aUe',)", retries=0)

    assert sent == {"args": "('[key]',)", "retries": 0}


def test_given_a_task_that_fails_with_a_key_when_run_then_its_error_and_traceback_have_none() -> None:
    key = "Kq3vZ8mT1xRw5yLb7nPd0cGh2sJf6aUe"
    shared_scrubber([key])

    @make_app(load()).task(name="tests.failing", shared=False)  # type: ignore[untyped-decorator]  # celery has no types
    def failing() -> None:
        try:
            raise KeyError(key)
        except KeyError as cause:
            raise ValueError(f"trouble with {key}") from cause

    with pytest.raises(RuntimeError) as raised:
        failing()

    written = "".join(traceback.format_exception(raised.value))
    assert key not in written
    assert "ValueError: trouble with [key]" in written
