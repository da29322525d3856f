"""Alerts fire when they should, page only if a person must act now, and name a command and a heading of the manual."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from prometheus_client.exposition import generate_latest
from ruamel.yaml import YAML
from sqlalchemy import Connection, insert
from sqlalchemy.engine import make_url

from tests import planted
from tests.docs.manual import PAGES, anchors
from tests.metrics.alert_cases import CASES, Case
from tests.metrics.deployed import ALERTS, RULES, SCRAPE, selectors
from tests.metrics.exposition import Exposition, registry_of
from tests.rows import add_downloading, add_job, add_output, add_process, job_values, seconds
from worker.cli.commands import group
from worker.operations.troubles import CODES
from worker.settings import Settings
from worker.store.engine import database_now, make_engine
from worker.store.schema import jobs

PAGED = {
    *("no_worker", "polling_stalled", "account_refused", "no_key", "storage", "no_downloader", "links_ending"),
    *("webhooks_refused", "wrong_path", "api_unreachable", "uncertain_orders"),
}
Firing = dict[str, str]  # the severity of each alert that fires, by its name


def _code(rule: dict[str, Any]) -> str:
    """Return the heading of the manual that an alert names: the code of its trouble, if it has one."""
    return str(rule["annotations"]["manual"]).partition(", ")[2]


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_each_alert_has_a_summary_a_severity_and_advice(
    rule: dict[str, Any], everything: tuple[Exposition, str]
) -> None:
    metrics, _ = everything
    assert re.fullmatch(r"FetchWorker[A-Z][A-Za-z]+", rule["alert"])
    assert re.fullmatch(r"[0-9]+[mh]", rule["for"])
    assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"})
    assert set(rule["annotations"]) == {"summary", "description", "command", "manual"}
    assert len(rule["annotations"]["description"]) > len("Do this.")
    shown = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    assert shown <= set().union(*(metrics.labels[selector.name] for selector in selectors(rule["expr"])))


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_each_alert_names_a_command_and_a_heading_of_the_manual_that_exist(rule: dict[str, Any]) -> None:
    program, name, *arguments = rule["annotations"]["command"].replace("{{ $labels.scope }}", "account").split()
    command = group.commands[name]
    options = {option for param in command.params if isinstance(param, click.Option) for option in param.opts}
    page, _, heading = rule["annotations"]["manual"].partition(", ")

    assert program == "fetch-worker"
    assert {argument for argument in arguments if argument.startswith("--")} <= options
    assert heading in anchors(PAGES[page.removesuffix(".md")])


def test_every_trouble_has_an_alert_and_pages_only_if_a_person_must_act() -> None:
    coded = [rule for rule in RULES if _code(rule) in CODES]

    assert {_code(rule) for rule in coded} == set(CODES)
    assert {_code(rule) for rule in coded if rule["labels"]["severity"] == "critical"} == PAGED
    others = {rule["alert"] for rule in RULES if rule not in coded and rule["labels"]["severity"] == "critical"}
    assert others == {"FetchWorkerMetricsDown"}


def test_each_alert_exists_once_and_is_tested_to_fire() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(names) == len(set(names))
    assert set(names) == {case.alert for case in CASES if case.fires}


@pytest.mark.server
def test_promtool_accepts_the_rules_and_the_scrape_configuration(promtool: str) -> None:
    for arguments in (["rules", str(ALERTS)], ["config", str(SCRAPE)]):
        process = subprocess.run([promtool, "check", *arguments], capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.server
def test_alerts_fire_when_they_should_and_not_before(promtool: str, tmp_path: Path) -> None:
    _run_promtool(promtool, tmp_path, [_promtool_case(case) for case in CASES])


def _promtool_case(case: Case) -> dict[str, Any]:
    severity = next(rule["labels"]["severity"] for rule in RULES if rule["alert"] == case.alert)
    fired = [{"exp_labels": {"severity": severity} | labels} for labels in case.labels]
    moments = [(at, fired) for at in case.fires] + [(at, []) for at in case.silent]
    expected = [{"eval_time": f"{at}m", "alertname": case.alert, "exp_alerts": exp} for at, exp in moments]
    series = [{"series": name, "values": values} for name, values in case.series.items()]
    return {"name": case.alert, "interval": "1m", "input_series": series, "alert_rule_test": expected}


def _run_promtool(promtool: str, folder: Path, tests: list[dict[str, Any]]) -> None:
    """Run unit tests without annotations, which `check rules` checks and which would have to be repeated here."""
    bare = [{name: rule[name] for name in ("alert", "expr", "for", "labels")} for rule in RULES]
    rules, cases = folder / "rules.yml", folder / "cases.yml"
    rules.write_text(json.dumps({"groups": [{"name": "fetch-worker", "rules": bare}]}), encoding="utf-8")
    document = {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}
    cases.write_text(json.dumps(document), encoding="utf-8")

    process = subprocess.run([promtool, "test", "rules", str(cases)], capture_output=True, text=True, check=False)

    assert process.returncode == 0, process.stdout + process.stderr


def test_the_scrape_configuration_uses_the_default_address() -> None:
    settings = Settings()
    config = YAML(typ="safe", pure=True).load(SCRAPE)

    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"{settings.metrics_address}:{settings.metrics_port}"]}]
    assert config["rule_files"] == [ALERTS.name]


# ── from the tables to the alert ──────────────────────────────────────────────────────────────────────────────────────


def polling(connection: Connection, rps: float = 20.0) -> None:
    """Record a worker process that makes requests."""
    add_process(connection, accounts={"default": rps})
    planted.add_breaker(connection, "account", "default", proven=True, asked_at=database_now(connection))


def late_jobs(connection: Connection, count: int, late: float) -> None:
    """Add jobs that are due for some seconds."""
    due_at = database_now(connection) - seconds(late)
    connection.execute(insert(jobs), [job_values(str(number), due_at=due_at) for number in range(count)])


def burst(connection: Connection) -> None:
    polling(connection)
    late_jobs(connection, 5_000, late=200)


def no_worker(connection: Connection) -> None:
    add_process(connection, seen_at=database_now(connection) - timedelta(minutes=1))
    late_jobs(connection, 3, late=60)


def stalled(connection: Connection) -> None:
    add_process(connection)
    late_jobs(connection, 3, late=60)


def outage(connection: Connection) -> None:
    polling(connection)
    planted.add_open_breaker(connection, "host", "api.test", "unreachable: no answer")
    late_jobs(connection, 300, late=600)


def refused_key(connection: Connection) -> None:
    add_process(connection)
    planted.add_open_breaker(connection, "account", "default", "key rejected: Invalid API key")
    late_jobs(connection, 3, late=60)


def no_key(connection: Connection) -> None:
    polling(connection)
    add_job(connection, account="shop", due_at=database_now(connection) - seconds(60))


def disk_full(connection: Connection) -> None:
    polling(connection)
    trouble: dict[str, Any] = {"error_code": "storage", "error_message": "No space left on device"}
    add_output(connection, add_downloading(connection), listed_at=database_now(connection) - seconds(30), **trouble)


SCENES: dict[Callable[[Connection], None], dict[int, Firing]] = {
    polling: {minute: {} for minute in (1, 60)},
    burst: {4: {}, **{minute: {"FetchWorkerBacklog": "warning"} for minute in (6, 30, 60)}},
    no_worker: {1: {}, 3: {"FetchWorkerNoWorker": "critical"}},
    stalled: {2: {}, 4: {"FetchWorkerPollingStalled": "critical"}},
    outage: {
        4: {},
        10: {"FetchWorkerApiUnreachable": "warning"},
        31: {"FetchWorkerApiUnreachable": "warning", "FetchWorkerApiOutage": "critical"},
    },
    refused_key: {1: {}, 3: {"FetchWorkerAccountRefused": "critical"}},
    no_key: {2: {}, 4: {"FetchWorkerNoKey": "critical"}},
    disk_full: {1: {}, 3: {"FetchWorkerStorageRefuses": "critical"}},
}


@pytest.mark.server
def test_what_is_in_the_tables_raises_these_alerts_and_no_other(
    promtool: str, tmp_path: Path, migrated_sqlite: Path
) -> None:
    """The metrics are read once and then stay the same, for an hour at most.

    A burst of 5,000 jobs at 20 requests per second does not page, even if it lasts for an hour.
    """
    tests = []
    for plant, firing in SCENES.items():
        series = _series(plant, tmp_path / f"{plant.__name__}.db", migrated_sqlite)
        tests.append(_promtool_scene(plant.__name__, series, firing))

    _run_promtool(promtool, tmp_path, tests)


def _series(plant: Callable[[Connection], None], path: Path, migrated_sqlite: Path) -> list[str]:
    """Return the samples that a scrape of a database with these rows gives, as `name{labels} value`."""
    shutil.copy(migrated_sqlite, path)
    engine = make_engine(make_url(f"sqlite:///{path}"))
    with engine.begin() as connection:
        plant(connection)
    text = generate_latest(registry_of(engine)).decode()
    engine.dispose()
    return [line for line in text.splitlines() if not line.startswith("#")]


def _promtool_scene(name: str, samples: Iterable[str], firing: dict[int, Firing]) -> dict[str, Any]:
    split = (sample.rpartition(" ") for sample in samples)
    series = [{"series": labels, "values": f"{float(value):.15g}x60"} for labels, _, value in split]
    expected = [
        {
            "eval_time": f"{minute}m",
            "expr": 'count by (alertname, severity) (ALERTS{alertstate="firing"})',
            "exp_samples": [
                {"labels": f'{{alertname="{alert}", severity="{severity}"}}', "value": 1}
                for alert, severity in alerts.items()
            ],
        }
        for minute, alerts in firing.items()
    ]
    return {"name": name, "interval": "1m", "input_series": series, "promql_expr_test": expected}
