"""The Celery app: names that web apps rely on, nothing secret, nothing that waits in memory."""

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
    """The app's configuration, made by a process of its own with a key in its environment."""
    monkeypatch.setenv("SD_API_KEY", "canary-key-3141592653")
    script = "import json; from worker.app import app; print(json.dumps(dict(app.conf), default=repr))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_configuration_holds_no_key(configured: dict[str, object]) -> None:
    assert "canary-key" not in json.dumps(configured)


@pytest.fixture
def app() -> Celery:
    """The app with its tasks, made in an environment without settings."""
    from worker.app import app

    app.loader.import_default_modules()
    return app


def test_only_tracking_keeps_a_result_and_only_hints_from_outside_are_acknowledged_late(app: Celery) -> None:
    tasks = {name: task for name, task in app.tasks.items() if name.startswith("worker.")}
    assert set(tasks) == {
        "worker.track",
        "worker.nudge",
        "worker.cancel",
        "worker.retry",
        "worker.poll",
        "worker.sweep",
        "worker.download",
        "worker.prune",
    }
    assert {name for name, task in tasks.items() if not task.ignore_result} == {"worker.track"}
    assert {name for name, task in tasks.items() if task.acks_late} == {"worker.track", "worker.nudge"}


def test_the_queues_are_ours_alone(app: Celery) -> None:
    names = [queue.name for queue in app.conf.task_queues]
    assert names == ["fetch-worker", "fetch-worker.polls", "fetch-worker.downloads"]
    assert app.conf.task_default_queue == "fetch-worker"
    assert "global_keyprefix" not in app.conf.broker_transport_options


def test_messages_that_were_not_acknowledged_are_kept_apart_from_an_apps_own(app: Celery) -> None:
    options = app.conf.broker_transport_options
    assert options["unacked_key"] == "fetch-worker.unacked"
    assert options["socket_timeout"] == 10


def test_nothing_secret_is_in_the_shown_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_API_KEY", "canary-key-3141592653")
    monkeypatch.setenv("SD_API_KEYS", '{"shop": "canary-key-2718281828"}')

    settings = load()

    assert "canary-key" not in repr(settings)
    assert "canary-key" not in settings.model_dump_json()
    assert set(settings.keys) == {"default", "shop"}


def test_celery_s_own_variables_for_the_web_app_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_beat_keeps_no_file_and_sends_each_task_as_it_starts(tmp_path: Path) -> None:
    app = make_app(load())
    scheduler = FixedScheduler(app)

    assert set(scheduler.schedule) == {"poll", "sweep", "prune"}
    assert all(entry.is_due().is_due for entry in scheduler.schedule.values())
    assert app.conf.beat_scheduler == "worker.app:FixedScheduler"
    assert list(tmp_path.iterdir()) == []


def test_given_a_key_in_the_fields_of_an_event_when_sent_then_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, object] = {}
    monkeypatch.setattr(EventDispatcher, "send", lambda _, kind, **fields: sent.update(fields))
    shared_scrubber(["Kq3vZ8mT1xRw5yLb7nPd0cGh2sJf6aUe"])
    dispatcher = make_app(load()).events.Dispatcher(enabled=False)

    dispatcher.send("task-received", args="('Kq3vZ8mT1xRw5yLb7nPd0cGh2sJf6aUe',)", retries=0)

    assert sent == {"args": "('[key]',)", "retries": 0}


def test_given_a_task_that_fails_with_a_key_when_run_then_its_error_and_what_led_to_it_have_none() -> None:
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
