"""pytest entry point: loads the plugin, unless Python finds another package named `worker`, such as the app's own.

This module is outside the package because nothing below `worker` can be imported in that case.
"""

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path

import pytest


def _other_worker() -> str | None:
    """Return the path of the other `worker` without importing it, or None if Python finds ours."""
    loaded = getattr(sys.modules.get("worker"), "__file__", None)
    spec = None if loaded else importlib.util.find_spec("worker")
    origin = loaded or (spec.origin if spec else None)
    ours = origin is not None and (Path(origin).parent / "testing" / "plugin.py").is_file()
    return None if ours else origin or "a folder"


_OTHER_PACKAGE = _other_worker()

if _OTHER_PACKAGE is None:
    from worker.testing.plugin import fetch_api as fetch_api
    from worker.testing.plugin import fetch_database as fetch_database
    from worker.testing.plugin import fetch_kit as fetch_kit
    from worker.testing.plugin import fetch_tables as fetch_tables
    from worker.testing.plugin import fetch_worker as fetch_worker
else:

    def pytest_configure(config: pytest.Config) -> None:
        """Warn without stopping the test run, also if warnings are errors."""
        reason = f"{_OTHER_PACKAGE} has the same name as fetch-worker's package, whose fixtures are not available here"
        with suppress(pytest.PytestWarning):
            config.issue_config_time_warning(pytest.PytestConfigWarning(f"fetch-worker: {reason}"), stacklevel=2)
