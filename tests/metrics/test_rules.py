"""Names follow the conventions; alert rules and dashboard use existing metrics, labels and values."""

import json
import re
import subprocess
from typing import Any

import pytest

from tests.metrics.deployed import DASHBOARD, PANELS, QUERIES, nodes, selectors
from tests.metrics.exposition import Exposition
from worker.core.answer_names import ANSWER_NAMES
from worker.core.circuit_breaker import HOLD_CLASSES
from worker.operations.troubles import CODES
from worker.store.reports.stats import STATES
from worker.store.reports.work_state import NO_KEY

VALUES = {
    "status": set(STATES),
    "answer": {name.metric for name in ANSWER_NAMES.values()},
    "reason": {*HOLD_CLASSES, NO_KEY},
    "scope": {"account", "host", "job", "output", "webhook", "order"},  # of holds, and of claims
    "code": set(CODES),
    "outcome": {"stored", "delivered", "failed"},
}


UNITS = {"milliseconds", "ms", "minutes", "hours", "kilobytes", "megabytes", "percent"}


@pytest.mark.parametrize("user", QUERIES)
def test_every_expression_uses_existing_metrics_labels_and_values(
    user: str, everything: tuple[Exposition, str]
) -> None:
    metrics, _ = everything
    for selector in selectors(QUERIES[user]):
        assert selector.name in metrics.samples, f"there is no {selector.name}"
        for matcher in selector.matchers.matchers:
            assert matcher.name in metrics.labels[selector.name], f"{selector.name} has no label {matcher.name}"
            if matcher.value != ".*":
                assert set(matcher.value.split("|")) <= VALUES[matcher.name]


@pytest.mark.parametrize("user", QUERIES)
def test_grouping_labels_exist(user: str, everything: tuple[Exposition, str]) -> None:
    """And quantiles of histograms keep the label of the buckets."""
    metrics, _ = everything
    for node in nodes(QUERIES[user]):
        if type(node).__name__ == "AggregateExpr" and node.modifier is not None:
            inner = [selector.name for selector in selectors(node.expr.prettify())]
            assert all(set(node.modifier.labels) <= metrics.labels[name] for name in inner)
            assert any(name.endswith("_bucket") for name in inner) == ("le" in node.modifier.labels)


def test_every_metric_is_used_by_the_dashboard_or_an_alert(everything: tuple[Exposition, str]) -> None:
    """Except the versions."""
    metrics, _ = everything
    used = {selector.name for query in QUERIES.values() for selector in selectors(query)}
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
        labels = set().union(*(metrics.labels[selector.name] for selector in selectors(target["expr"])))
        assert shown <= labels
