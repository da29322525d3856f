"""Names follow the conventions; alert rules and dashboard use existing metrics; alerts fire when they should."""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from ruamel.yaml import YAML

from tests.metrics.exposition import Exposition
from worker.core.circuit_breaker import HOLD_CLASSES
from worker.core.histograms import ANSWER_WORDS
from worker.settings import Settings
from worker.store.reports.stats import STATES
from worker.store.reports.work_state import NO_KEY

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "worker" / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
SCRAPE = DEPLOY / "prometheus" / "scrape.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "fetch-worker.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
RULES: list[dict[str, Any]] = YAML(typ="safe", pure=True).load(ALERTS)["groups"][0]["rules"]
PROMETHEUS_LABELS = {"instance", "job"}  # Prometheus adds these
VALUES = {
    "status": set(STATES),
    "answer": set(ANSWER_WORDS.values()),
    "reason": {*HOLD_CLASSES, NO_KEY},
    "scope": {"account", "host"},
    "trouble": {"storage"},
    "outcome": {"stored", "delivered", "failed"},
}


@dataclass(frozen=True)
class Case:
    """An alert, series with one value per minute, the minutes at which it fires or is silent, and its labels."""

    alert: str
    series: dict[str, str]
    fires: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()
    labels: tuple[dict[str, str], ...] = ({},)


def _hold(scope: str, name: str, reason: str, values: str) -> dict[str, str]:
    return {f'fetch_worker_hold{{scope="{scope}", name="{name}", reason="{reason}"}}': values}


def _delays(fast: str, slow: str) -> dict[str, str]:
    """Return the series for jobs seen within 5 s and within 300 s."""
    labels = 'account="shop", kind="image"'
    rows = {"5.0": fast, "300.0": slow, "+Inf": slow}
    buckets = {f'fetch_worker_detection_delay_seconds_bucket{{{labels}, le="{le}"}}': rows[le] for le in rows}
    return buckets | {f"fetch_worker_detection_delay_seconds_count{{{labels}}}": slow}


def _ended(completed: str, failed: str) -> dict[str, str]:
    series = 'fetch_worker_jobs_finished_total{account="shop", kind="image", status='
    return {f'{series}"completed"}}': completed, f'{series}"failed"}}': failed}


IMAGE = {"account": "shop", "kind": "image"}
CASES = [
    Case("FetchWorkerMetricsDown", {}, fires=(3, 9), silent=(2,)),
    Case("FetchWorkerMetricsDown", {"fetch_worker_up": "1x4 0x4 1x9"}, fires=(8, 9), silent=(4, 7, 10)),
    Case("FetchWorkerMetricsDown", {"fetch_worker_up": "1x4 _x9"}, fires=(13,), silent=(4, 6)),
    Case("FetchWorkerDueWorkNotDone", {"fetch_worker_oldest_due_seconds": "0x4 61+60x9"}, fires=(7,), silent=(4, 6)),
    Case("FetchWorkerDueWorkNotDone", {"fetch_worker_oldest_due_seconds": "50x9"}, silent=(9,)),
    Case(
        "FetchWorkerAccountHeld",
        _hold("account", "shop", "no credits", "_x2 1x5 _x9") | _hold("account", "else", "rate limited", "1x20"),
        fires=(4, 7),
        silent=(1, 2, 14),
        labels=({"scope": "account", "name": "shop", "reason": "no credits"},),
    ),
    Case("FetchWorkerAccountHeld", _hold("account", "shop", "by hand", "1x20"), silent=(20,)),
    Case("FetchWorkerAccountHeld", _hold("host", "api.test", "unreachable", "1x20"), silent=(20,)),
    Case(
        "FetchWorkerAccountHeldByHand",
        _hold("account", "shop", "by hand", "1x400"),
        fires=(361,),
        silent=(300,),
        labels=({"scope": "account", "name": "shop", "reason": "by hand"},),
    ),
    Case(
        "FetchWorkerHostUnreachable",
        _hold("host", "api.test", "unreachable", "1x20"),
        fires=(3,),
        silent=(1,),
        labels=({"scope": "host", "name": "api.test", "reason": "unreachable"},),
    ),
    Case(
        "FetchWorkerRateLimited",
        {'fetch_worker_api_answers_total{account="shop", answer="rate_limited"}': "0+3x60 180x60"},
        fires=(40, 60),
        silent=(10, 100),
        labels=({"account": "shop"},),
    ),
    Case("FetchWorkerDetectionDelayHigh", _delays("0+1x99", "0+10x99"), (60, 90), (10,), (IMAGE,)),
    Case("FetchWorkerDetectionDelayHigh", _delays("0+10x99", "0+10x99"), silent=(60, 90)),
    Case("FetchWorkerDetectionDelayHigh", _delays("0x99", "0+0.1x99"), silent=(60, 90)),
    Case(
        "FetchWorkerOutputsUnstored",
        {"fetch_worker_outputs_unstored_oldest_seconds": "0+60x80"},
        fires=(72,),
        silent=(60, 69),
    ),
    Case(
        "FetchWorkerStorageTrouble",
        {'fetch_worker_outputs_unstored{trouble="storage"}': "0x3 5x9 0x9"},
        fires=(7,),
        silent=(3, 5, 14),
        labels=({"trouble": "storage"},),
    ),
    Case("FetchWorkerStorageTrouble", {'fetch_worker_outputs_unstored{trouble="http_error"}': "5x9"}, silent=(9,)),
    Case("FetchWorkerClaimsStuck", {"fetch_worker_claims_stuck": "0x3 2x9"}, fires=(6,), silent=(3, 5)),
    Case("FetchWorkerWebhooksLate", {"fetch_worker_webhooks_late": "0x3 2x9"}, fires=(9,), silent=(3, 8)),
    Case(
        "FetchWorkerWebhooksGivenUp",
        {'fetch_worker_webhooks_ended_total{outcome="failed"}': "0x9 1x100"},
        fires=(12, 60),
        silent=(9, 10, 100),
        labels=({"outcome": "failed"},),
    ),
    Case(
        "FetchWorkerWebhooksGivenUp",
        {'fetch_worker_webhooks_ended_total{outcome="delivered"}': "0+5x100"},
        silent=(60,),
    ),
    Case("FetchWorkerJobsFail", _ended("0+6x99", "0+4x99"), (60,), (5,), (IMAGE,)),
    Case("FetchWorkerJobsFail", _ended("0+9x99", "0+1x99"), silent=(60,)),
    Case("FetchWorkerJobsFail", _ended("0x99", "0+0.2x99"), silent=(60,)),
]
UNITS = {"milliseconds", "ms", "minutes", "hours", "kilobytes", "megabytes", "percent"}


