"""Holding back the garbage collector: nested, in several threads, and as it was before afterwards."""

import gc
import threading
from collections.abc import Iterator

import pytest

from worker.system.garbage import no_collections


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    """Collections are on before and after each test."""
    assert gc.isenabled()
    yield
    gc.enable()


def test_no_collection_runs_inside_and_they_run_again_afterwards() -> None:
    enabled_inside = []

    def fail() -> None:
        with no_collections():
            enabled_inside.append(gc.isenabled())
            raise ValueError("an error")

    with pytest.raises(ValueError, match="an error"):
        fail()
    assert enabled_inside == [False]
    assert gc.isenabled()


def test_collections_that_the_app_has_switched_off_stay_off() -> None:
    gc.disable()
    with no_collections():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_the_last_of_several_threads_switches_them_on() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with no_collections():
            inside.set()
            assert leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    with no_collections():
        pass
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()
