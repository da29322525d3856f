"""Commands refuse to run next to an app's own `worker.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

from worker.system.own_package import other_worker

FETCH_WORKER = str(Path(sys.executable).parent / "fetch-worker")


@pytest.mark.parametrize(
    ("name", "hides_ours"),
    [("worker.py", True), ("worker/__init__.py", True), ("worker/tasks.py", False), ("workers.py", False)],
)
def test_only_an_importable_package_or_module_hides_ours(name: str, hides_ours: bool, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()

    assert other_worker([tmp_path]) == (tmp_path / name if hides_ours else None)
    assert other_worker([Path(__file__).parents[2], tmp_path]) is None


@pytest.mark.parametrize(
    "arguments", [["up"], ["migrate"], ["track", "1"], ["list"], ["status"], ["prune", "--dry-run"]]
)
def test_commands_refuse_to_run_beside_an_apps_own_worker(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("from celery import Celery\napp = Celery('theirs')\n")

    result = subprocess.run([FETCH_WORKER, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert result.returncode == 2
    assert f"{tmp_path / 'worker.py'} has the same name as our package" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["worker.py"]


def test_up_also_checks_the_python_path_of_its_children(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "worker.py").touch()
    (tmp_path / ".env").write_text("PYTHONPATH=src\n")

    result = subprocess.run([FETCH_WORKER, "up"], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert result.returncode == 2
    assert "src/worker.py has the same name as our package" in result.stderr
