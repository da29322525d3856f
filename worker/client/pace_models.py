"""The pace models of classes of jobs, read from the database and cached in the process of a web app."""

import time

from sqlalchemy import URL, Connection

from worker.core.pacing.policy import PaceModel
from worker.polling.duration_learner import FRESH_SECONDS, read_models

MAX_CACHED_MODELS = 2_000

_models: dict[tuple[str, str, str], tuple[PaceModel, float]] = {}


def cached_model(url: URL, account: str, kind: str) -> PaceModel | None:
    """Return the cached pace model of a class of jobs, or `None` if it is not cached or too old."""
    model, until = _models.get((str(url), account, kind), (None, 0.0))
    return model if time.monotonic() < until else None


def pace_model(connection: Connection, account: str, kind: str) -> PaceModel:
    """Return the pace model of a class of jobs, read from the database at most every FRESH_SECONDS."""
    url = connection.engine.url
    model = cached_model(url, account, kind)
    if model is None:
        if len(_models) >= MAX_CACHED_MODELS:
            _models.clear()
        model, _ = read_models(connection, [(account, kind)])[account, kind]
        _models[str(url), account, kind] = (model, time.monotonic() + FRESH_SECONDS)
    return model


def clear_cache() -> None:
    """Remove all cached models."""
    _models.clear()
