"""Remove the files of outputs from every storage that they are in."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row

from worker.errors import SettingsError, StorageTrouble
from worker.settings import Settings
from worker.storage.base import Storage, job_id_of
from worker.storage.select import storage_of


class FileRemover:
    """Removes files of outputs. Each row has `id`, `job_id` and `location`. Not thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stores: dict[str, Storage] = {}

    def remove(self, rows: Sequence[Row[Any]]) -> dict[int, str]:
        """Remove files. Return the ids of the rows whose files stay, with the reasons.

        Raises StorageTrouble if it is not known which files were removed.
        """
        errors: dict[int, str] = {}
        by_scheme: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for row in rows:
            if job_id_of(row.location) == row.job_id:
                by_scheme[row.location.partition(":")[0]][row.location] = row.id
            else:
                errors[row.id] = f"{row.location[:200]} is not the name of a file of this job"
        for scheme, ids in by_scheme.items():
            failed = self._remove(scheme, list(ids))
            errors |= {ids[location]: reason for location, reason in failed.items()}
        return errors

    def _remove(self, scheme: str, locations: list[str]) -> dict[str, str]:
        try:
            if scheme not in self._stores:
                self._stores[scheme] = storage_of(locations[0], self._settings)
        except StorageTrouble as error:
            return dict.fromkeys(locations, str(error))
        try:
            return self._stores[scheme].remove(locations)
        except SettingsError as error:  # a missing library: no file was removed
            return dict.fromkeys(locations, str(error))
