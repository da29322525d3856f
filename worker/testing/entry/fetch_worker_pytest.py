"""What pytest loads: the plugin, unless Python finds another `worker` than ours, such as the web app's `worker.py`.

It has a name of its own beside the package, since nothing below `worker` can be imported there.
"""

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path

import pytest


def _other_worker() -> str | None:
    """Where the other `worker` is that Python finds, without importing it; None where it is ours."""
    loaded = getattr(sys.modules.get("worker"), "__file__", None)
    found = None if loaded else importlib.util.find_spec("worker")
    origin = loaded or (found.origin if found else None)
    ours = origin is not None and (Path(origin).parent / "testing" / "plugin.py").is_file()
    return None if ours else origin or "a folder"


_OTHER = _other_worker()

if _OTHER is None:
    from worker.testing.plugin import fetch_api as fetch_api
    from worker.testing.plugin import fetch_database as fetch_database
    from worker.testing.plugin import fetch_kit as fetch_kit
    from worker.testing.plugin import fetch_tables as fetch_tables
    from worker.testing.plugin import fetch_worker as fetch_worker
else:

    def pytest_configure(config: pytest.Config) -> None:
        """Warn, in a way that stops no run, also where warnings are errors."""
        said = f"{_OTHER} has the name of fetch-worker's package: its fixtures are not available in these tests"
        with suppress(pytest.PytestWarning):
            config.issue_config_time_warning(pytest.PytestConfigWarning(f"fetch-worker: {said}"), stacklevel=2)
