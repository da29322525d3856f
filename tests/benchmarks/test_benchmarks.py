"""Tests of the benchmarks: the fake API, the optimum, and the command with its table."""

import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.benchmarks.deployment import ROOT, api_server, make_certificate
from tests.benchmarks.optimum import GRID, burst_bound, cheapest, frontier, least_delay, lognormal, slot_bound
from tests.benchmarks.pace import run, workloads
from tests.benchmarks.table import Rounds, Table

BODY = {"key": "sk-benchmark"}


def test_the_fake_api_answers_processing_and_counts_requests() -> None:
    with api_server() as server, requests.Session() as session:
        answers = [session.post(f"{server.base}/fetch/{number}", json=BODY).json() for number in range(5)]

        assert {answer["status"] for answer in answers} == {"processing"}
        assert server.count() == 5


def test_the_fake_api_handles_many_requests_at_once() -> None:
    with api_server(0.2) as server, ThreadPoolExecutor(20) as threads:
        began = time.monotonic()
        list(threads.map(lambda _: requests.post(f"{server.base}/fetch/1", json=BODY, timeout=5).json(), range(20)))

        assert 0.2 <= time.monotonic() - began < 2.0


def test_the_fake_api_supports_tls(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    with api_server(certificate=certificate) as server:
        answer = requests.post(f"{server.base}/fetch/1", json=BODY, verify=str(certificate), timeout=5)

        assert answer.json()["status"] == "processing"


def test_a_row_has_the_reached_target_and_nothing_if_there_is_no_target() -> None:
    table = Table()
    rounds = Rounds([1.0, 3.0, 2.0], [2.0, 2.0, 2.0])
    table.ratio("less is better", rounds, "s", 1, must=1.2, aim=0.8)
    table.ratio("more is better", rounds, "s", 1, must=1.2, aim=2.0, more=True)
    table.figure("a plain figure", 5.0, "/s")
    table.figure("few", 5.0, "%", must=9, aim=5, more=False)

    assert [row.reached for row in table.rows] == ["must", "NO", "", "aim"]
    assert "| less is better | 2 s | 2 s | 1.00 (0.50–1.50) | ≤ 1.2 | ≤ 0.8 | must |" in table.text()


def test_the_command_runs_the_named_part_and_prints_a_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "recording", "--rounds", "1", "--json", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    assert "recording 200 answers ÷ psycopg with unnest" in result.stdout, result.stderr
    assert "requests/s at" in result.stdout
    (row,) = json.loads((tmp_path / "out").read_text())
    assert row["name"].startswith("recording 200 answers")


def test_an_unknown_part_is_refused_with_the_available_names() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "pols"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert result.returncode == 2
    assert "polls, scale, share" in result.stderr


def test_the_optimum_matches_the_formula_for_memoryless_durations() -> None:
    """For a memoryless duration the polls are equidistant: the odds over one interval equal the price."""
    rate, price = 1 / 40.0, 0.5
    survival = [math.exp(-rate * age) for age in GRID]
    cost, _ = cheapest(survival, [price] * len(GRID))
    interval = min((step / 100 for step in range(1, 3_000)), key=lambda d: abs(math.expm1(rate * d) / rate - d - price))

    assert cost.polls == pytest.approx(1 / -math.expm1(-rate * interval), rel=0.03)
    assert cost.delay == pytest.approx(interval / -math.expm1(-rate * interval) - 1 / rate, rel=0.05)


def test_the_learned_policy_comes_close_to_the_optimum() -> None:
    images = next(item for item in workloads(count=1_500) if item.name == "images")
    costs = frontier(images.classes)
    result = run(images.jobs, 0.5)
    best = least_delay(costs, result.polls / result.jobs)

    assert 0.9 < sum(result.delays) / len(result.delays) / best < 1.2


def test_burst_bounds_match_simple_cases() -> None:
    assert slot_bound([0.0] * 10, 2.0) == pytest.approx(2.75)  # 0.5, 1.0, … 5.0 seconds
    assert slot_bound([100.0, 200.0], 2.0) == 0.0
    assert burst_bound(lognormal(8.0, 0.6), 200, 2.0) < slot_bound([8.0] * 200, 2.0) * 1.5