def _queries() -> Iterator[tuple[str, str]]:
    """Yield every expression with the name of its panel or alert."""
    for panel in PANELS:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for rule in RULES:
        yield rule["alert"], rule["expr"]


QUERIES = dict(_queries())


def _nodes(expression: str) -> list[Any]:
    for name, value in (("$__rate_interval", "5m"), ("$account", ".*"), ("$kind", ".*")):
        expression = expression.replace(name, value)
    nodes: list[Any] = []
    promql_parser.walk(promql_parser.parse(expression), nodes.append)
    return nodes


def _selectors(expression: str) -> list[Any]:
    return [node for node in _nodes(expression) if type(node).__name__ == "VectorSelector"]


@pytest.mark.parametrize("user", QUERIES)
def test_every_expression_uses_existing_metrics_labels_and_values(
    user: str, everything: tuple[Exposition, str]
) -> None:
    metrics, _ = everything
    for selector in _selectors(QUERIES[user]):
        assert selector.name in metrics.samples, f"there is no {selector.name}"
        for matcher in selector.matchers.matchers:
            assert matcher.name in metrics.labels[selector.name], f"{selector.name} has no label {matcher.name}"
            if matcher.value != ".*":
                assert set(matcher.value.split("|")) <= VALUES[matcher.name]


@pytest.mark.parametrize("user", QUERIES)
def test_grouping_labels_exist(user: str, everything: tuple[Exposition, str]) -> None:
    """And quantiles of histograms keep the label of the buckets."""
    metrics, _ = everything
    for node in _nodes(QUERIES[user]):
        if type(node).__name__ == "AggregateExpr" and node.modifier is not None:
            inner = [selector.name for selector in _selectors(node.expr.prettify())]
            assert all(set(node.modifier.labels) <= metrics.labels[name] for name in inner)
            assert any(name.endswith("_bucket") for name in inner) == ("le" in node.modifier.labels)


def test_every_metric_is_used_by_the_dashboard_or_an_alert(everything: tuple[Exposition, str]) -> None:
    """Except the versions."""
    metrics, _ = everything
    used = {selector.name for query in QUERIES.values() for selector in _selectors(query)}
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in metrics.samples}
    used_families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in used}
    assert families - used_families == {"fetch_worker_build_info", "fetch_worker_schema_info"}


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_and_help_texts_follow_the_conventions(everything: tuple[Exposition, str]) -> None:
    """Base units; only counters end in _total; every metric has a help text that is a sentence."""
    _, text = everything
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", text, re.MULTILINE))
    types = dict(re.findall(r"^# TYPE (\S+) (.*)$", text, re.MULTILINE))
    assert set(helps) == set(types)
    for name, kind in types.items():
        assert re.fullmatch(r"fetch_worker_[a-z]+(_[a-z]+)*", name)
        assert name.endswith("_total") == (kind == "counter")
        assert not name.endswith(("_count", "_sum", "_bucket"))
        assert not UNITS & set(name.split("_"))
        assert helps[name].endswith(".")


