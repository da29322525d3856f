"""An app's own `worker.py`: no command starts it under our names."""

import subprocess
import sys
from pathlib import Path

import pytest

from worker.system.own_package import other_worker

FETCH_WORKER = str(Path(sys.executable).parent / "fetch-worker")


@pytest.mark.parametrize(
    ("name", "hides"),
    [("worker.py", True), ("worker/__init__.py", True), ("worker/tasks.py", False), ("workers.py", False)],
)
def test_only_what_python_would_import_hides_our_package(name: str, hides: bool, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()

    assert other_worker([tmp_path]) == (tmp_path / name if hides else None)
    assert other_worker([Path(__file__).parents[2], tmp_path]) is None


@pytest.mark.parametrize("words", [["up"], ["migrate"], ["track", "1"], ["list"], ["status"], ["prune", "--dry-run"]])
def test_commands_refuse_beside_an_app_s_own_worker(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("from celery import Celery\napp = Celery('theirs')\n")

    done = subprocess.run([FETCH_WORKER, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert f"{tmp_path / 'worker.py'} has our package's name" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["worker.py"]


def test_up_looks_where_its_children_will(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "worker.py").touch()
    (tmp_path / ".env").write_text("PYTHONPATH=src\n")

    done = subprocess.run([FETCH_WORKER, "up"], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert "src/worker.py has our package's name" in done.stderr
