"""The README is true: its examples run, its tables name every setting and state, its two lines stand first."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from tests.servers import celery_worker
from worker.cli.commands import group
from worker.core.lifecycle import JOB_STATES
from worker.settings import Settings
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.testing import FetchApi, FetchWorker

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Migrated tables that DATABASE_URL names."""
    url = f"sqlite:///{tmp_path}/readme.db"
    engine = make_engine(make_url(url))
    migrate(engine)
    engine.dispose()
    monkeypatch.setenv("DATABASE_URL", url)
    return url


def test_the_first_two_commands_are_the_demo_and_the_tests() -> None:
    assert [block.strip() for block in SHELL[:2]] == [
        "python3 worker/bootstrap.py demo",
        "python3 worker/bootstrap.py test",
    ]


def test_ci_runs_the_readmes_test_line() -> None:
    assert SHELL[1].strip() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_python_example_runs_as_it_stands(database: str, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(PYTHON[0], encoding="utf-8")

    done = subprocess.run([sys.executable, script], env=dict(os.environ), capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_the_fastapi_example_takes_a_prompt_to_a_picture(fetch_api: FetchApi, fetch_worker: FetchWorker) -> None:
    names = _example("FastAPI")
    job_id = names["submit"]("a lake at dawn")["id"]
    assert names["picture"](job_id)["phase"] == "waiting"

    fetch_worker.run(job_id)

    shown = names["picture"](job_id)
    assert (shown["phase"], shown["fraction"], len(shown["stored"])) == ("final", 1.0, 1)
    assert names["output"](shown["stored"][0]).body.startswith(b"\x89PNG")


def _example(word: str, **names: Any) -> dict[str, Any]:
    """The first Python example that has this word, executed."""
    exec(next(block for block in PYTHON if word in block), names)  # noqa: S102  # the README's own example
    return names


def test_the_celery_example_runs_as_it_stands(
    database: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    with celery_worker(tmp_path, "--queues", "fetch-worker"):
        names = _example("Celery(", REDIS_URL=redis_url)

    assert isinstance(names["job_id"], int)


def test_the_tests_of_an_integration_run_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "test_app.py").write_text(next(block for block in PYTHON if "fetch_worker.told" in block))
    words = ["-p", "worker.testing.plugin", "-p", "no:cacheprovider", "-q", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_settings_table_names_every_setting_and_its_default() -> None:
    for name, field in Settings.model_fields.items():
        assert f"`{name.upper()}`" in README, f"{name.upper()} is not in the README"
        if isinstance(field.default, float):
            assert f"`{field.default:g}`" in README


def test_every_command_and_every_state_is_named() -> None:
    for command in group.commands:
        assert re.search(rf"\b{command}\b", README), f"the command {command} is not in the README"
    for state in JOB_STATES:
        assert f"| `{state}` |" in README
