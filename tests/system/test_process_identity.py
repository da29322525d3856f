"""Claims name their process so that the living can be told from the dead on one host."""

import os
import subprocess
import sys

import pytest

from worker.system.process_identity import dead_holders, holder_name, host_name, liveness, started_at

pytestmark = pytest.mark.every_python


def test_given_this_process_when_named_then_it_counts_as_living() -> None:
    assert holder_name().startswith(f"{host_name()}.{os.getpid()}.")
    assert dead_holders([holder_name()]) == []


def test_given_a_process_that_was_killed_when_looked_for_then_it_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        holder = f"{host_name()}.{child.pid}.{started_at(child.pid)}"
        assert dead_holders([holder]) == []
        child.kill()
        child.wait()
        assert dead_holders([holder]) == [holder]


def test_given_a_process_id_that_was_used_again_when_looked_for_then_the_earlier_process_is_dead() -> None:
    earlier = f"{host_name()}.{os.getpid()}.1"
    assert dead_holders([earlier]) == [earlier]


def test_given_a_holder_of_another_host_or_of_no_known_form_when_looked_for_then_nothing_is_said_of_it() -> None:
    assert dead_holders(["00000000.1.1", "d41d8cd98f00b204", ""]) == []


def test_given_a_holder_when_its_fate_is_asked_for_then_it_runs_or_is_dead_or_nothing_is_known() -> None:
    holders = [holder_name(), f"{host_name()}.{os.getpid()}.1", "00000000.1.1", "d41d8cd98f00b204"]
    assert [liveness(holder) for holder in holders] == ["runs", "dead", "unknown", "unknown"]


def test_names_fit_their_column() -> None:
    assert len(holder_name()) <= 32
