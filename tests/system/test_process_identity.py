"""Claims name their process, so that other processes on the host can detect dead claim holders."""

import os
import subprocess
import sys

import pytest

from worker.system.process_identity import dead_holders, holder_name, host_name, liveness, started_at

pytestmark = pytest.mark.every_python


def test_this_process_is_not_dead() -> None:
    assert holder_name().startswith(f"{host_name()}.{os.getpid()}.")
    assert dead_holders([holder_name()]) == []


def test_a_killed_process_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        holder = f"{host_name()}.{child.pid}.{started_at(child.pid)}"
        assert dead_holders([holder]) == []
        child.kill()
        child.wait()
        assert dead_holders([holder]) == [holder]


def test_if_a_process_id_is_reused_the_earlier_process_is_dead() -> None:
    earlier = f"{host_name()}.{os.getpid()}.1"
    assert dead_holders([earlier]) == [earlier]


def test_holders_of_other_hosts_and_of_unknown_form_are_not_dead() -> None:
    assert dead_holders(["00000000.1.1", "d41d8cd98f00b204", ""]) == []


def test_liveness_of_a_holder_is_runs_dead_or_unknown() -> None:
    holders = [holder_name(), f"{host_name()}.{os.getpid()}.1", "00000000.1.1", "d41d8cd98f00b204"]
    assert [liveness(holder) for holder in holders] == ["runs", "dead", "unknown", "unknown"]


def test_names_fit_their_column() -> None:
    assert len(holder_name()) <= 32
