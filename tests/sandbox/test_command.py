"""The stand-in as a program: it announces its address, serves, and stops on a signal."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from worker.sandbox.command import main
from worker.sandbox.orders import order_paths
from worker.sandbox.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]


@contextmanager
def started(*options: str, cwd: Path = ROOT) -> Iterator[subprocess.Popen[str]]:
    """Start the program as a process, in an environment with settings that it must ignore."""
    environment = {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "SD_API_KEY": "canary", "PORT": "1"}
    command = [sys.executable, "-m", "worker.sandbox", *options]
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_announces_its_address_serves_and_stops_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    """It prints one JSON line when it listens, exits with 0 on a signal despite an open connection, and logs no key."""
    (tmp_path / ".env").write_text("SD_API_KEY=canary\n")
    with started("--port", "0", "--json", "--verbose", "--key", "k-1", "--min-seconds", "60", "--max-seconds", "60",
                 cwd=tmp_path) as process:  # fmt: skip
        assert process.stdout is not None
        announcement = json.loads(process.stdout.readline())
        content = json.dumps({"key": announcement["key"], "prompt": "sea"}).encode()
        call = urllib.request.Request(  # noqa: S310  (the address is the one just announced)
            f"{announcement['url']}/text2img?key=k-1", data=content, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call, timeout=5) as answer:  # noqa: S310
            job = json.load(answer)
        process.send_signal(number)
        out, err = process.communicate(timeout=5)

    assert announcement["key"] == "k-1"
    assert announcement["url"] == f"{announcement['root_url']}/api/v3"
    assert job["status"] == "processing"
    assert (process.returncode, out) == (0, "")
    assert err == "POST /api/v3/text2img 200\n"


def test_by_default_it_prints_one_readable_line_and_logs_nothing() -> None:
    """Standard error stays empty."""
    with started("--port", "0") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
        out, err = process.communicate(timeout=5)

    assert "http://127.0.0.1:" in line
    assert "sandbox-key" in line
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "65536"],
        ["--port", "http"],
        ["--host", "0.0.0.0"],
        ["--host", "example.org"],
        ["--outputs", "0"],
        ["--outputs", "1-9"],
        ["--outputs", "3-2"],
        ["--outputs", "some"],
        ["--min-seconds", "9", "--max-seconds", "1"],
        ["--max-seconds", "nan"],
        ["--rps", "-1"],
        ["--limit-style", "polite"],
        ["--failure-rate", "2"],
        ["--scenario", "unheard-of"],
        ["--plan", "free"],
        ["--slots", "-1"],
        ["--slots", "many"],
        ["--size", "5"],
        ["--key", ""],
        ["--seed", "x"],
        ["--unknown"],
        ["more"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_clear_line_and_exit_code_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is started, and nothing is printed to standard output."""
    assert main(options) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fetch-worker sandbox: ")
    assert err.count("\n") == 1


def test_help_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    """It lists the options, the scenarios with their descriptions, and the order paths."""
    assert main(["--help"]) == 0

    out = capsys.readouterr().out
    assert "--failure-rate" in out
    assert all(f"  {name} " in out and scenario.about in out for name, scenario in SCENARIOS.items())
    assert all(f"  {path}\n" in out or out.endswith(f"  {path}\n") for path in order_paths())


def test_ids_differ_between_runs_and_a_scenario_can_be_chosen() -> None:
    """So a persistent database never gets an old picture. Two runs with one seed have the same ids."""

    def first_id(*options: str) -> int:
        with started("--port", "0", "--json", *options) as process:
            assert process.stdout is not None
            announcement = json.loads(process.stdout.readline())
            content = json.dumps({"key": announcement["key"], "prompt": "sea"}).encode()
            call = urllib.request.Request(  # noqa: S310  (the address is the one just announced)
                f"{announcement['url']}/text2img", data=content, headers={"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(call, timeout=5) as answer:  # noqa: S310
                job = json.load(answer)
        assert job["status"] == "success"
        return int(job["id"])

    ids = [first_id("--scenario", "ready-at-once", *seed) for seed in ((), (), ("--seed", "5"), ("--seed", "5"))]

    assert ids[0] != ids[1]
    assert ids[2] == ids[3] == 12_202_888


def test_a_port_in_use_is_one_clear_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    """The signal handlers are restored."""
    previous = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert main(["--port", str(listener.getsockname()[1])]) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert "cannot listen on 127.0.0.1 port" in err
    assert err.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is previous
