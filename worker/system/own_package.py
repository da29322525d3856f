"""Checks whether Python finds our package under the name `worker`, or an app's own `worker.py`."""

import os
from collections.abc import Iterable
from importlib import invalidate_caches
from importlib.machinery import PathFinder
from pathlib import Path

OWN_PACKAGE = Path(__file__).resolve().parents[1]


def other_worker(folders: Iterable[str | Path]) -> Path | None:
    """Return the file that Python imports as `worker` from these folders if it is not ours. Nothing is imported.

    A folder `worker` without `__init__.py` does not count, and another copy of our package counts as ours.
    """
    invalidate_caches()
    for folder in folders:
        spec = PathFinder.find_spec("worker", [str(Path(folder).absolute())])
        if spec is None or not spec.origin:
            continue
        folder = Path(spec.origin).resolve().parent
        ours = folder == OWN_PACKAGE or (
            (folder / "bootstrap.py").exists() and (folder / "store" / "__init__.py").exists()
        )
        return None if ours else Path(spec.origin)
    return None


def python_path(value: str) -> list[str]:
    """Return the folders that Python searches before installed packages: the current one and those in PYTHONPATH."""
    return [str(Path.cwd()), *(item for item in value.split(os.pathsep) if item)]


def advice(path: Path) -> str:
    """Return one line of advice about another package named `worker`."""
    return (
        f"{path} has the same name as our package, and Python may import it instead. Run fetch-worker in another"
        " directory, or in its own virtual environment, and enqueue by task name"
    )
