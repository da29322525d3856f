"""The benchmarks themselves: their yardsticks answer, and the command prints its table. No figure is asserted."""

import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.benchmarks.optimum import GRID, burst_bound, cheapest, frontier, least_delay, lognormal, slot_bound
from tests.benchmarks.pace import run, workloads
from tests.benchmarks.stand import ROOT, api, make_certificate
from tests.benchmarks.table import Rounds, Table

BODY = {"key": "sk-benchmark"}


def test_the_server_answers_as_the_api_does_and_counts_what_it_is_asked() -> None:
    with api() as server, requests.Session() as session:
        answers = [session.post(f"{server.base}/fetch/{number}", json=BODY).json() for number in range(5)]

        assert {answer["status"] for answer in answers} == {"processing"}
        assert server.count() == 5


def test_the_server_keeps_many_waiting_at_once() -> None:
    with api(0.2) as server, ThreadPoolExecutor(20) as threads:
        began = time.monotonic()
        list(threads.map(lambda _: requests.post(f"{server.base}/fetch/1", json=BODY, timeout=5).json(), range(20)))

        assert 0.2 <= time.monotonic() - began < 2.0


def test_the_server_speaks_tls(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    with api(certificate=certificate) as server:
        answer = requests.post(f"{server.base}/fetch/1", json=BODY, verify=str(certificate), timeout=5)

        assert answer.json()["status"] == "processing"


def test_a_line_says_what_was_reached_and_nothing_where_nothing_is_asked_for() -> None:
    table = Table()
    rounds = Rounds([1.0, 3.0, 2.0], [2.0, 2.0, 2.0])
    table.ratio("less is better", rounds, "s", 1, must=1.2, aim=0.8)
    table.ratio("more is better", rounds, "s", 1, must=1.2, aim=2.0, more=True)
    table.figure("a plain one", 5.0, "/s")
    table.figure("few", 5.0, "%", must=9, aim=5, more=False)

    assert [line.reached for line in table.lines] == ["must", "NO", "", "aim"]
    assert "| less is better | 2 s | 2 s | 1.00 (0.50–1.50) | ≤ 1.2 | ≤ 0.8 | must |" in table.text()


def test_the_command_measures_what_it_is_asked_for_and_prints_a_table(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.benchmarks", "recording", "--rounds", "1", "--json", str(tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    assert "recording 200 answers ÷ psycopg with unnest" in done.stdout, done.stderr
    assert "requests/s at" in done.stdout
    (line,) = json.loads((tmp_path / "out").read_text())
    assert line["what"].startswith("recording 200 answers")


def test_an_unknown_part_is_refused_with_the_names_that_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "pols"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "polls, scale, share" in done.stderr


def test_the_optimum_is_what_theory_says_where_theory_has_a_formula() -> None:
    """For a memoryless duration polls are equally far apart: the odds over one interval are the price."""
    rate, price = 1 / 40.0, 0.5
    left = [math.exp(-rate * age) for age in GRID]
    cost, _ = cheapest(left, [price] * len(GRID))
    apart = min((step / 100 for step in range(1, 3_000)), key=lambda d: abs(math.expm1(rate * d) / rate - d - price))

    assert cost.polls == pytest.approx(1 / -math.expm1(-rate * apart), rel=0.03)
    assert cost.delay == pytest.approx(apart / -math.expm1(-rate * apart) - 1 / rate, rel=0.05)


def test_no_policy_beats_the_optimum_and_the_learned_one_comes_near() -> None:
    images = next(one for one in workloads(count=1_500) if one.name == "images")
    costs = frontier(images.classes)
    done = run(images.jobs, 0.5)
    best = least_delay(costs, done.polls / done.jobs)

    assert 0.9 < sum(done.delays) / len(done.delays) / best < 1.2


def test_bounds_of_bursts_hold_where_the_answer_is_plain() -> None:
    assert slot_bound([0.0] * 10, 2.0) == pytest.approx(2.75)  # 0.5, 1.0, … 5.0 seconds
    assert slot_bound([100.0, 200.0], 2.0) == 0.0
    assert burst_bound(lognormal(8.0, 0.6), 200, 2.0) < slot_bound([8.0] * 200, 2.0) * 1.5
