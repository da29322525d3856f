"""Resources of a process are made once, even if several threads ask for them together, on every Python version."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from worker.client.connection import cached_settings, loaded_settings
from worker.client.workers import _wake_ups
from worker.coordination.publisher import Publisher
from worker.core.queues import POLLS
from worker.downloads.downloader import Downloader
from worker.process import dead_claims, resources
from worker.settings import Settings
from worker.storage import select
from worker.store.engine import engine_for
from worker.system.locked_cache import locked_cache, locked_property

pytestmark = pytest.mark.every_python

THREADS = 16


def _in_threads(work: Callable[[], Any], threads: int = THREADS) -> list[Any]:
    """Return the results of `work` in several threads that a barrier releases together."""
    barrier = threading.Barrier(threads)

    def run() -> Any:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(threads) as pool:
        return [future.result() for future in [pool.submit(run) for _ in range(threads)]]


class _SlowProperty:
    """Has a property that is slow to make, and counts how often it was made."""

    def __init__(self) -> None:
        self.times_made = 0

    @locked_property
    def first(self) -> object:
        self.times_made += 1
        time.sleep(0.05)
        return object()

    @locked_property
    def second(self) -> object:
        return [self.first]


def test_a_locked_property_is_made_by_one_thread_while_the_others_wait() -> None:
    slow = _SlowProperty()
    assert len({id(value) for value in _in_threads(lambda: slow.first)}) == 1
    assert slow.times_made == 1


def test_locked_properties_may_use_each_other() -> None:
    slow = _SlowProperty()
    assert len({id(value) for value in _in_threads(lambda: slow.second)}) == 1
    assert slow.times_made == 1


def test_two_instances_share_neither_value_nor_lock() -> None:
    assert _SlowProperty().first is not _SlowProperty().first


def test_a_locked_cache_calls_its_function_once_per_argument() -> None:
    calls: list[int] = []

    @locked_cache
    def make(number: int) -> object:
        calls.append(number)
        time.sleep(0.05)
        return object()

    assert len({id(value) for value in _in_threads(lambda: make(1))}) == 1
    make(2)
    assert calls == [1, 2]
    make.cache_clear()
    make(1)
    assert calls == [1, 2, 1]


def test_a_locked_cache_works_in_a_child_that_was_forked_during_a_call() -> None:
    making, release = threading.Event(), threading.Event()

    @locked_cache
    def make(number: int) -> int:
        if number == 1:
            making.set()
            release.wait(10)
        return number

    thread = threading.Thread(target=make, args=(1,))
    thread.start()
    making.wait(10)
    child = os.fork()
    if child == 0:
        threading.Timer(5.0, os._exit, (1,)).start()  # without this, a lock that stays held would block forever
        os._exit(0 if make(2) == 2 else 2)
    _, status = os.waitpid(child, 0)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.fixture
def _own_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resources of this test, with a database file that is never opened."""
    settings = Settings(
        database_url=f"sqlite:///{tmp_path}/jobs.db", redis_url="redis://127.0.0.1:1/0", state_directory=str(tmp_path)
    )
    for module in (resources, dead_claims):
        monkeypatch.setattr(module, "settings", settings)
    monkeypatch.setattr(resources, "_resources", {})
    monkeypatch.setattr(resources, "listen", lambda *_: None)
    monkeypatch.setattr(resources, "gc", Mock())  # do not change the garbage collector of the test process


RESOURCES = sorted(
    name for name, value in vars(resources.ProcessResources).items() if isinstance(value, locked_property)
)


@pytest.mark.usefixtures("_own_resources")
@pytest.mark.parametrize("name", RESOURCES)
def test_each_resource_of_a_process_is_made_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_names: list[str] = []
    resource = vars(resources.ProcessResources)[name]

    def counted(own: resources.ProcessResources, make: Callable[[Any], Any] = resource.func) -> Any:
        made_names.append(name)
        time.sleep(0.02)
        return make(own)

    monkeypatch.setattr(resource, "func", counted)
    values = _in_threads(lambda: getattr(resources.process_resources(), name))
    assert len({id(value) for value in values}) == 1
    assert made_names == [name]


def test_all_resources_use_a_locked_property() -> None:
    assert {"engine", "leases", "poller", "downloader", "webhooks", "api", "publisher"} <= set(RESOURCES)


@pytest.mark.usefixtures("_own_resources")
def test_a_process_only_makes_what_its_queues_need() -> None:
    resources.process_resources().make_for({POLLS})
    assert "poller" in vars(resources.process_resources())
    assert "downloader" not in vars(resources.process_resources())


@pytest.mark.usefixtures("_own_resources")
def test_a_poller_that_is_made_during_shutdown_claims_nothing() -> None:
    resources.process_resources().stop()
    assert "poller" not in vars(resources.process_resources()), "a signal handler must not make things"
    assert resources.process_resources().poller.stopped


@pytest.mark.usefixtures("_own_resources")
def test_only_the_first_download_prepares_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []
    storage = select.storage_for(Settings(storage_url=f"file:{tmp_path}/outputs"))

    def prepare() -> None:
        prepared.append(1)
        time.sleep(0.05)

    monkeypatch.setattr(storage, "prepare", prepare)
    monkeypatch.setattr(resources, "storage_for", lambda _: storage)
    downloader: Downloader = resources.process_resources().downloader
    assert prepared == [], "making the downloader must not prepare the storage"
    _in_threads(downloader._prepare_storage)
    assert prepared == [1]


def test_engine_settings_and_wake_ups_of_a_web_app_are_made_once(tmp_path: Path) -> None:
    settings = Settings(database_url=f"sqlite:///{tmp_path}/jobs.db")
    assert len({id(value) for value in _in_threads(lambda: engine_for(settings.database))}) == 1
    loaded_settings.cache_clear()
    assert len({id(value) for value in _in_threads(cached_settings)}) == 1
    assert len({id(value) for value in _in_threads(lambda: _wake_ups("redis://127.0.0.1:1/0"))}) == 1


def test_a_bucket_storage_is_made_once(tmp_path: Path) -> None:
    settings = Settings(storage_url="s3://bucket/prefix")
    assert len({id(value) for value in _in_threads(lambda: select.storage_for(settings))}) == 1


def test_settings_search_for_the_embedded_redis_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads with separate searches could use two servers."""
    paths: list[Path] = []

    def answers(path: Path) -> bool:
        paths.append(path)
        time.sleep(0.02)
        return True

    monkeypatch.setattr("worker.configuration.server_settings.answers", answers)
    monkeypatch.delenv("REDIS_URL", raising=False)
    settings = Settings()
    assert len(set(_in_threads(lambda: settings.redis))) == 1
    assert len(paths) == 1


def test_a_publisher_has_one_thread() -> None:
    publisher = Publisher()
    sent: list[int | None] = []

    def send() -> None:
        publisher.send("test", lambda: sent.append(threading.get_ident()))

    _in_threads(send)
    assert publisher.finish(10)
    assert len(sent) == THREADS
    assert len(set(sent)) == 1
