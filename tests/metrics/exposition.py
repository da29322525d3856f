"""Parse an exposition of metrics for tests."""

from dataclasses import dataclass

from prometheus_client.openmetrics import exposition, parser
from prometheus_client.registry import CollectorRegistry
from sqlalchemy import Engine

from worker.metrics.definitions import registry
from worker.metrics.figures import read_figures
from worker.settings import Settings

Key = tuple[str, ...]


@dataclass(frozen=True)
class Exposition:
    """Samples by name and label values; the values are in the order of the label names."""

    samples: dict[str, dict[Key, float]]
    labels: dict[str, set[str]]

    def value(self, name: str, *labels: str) -> float:
        """Return the value of one sample, which must exist."""
        return self.samples[f"fetch_worker_{name}"][labels]

    def all(self, name: str) -> dict[Key, float]:
        """Return all samples of a name that are not zero."""
        return {key: value for key, value in self.samples.get(f"fetch_worker_{name}", {}).items() if value}


def parse(text: str) -> Exposition:
    """Parse OpenMetrics strictly: wrong types, suffixes, orders and duplicate samples are errors."""
    samples: dict[str, dict[Key, float]] = {}
    labels: dict[str, set[str]] = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            key = tuple(value for _, value in sorted(sample.labels.items()))
            samples.setdefault(sample.name, {})[key] = sample.value
            labels.setdefault(sample.name, set()).update(sample.labels)
    return Exposition(samples, labels)


def open_metrics(metrics: CollectorRegistry) -> str:
    """Return the metrics in the OpenMetrics format."""
    return str(exposition.generate_latest(metrics).decode())


def registry_of(engine: Engine, settings: Settings | None = None) -> CollectorRegistry:
    """Return a registry that reads the database at each scrape, without sharing."""
    used_settings = settings or Settings()
    return registry(lambda: read_figures(engine, used_settings))


def scrape(engine: Engine, settings: Settings | None = None) -> Exposition:
    """Return the parsed result of a scrape."""
    return parse(open_metrics(registry_of(engine, settings)))
