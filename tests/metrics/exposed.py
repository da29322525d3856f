"""What an exposition says, as tests ask for it."""

from dataclasses import dataclass

from prometheus_client.openmetrics import exposition, parser
from prometheus_client.registry import CollectorRegistry
from sqlalchemy import Engine

from worker.metrics.families import registry
from worker.metrics.reading import read
from worker.settings import Settings

Key = tuple[str, ...]


@dataclass(frozen=True)
class Exposed:
    """Each sample by its name and, in the order of their names, the values of its labels."""

    samples: dict[str, dict[Key, float]]
    labels: dict[str, set[str]]

    def value(self, name: str, *labels: str) -> float:
        """One sample, which is there."""
        return self.samples[f"fetch_worker_{name}"][labels]

    def all(self, name: str) -> dict[Key, float]:
        """All samples of one name that are not zero."""
        return {key: value for key, value in self.samples.get(f"fetch_worker_{name}", {}).items() if value}


def parsed(text: str) -> Exposed:
    """Reads OpenMetrics strictly: wrong types, suffixes, orders and doubled samples are errors."""
    samples: dict[str, dict[Key, float]] = {}
    labels: dict[str, set[str]] = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            key = tuple(value for _, value in sorted(sample.labels.items()))
            samples.setdefault(sample.name, {})[key] = sample.value
            labels.setdefault(sample.name, set()).update(sample.labels)
    return Exposed(samples, labels)


def open_metrics(made: CollectorRegistry) -> str:
    """In the format of OpenMetrics."""
    return str(exposition.generate_latest(made).decode())


def registry_of(engine: Engine, settings: Settings | None = None) -> CollectorRegistry:
    """The registry that a scrape takes, without sharing."""
    wanted = settings or Settings()
    return registry(lambda: read(engine, wanted))


def scraped(engine: Engine, settings: Settings | None = None) -> Exposed:
    """What a scrape gets."""
    return parsed(open_metrics(registry_of(engine, settings)))
