"""Learns how long jobs take, from each answer, and shares it with other processes through the database.

Each process updates its own models at once. From time to time it adds what it learned to the shared row, and reads
what other processes added. A lost update only loses a little learning.
"""

import json
import logging
import time
from collections.abc import Iterable

from sqlalchemy import Connection, Engine

from worker.core.pacing.policy import PacedJob, PaceModel
from worker.store.engine import LOCK_WAIT, RELAXED, database_now
from worker.store.paces import Class, add_pace, load_paces, locked_pace, save_pace

log = logging.getLogger(__name__)

SHARE_SECONDS = 1.0
LOCK_PATIENCE = 0.5  # seconds to wait for a row that another transaction has locked; sharing is retried later
FRESH_SECONDS = 30.0  # after which a process that only reads loads the models again
MAX_CLASSES = 2_000  # held in memory


class DurationLearner:
    """The pace models of one process. Not thread-safe: use it from the poll loop only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(**{RELAXED: True, LOCK_WAIT: LOCK_PATIENCE})
        self._models: dict[Class, PaceModel] = {}
        self._versions: dict[Class, int] = {}
        self._changed: set[Class] = set()
        self._share_at = time.monotonic() + SHARE_SECONDS

    def prepare(self, classes: Iterable[Class]) -> None:
        """Load the models of these classes that are not loaded yet. Raises the errors of the database."""
        requested = set(classes)
        missing = requested - self._models.keys()
        if not missing:
            return
        if len(self._models) + len(missing) > MAX_CLASSES:
            self.share()
            self._models.clear()
            missing = requested  # those that were loaded before are cleared, too
        needed = missing | {(account, "") for account, _ in missing}
        with self._engine.connect() as connection:
            for pace_class, (model, version) in read_models(connection, needed).items():
                if pace_class not in self._models:
                    self._models[pace_class], self._versions[pace_class] = model, version

    def model(self, account: str, kind: str) -> PaceModel:
        """Return the model of a class that was prepared."""
        return self._models[account, kind]

    def observe(self, account: str, kind: str, job: PacedJob, *, ready: bool, planned: float) -> None:
        """Learn from an answer about a job of a prepared class. `planned` is the age at which the poll was planned."""
        self._models[account, kind].observe(job, ready, planned)
        self._changed.add((account, kind))
        if ready:
            self._models[account, ""].note(job)
            self._changed.add((account, ""))

    def share_if_due(self) -> None:
        """Share what was learned, unless it was shared less than `SHARE_SECONDS` ago."""
        if self._changed and time.monotonic() >= self._share_at:
            self.share()

    def share(self) -> None:
        """Add what was learned to the shared rows, and load what others added. Raises the errors of the database."""
        self._share_at = time.monotonic() + SHARE_SECONDS
        if not self._changed:
            return
        self._insert_missing_rows()
        with self._engine.begin() as connection:
            now = database_now(connection)
            for pace_class in sorted(self._changed):  # every process locks in this order
                state, version = locked_pace(connection, pace_class, now=now)
                if state and version != self._versions.get(pace_class):
                    shared = _restore_model(pace_class, state, self._models[pace_class[0], ""])
                    self._models[pace_class].merge_into(shared)
                    self._models[pace_class] = shared
                save_pace(connection, pace_class, json.dumps(self._models[pace_class].snapshot()), version + 1, now=now)
                self._versions[pace_class] = version + 1
        for pace_class in self._changed:  # after the commit: until then it still has to be shared
            self._models[pace_class].mark()
        self._changed.clear()

    def _insert_missing_rows(self) -> None:
        """Insert missing rows beforehand: on MariaDB, inserting and then locking a row could block other processes."""
        new = [pace_class for pace_class in sorted(self._changed) if not self._versions.get(pace_class)]
        if new:
            with self._engine.begin() as connection:
                for pace_class in new:
                    add_pace(connection, pace_class, now=database_now(connection))


def read_models(connection: Connection, classes: Iterable[Class]) -> dict[Class, tuple[PaceModel, int]]:
    """Return the models of these classes with their versions. An unknown class starts from its account's model."""
    ordered = sorted(set(classes))  # the account's own class sorts before its kinds
    saved = load_paces(connection, {*ordered, *((account, "") for account, _ in ordered)})
    accounts: dict[str, PaceModel] = {}
    models: dict[Class, tuple[PaceModel, int]] = {}
    for account, kind in ordered:
        if account not in accounts:
            state, _ = saved.get((account, ""), ("", 0))
            accounts[account] = _restore_model((account, ""), state, PaceModel())
        account_model = accounts[account]
        state, version = saved.get((account, kind), ("", 0))
        models[account, kind] = (
            account_model if kind == "" else _restore_model((account, kind), state, account_model),
            version,
        )
    return models


def _restore_model(pace_class: Class, state: str, account_model: PaceModel) -> PaceModel:
    if state:
        try:
            return PaceModel.restored(json.loads(state), account_model)
        except (ValueError, KeyError, TypeError, AttributeError):
            log.error("the pace model can't be read, learning starts again account=%s kind=%s", *pace_class)
    return PaceModel.after(account_model)