@pytest.mark.server
def test_promtool_accepts_the_metrics(promtool: str, everything: tuple[Exposition, str]) -> None:
    process = subprocess.run(
        [promtool, "check", "metrics"], input=everything[1], capture_output=True, text=True, check=False
    )

    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


# ── alerts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_each_alert_has_a_summary_a_severity_and_advice(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"FetchWorker[A-Z][A-Za-z]+", rule["alert"])
    assert re.fullmatch(r"[0-9]+[mh]", rule["for"])
    assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"})
    assert set(rule["annotations"]) == {"summary", "description"}
    assert len(rule["annotations"]["description"]) > len("Do this.")
    shown = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    assert shown <= set(re.findall(r"\w+", rule["expr"])) | {"name", "reason", "scope"}


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
    """Without annotations, which `check rules` checks and which would have to be repeated here."""
    bare = [{name: rule[name] for name in ("alert", "expr", "for", "labels")} for rule in RULES]
    rules, cases = tmp_path / "rules.yml", tmp_path / "cases.yml"
    rules.write_text(json.dumps({"groups": [{"name": "fetch-worker", "rules": bare}]}), encoding="utf-8")
    tests = [_promtool_case(case) for case in CASES]
    document = {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}
    cases.write_text(json.dumps(document), encoding="utf-8")

    process = subprocess.run([promtool, "test", "rules", str(cases)], capture_output=True, text=True, check=False)

    assert process.returncode == 0, process.stdout + process.stderr


def _promtool_case(case: Case) -> dict[str, Any]:
    severity = next(rule["labels"]["severity"] for rule in RULES if rule["alert"] == case.alert)
    series = [{"series": name, "values": values} for name, values in case.series.items()]
    fired = [{"exp_labels": {"severity": severity} | labels} for labels in case.labels]
    moments = [(at, fired) for at in case.fires] + [(at, []) for at in case.silent]
    expected = [{"eval_time": f"{at}m", "alertname": case.alert, "exp_alerts": exp} for at, exp in moments]
    return {"name": case.alert, "interval": "1m", "input_series": series, "alert_rule_test": expected}


def test_the_scrape_configuration_uses_the_default_address() -> None:
    settings = Settings()
    config = YAML(typ="safe", pure=True).load(SCRAPE)

    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"{settings.metrics_address}:{settings.metrics_port}"]}]
    assert config["rule_files"] == [ALERTS.name]


# ── the dashboard ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_panels_have_unique_ids_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in PANELS]
    occupied: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] >= 0
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & occupied, panel["title"]
        occupied |= cells
    assert len(ids) == len(set(ids))
    assert len(occupied) == 24 * max(y + 1 for _, y in occupied), "there is a gap"


def test_the_dashboard_contains_nothing_of_an_installation() -> None:
    """Its data source is always a variable."""
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r'"datasource": \{"type": "prometheus", "uid": "([^"]*)"', text)) == {"${datasource}"}
    assert text.count('"datasource": {') == text.count('"uid": "${datasource}"')
    assert DASHBOARD["id"] is None
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "account", "kind"]
    assert not any(variable["current"] for variable in variables.values())
    assert re.search(r"https?://|\d+\.\d+\.\d+\.\d+", text) is None


def test_variables_list_existing_labels_and_are_used(everything: tuple[Exposition, str]) -> None:
    metrics, _ = everything
    for variable in DASHBOARD["templating"]["list"][1:]:
        listed = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
        assert listed is not None
        assert listed[2] in metrics.labels[listed[1]]
        assert any(f'{variable["name"]}=~"${variable["name"]}"' in query for query in QUERIES.values())


@pytest.mark.parametrize(
    "panel", [panel for panel in PANELS if panel["type"] != "row"], ids=lambda panel: panel["title"]
)
def test_each_panel_has_a_description_and_legends_of_existing_labels(
    panel: dict[str, Any], everything: tuple[Exposition, str]
) -> None:
    metrics, _ = everything
    assert panel["description"].endswith(".")
    assert panel["targets"]
    for target in panel["targets"]:
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        labels = set().union(*(metrics.labels[selector.name] for selector in _selectors(target["expr"])))
        assert shown <= labels
