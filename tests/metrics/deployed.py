"""The alert rules, the scrape configuration and the dashboard, as files and as the expressions in them."""

from collections.abc import Iterator
from json import loads
from pathlib import Path
from typing import Any

import promql_parser
from ruamel.yaml import YAML

DEPLOY = Path(__file__).parents[2] / "worker" / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
SCRAPE = DEPLOY / "prometheus" / "scrape.yml"
DASHBOARD = loads((DEPLOY / "grafana" / "fetch-worker.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
RULES: list[dict[str, Any]] = YAML(typ="safe", pure=True).load(ALERTS)["groups"][0]["rules"]


def _queries() -> Iterator[tuple[str, str]]:
    """Yield every expression with the name of its panel or alert."""
    for panel in PANELS:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for rule in RULES:
        yield rule["alert"], rule["expr"]


QUERIES = dict(_queries())


def nodes(expression: str) -> list[Any]:
    """Return the nodes of an expression, with values for the dashboard's variables."""
    for name, value in (("$__rate_interval", "5m"), ("$account", ".*"), ("$kind", ".*")):
        expression = expression.replace(name, value)
    found: list[Any] = []
    promql_parser.walk(promql_parser.parse(expression), found.append)
    return found


def selectors(expression: str) -> list[Any]:
    """Return the selectors of an expression. Each has the name of a metric and matchers of labels."""
    return [node for node in nodes(expression) if type(node).__name__ == "VectorSelector"]
