"""What one process knows of how long jobs take: taught by each answer, shared with the others through the database.

Every process learns by itself, at once. Now and then what it learned since is added to the row that all share, and what
the others added is taken over. A lost update costs nothing but a little learning.
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
LOCK_PATIENCE = 0.5  # seconds that a row which somebody else has locked is waited for; it is shared later then
FRESH_SECONDS = 30.0  # a process that only reads looks again after it
CLASSES_MOST = 2_000  # kept in memory


class PaceLearner:
    """The models of one process. All of it is for one thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(**{RELAXED: True, LOCK_WAIT: LOCK_PATIENCE})
        self._models: dict[Class, PaceModel] = {}
        self._versions: dict[Class, int] = {}
        self._taught: set[Class] = set()
        self._share_at = time.monotonic() + SHARE_SECONDS

    def prepare(self, classes: Iterable[Class]) -> None:
        """Loads what is known of these classes, unless it is here already. Raises what the database raises."""
        missing = set(classes) - self._models.keys()
        if not missing:
            return
        if len(self._models) + len(missing) > CLASSES_MOST:
            self.share()
            self._models.clear()
        wanted = missing | {(account, "") for account, _ in missing}
        with self._engine.connect() as connection:
            for one, (model, version) in read_models(connection, wanted).items():
                if one not in self._models:
                    self._models[one], self._versions[one] = model, version

    def model(self, account: str, kind: str) -> PaceModel:
        """What is known of a class that was prepared."""
        return self._models[account, kind]

    def observe(self, account: str, kind: str, job: PacedJob, *, ready: bool, planned: float) -> None:
        """Learns from an answer about a job of a class that was prepared. `planned`: the age it was to be asked at."""
        self._models[account, kind].observe(job, ready, planned)
        self._taught.add((account, kind))
        if ready:
            self._models[account, ""].note(job)
            self._taught.add((account, ""))

    def share_if_due(self) -> None:
        """Shares what was learned, if it was a while ago that it last did."""
        if self._taught and time.monotonic() >= self._share_at:
            self.share()

    def share(self) -> None:
        """Adds what was learned to what all know, and takes that over. Raises what the database raises."""
        self._share_at = time.monotonic() + SHARE_SECONDS
        if not self._taught:
            return
        self._add_new()
        with self._engine.begin() as connection:
            now = database_now(connection)
            for one in sorted(self._taught):  # locked in this order everywhere
                state, version = locked_pace(connection, one, now=now)
                if state and version != self._versions.get(one):
                    theirs = _restored(one, state, self._models[one[0], ""])
                    self._models[one].merge_into(theirs)
                    self._models[one] = theirs
                save_pace(connection, one, json.dumps(self._models[one].snapshot()), version + 1, now=now)
                self._versions[one] = version + 1
        for one in self._taught:  # after the commit: else it would be taught again
            self._models[one].mark()
        self._taught.clear()

    def _add_new(self) -> None:
        """Makes missing rows beforehand: on MariaDB some that make one and then lock it could block each other."""
        new = [one for one in sorted(self._taught) if not self._versions.get(one)]
        if new:
            with self._engine.begin() as connection:
                for one in new:
                    add_pace(connection, one, now=database_now(connection))


def read_models(connection: Connection, classes: Iterable[Class]) -> dict[Class, tuple[PaceModel, int]]:
    """The models of these classes and their versions; of those that were never seen, what their account has."""
    wanted = sorted(set(classes))  # an account as a whole comes before its kinds
    saved = load_paces(connection, {*wanted, *((account, "") for account, _ in wanted)})
    accounts: dict[str, PaceModel] = {}
    found: dict[Class, tuple[PaceModel, int]] = {}
    for account, kind in wanted:
        if account not in accounts:
            state, _ = saved.get((account, ""), ("", 0))
            accounts[account] = _restored((account, ""), state, PaceModel())
        whole = accounts[account]
        state, version = saved.get((account, kind), ("", 0))
        found[account, kind] = (whole if kind == "" else _restored((account, kind), state, whole), version)
    return found


def _restored(one: Class, state: str, whole: PaceModel) -> PaceModel:
    if state:
        try:
            return PaceModel.restored(json.loads(state), whole)
        except (ValueError, KeyError, TypeError, AttributeError):
            log.error("what was learned of a class can't be read, it is learned anew account=%s kind=%s", *one)
    return PaceModel.after(whole)
