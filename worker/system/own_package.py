"""Whether Python finds our package by its name, or an app's own `worker.py`."""

import os
from collections.abc import Iterable
from importlib import invalidate_caches
from importlib.machinery import PathFinder
from pathlib import Path

OURS = Path(__file__).resolve().parents[1]


def other_worker(folders: Iterable[str | Path]) -> Path | None:
    """Return the file that Python takes for `worker` in these folders where it is not ours. Nothing is imported.

    A folder `worker` without `__init__.py` hides nothing, and another copy of our package is ours.
    """
    invalidate_caches()
    for folder in folders:
        found = PathFinder.find_spec("worker", [str(Path(folder).absolute())])
        if found is None or not found.origin:
            continue
        home = Path(found.origin).resolve().parent
        ours = home == OURS or ((home / "bootstrap.py").exists() and (home / "store" / "__init__.py").exists())
        return None if ours else Path(found.origin)
    return None


def python_path(value: str) -> list[str]:
    """The folders that come before installed packages where a program is started here: this one, and PYTHONPATH's."""
    return [str(Path.cwd()), *(item for item in value.split(os.pathsep) if item)]


def advice(path: Path) -> str:
    """What to do about another `worker`, in one line."""
    return (
        f"{path} has our package's name: Python may find it instead. Run fetch-worker in another directory, or"
        " in an environment of its own, and enqueue by task name"
    )
