"""The pytest plugin as an app uses it: pytest in its own process and folder, with the plugin and nothing else."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.every_python

ROOT = Path(__file__).parents[2]
ENTRY = ROOT / "worker" / "testing" / "entry"
EXAMPLE = ROOT / "tests" / "example"
TESTS = 10

# Records every connection that the process makes, and whether the environment changed between first and last test.
WITNESS = """
import os, pathlib, sys
import pytest

HERE = pathlib.Path(__file__).parent
BEFORE = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}

def note(event, arguments):
    if event == "socket.connect":
        with open(HERE / "connections", "a") as file:
            file.write(f"{arguments[1]}\\n")

sys.addaudithook(note)

def pytest_sessionfinish():
    after = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    if after != {name: value for name, value in BEFORE.items() if not name.startswith("PYTEST_")}:
        (HERE / "changed").write_text("the environment")
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The example app, copied out of the repository with its tests, as a user would do."""
    folder = tmp_path / "app"
    folder.mkdir()
    shutil.copy(EXAMPLE / "shop.py", folder / "shop.py")
    shutil.copy(EXAMPLE / "shop_tests.py", folder / "test_shop.py")
    (folder / "conftest.py").write_text(WITNESS)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    return folder


def run(folder: Path, *arguments: str, autoload: bool = False, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run pytest in a folder, either with our plugin only or with the plugins of entry points."""
    plugin = () if autoload else ("-p", "worker.testing.plugin")
    environment = os.environ | {
        "DATABASE_URL": "postgresql://nobody@db.example/production",
        "PYTHONPATH": os.pathsep.join(filter(None, (path, str(ROOT)))),
    }
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    if not autoload:
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", "-q", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_example_apps_tests_pass_use_only_loopback_and_leave_no_files(app: Path) -> None:
    result = run(app)

    assert f"{TESTS} passed" in result.stdout, result.stdout + result.stderr
    connections = (app / "connections").read_text().splitlines()
    assert connections
    assert [address for address in connections if not address.startswith("('127.0.0.1', ")] == []
    assert not (app / "changed").exists()
    assert sorted(path.name for path in app.iterdir() if path.name != "__pycache__") == [
        "conftest.py",
        "connections",
        "pytest.ini",
        "shop.py",
        "test_shop.py",
    ]


def test_the_example_apps_tests_pass_in_parallel_processes(app: Path) -> None:
    result = run(app, "-p", "xdist", "-n", "2")

    assert f"{TESTS} passed" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["worker.py", "worker/__init__.py"])
def test_given_an_app_with_its_own_worker_when_its_tests_run_then_the_plugin_is_not_loaded(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("raise SystemExit('it must not be imported')\n")
    (tmp_path / "test_app.py").write_text("def test_it():\n    pass\n")
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ENTRY)}
    for strict in ((), ("-W", "error")):
        command = [sys.executable, "-m", "pytest", "-p", "fetch_worker_pytest", *strict, "test_app.py"]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

        assert result.returncode == 0, result.stdout + result.stderr
        assert "1 passed" in result.stdout
        assert strict or "has the same name as fetch-worker's package" in result.stdout


def test_pytest_finds_the_plugin_by_its_entry_point(app: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = app.parent / "site" / f"fetch_worker-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fetch-worker\nVersion: {project['version']}\n")
    entries = "".join(f"{name} = {value}\n" for name, value in project["entry-points"]["pytest11"].items())
    (metadata / "entry_points.txt").write_text(f"[pytest11]\n{entries}")

    result = run(app, autoload=True, path=os.pathsep.join((str(metadata.parent), str(ENTRY))))

    assert f"{TESTS} passed" in result.stdout, result.stdout + result.stderr


def test_a_fixture_can_provide_the_apps_own_database(app: Path) -> None:
    (app / "test_shop.py").write_text(
        """
import pytest, worker
from sqlalchemy import StaticPool, create_engine
from worker.testing import migrate

@pytest.fixture
def fetch_database():
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    migrate(engine)
    yield engine
    engine.dispose()

def test_in_memory(fetch_worker, fetch_database, tmp_path):
    assert fetch_worker.run(worker.track("1")).status == "completed"
    assert fetch_worker.engine is fetch_database
    assert not list(tmp_path.rglob("*.db"))
"""
    )

    result = run(app)

    assert "1 passed" in result.stdout, result.stdout + result.stderr


def test_a_database_without_tables_gives_one_line_of_advice(app: Path) -> None:
    (app / "test_shop.py").write_text(
        """
import pytest

@pytest.fixture
def fetch_database(tmp_path):
    return f"sqlite:///{tmp_path}/empty.db"

def test_empty(fetch_worker):
    pass
"""
    )

    result = run(app, "--tb=line")

    assert "1 error" in result.stdout
    assert "run `fetch-worker migrate`, or call `worker.testing.migrate(engine)` in a fixture" in result.stdout


def output_of(program: str) -> str:
    """Return the output of a program in its own process."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT), "POLL_MINN": "an unknown setting"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout.strip()


def test_a_session_without_our_fixtures_imports_nothing_and_reads_no_settings() -> None:
    program = """
import sys, pytest
before = set(sys.modules)
import worker.testing.plugin
print(sorted(set(sys.modules) - before))
"""

    assert output_of(program) == "['worker', 'worker.testing', 'worker.testing.plugin']"


def test_the_kit_works_without_pytest() -> None:
    program = """
import sys
sys.modules["pytest"] = None
import os, pathlib, tempfile
del os.environ["POLL_MINN"]
import worker
from worker.testing import kit
with tempfile.TemporaryDirectory() as folder, kit(pathlib.Path(folder)) as made:
    print(made.worker.run(worker.track("1")).status)
"""

    assert output_of(program) == "completed"
