"""The bootstrap: what it plans, when it installs, and that it survives being killed and being started twice."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from worker import bootstrap

SCRIPT = Path(bootstrap.__file__)

PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "fetch-worker"
version = "0"
"""

# Builds what an editable install wants, and adds a line to builds.txt for each time it is asked.
BACKEND = '''\
"""A build backend of the standard library alone."""
import zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    with open("builds.txt", "a") as builds:
        builds.write("built\\n")
    name = "fetch_worker-0-py3-none-any.whl"
    files = {
        "program.py": "import os, sys\\ndef main(): print(sys.argv[1:], os.getcwd(), os.environ.get('PYTHONPATH'))",
        "fetch_worker-0.dist-info/METADATA": "Metadata-Version: 2.1\\nName: fetch-worker\\nVersion: 0\\n",
        "fetch_worker-0.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        "fetch_worker-0.dist-info/entry_points.txt": "[console_scripts]\\nfetch-worker = program:main\\n",
    }
    record = "".join(f"{path},,\\n" for path in files)
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr("fetch_worker-0.dist-info/RECORD", record + "fetch_worker-0.dist-info/RECORD,,\\n")
    return name
'''


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with our bootstrap, empty locks and a project that needs nothing to be built."""
    root = tmp_path / "a check out"
    (root / "worker").mkdir(parents=True)
    shutil.copy(SCRIPT, root / "worker" / "bootstrap.py")
    (root / "worker" / "platform.py").write_text("raise SystemExit('stands before the standard library')\n")
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "requirements.lock").write_text("# nothing\n")
    (root / "requirements-dev.lock").write_text("# nothing\n")
    return root


class Steps:
    """Stands where venv and pip are run: notes which of them is asked for, and leaves what they would leave."""

    def __init__(self, place: bootstrap.Environment) -> None:
        self.place = place
        self.names: list[str] = []
        self.fails_at = ""

    def __call__(self, words: Sequence[str]) -> None:
        name = next(word for word in ("venv", "--require-hashes", "--editable") if word in words)
        self.names.append(name)
        if name == self.fails_at:
            raise bootstrap.BootstrapError("stopped")
        if name == "venv":
            self.place.python.parent.mkdir(parents=True, exist_ok=True)
            self.place.python.touch()

    def of_a_start(self) -> list[str]:
        """The steps that one more start takes."""
        self.names.clear()
        if not bootstrap.is_ready(self.place):
            bootstrap.fill(self.place, self)
        return list(self.names)


EVERYTHING = ["venv", "--require-hashes", "--editable"]


@pytest.fixture
def steps(checkout: Path) -> Steps:
    return Steps(bootstrap.plan_for(["demo"], checkout, cores=2).environment)


@pytest.mark.parametrize(
    ("words", "folder", "program"),
    [
        (["demo", "--fast"], ".venv", ("fetch-worker", "demo", "--fast")),
        (["up"], ".venv", ("fetch-worker", "up")),
        (["track", "test"], ".venv", ("fetch-worker", "track", "test")),
        (["test", "-k", "pace"], ".venv-test", ("pytest", "-k", "pace")),
    ],
)
def test_a_command_becomes_a_program_of_its_environment(
    words: list[str], folder: str, program: tuple[str, ...]
) -> None:
    plan = bootstrap.plan_for(words, Path("/checkout"), cores=2)

    assert plan.environment.folder == Path("/checkout") / folder
    assert plan.program == program
    assert plan.checks == ()


def test_test_alone_runs_every_check_and_pytest_last() -> None:
    plan = bootstrap.plan_for(["test"], Path("/checkout"), cores=2)

    assert [check[0] for check in plan.checks] == ["ruff", "ruff", "mypy", "lint-imports", "pytest"]
    assert plan.environment.lock.name == "requirements-dev.lock"


def test_check_runs_the_same_checks_without_pytest() -> None:
    everything = bootstrap.plan_for(["test"], Path("/checkout"), cores=1)

    assert bootstrap.plan_for(["check"], Path("/checkout"), cores=1).checks == everything.checks[:-1]


def test_all_checks_run_and_the_first_failure_gives_the_exit_code(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = bootstrap.plan_for(["check"], checkout, cores=1).environment
    (place.folder / "bin").mkdir(parents=True)
    (place.folder / "bin" / "sh").symlink_to("/bin/sh")

    checks = [("sh", "-c", f"exit {code}") for code in (0, 3, 4)]

    assert bootstrap.run_checks(checks, place, os.environ) == 3
    assert capfd.readouterr().out.splitlines()[-3:] == [
        "ok     sh -c exit 0",
        "FAILED sh -c exit 3",
        "FAILED sh -c exit 4",
    ]


def test_an_unchanged_checkout_installs_once(steps: Steps) -> None:
    assert steps.of_a_start() == EVERYTHING
    assert steps.of_a_start() == []


def test_a_changed_lock_makes_the_environment_anew(steps: Steps) -> None:
    steps.of_a_start()
    steps.place.lock.write_text("# something else\n")

    assert steps.of_a_start() == EVERYTHING
    assert steps.of_a_start() == []


def test_a_changed_pyproject_installs_the_project_alone(steps: Steps) -> None:
    steps.of_a_start()
    (steps.place.root / "pyproject.toml").write_text("# something else\n")

    assert steps.of_a_start() == ["--editable"]
    assert steps.of_a_start() == []


@pytest.mark.parametrize("step", EVERYTHING)
def test_an_installation_that_stopped_begins_again(steps: Steps, step: str) -> None:
    steps.fails_at = step
    with pytest.raises(bootstrap.BootstrapError):
        steps.of_a_start()
    steps.fails_at = ""

    assert steps.of_a_start() == EVERYTHING


def test_an_environment_whose_python_has_gone_is_made_anew(steps: Steps) -> None:
    steps.of_a_start()
    steps.place.python.unlink()

    assert steps.of_a_start() == EVERYTHING


def test_another_python_or_another_place_has_another_stamp(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = bootstrap.stamp_for(steps.place)
    moved = shutil.copytree(steps.place.root, tmp_path / "moved")
    there = bootstrap.stamp_for(bootstrap.plan_for(["demo"], moved, cores=1).environment)
    monkeypatch.setattr(sys.implementation, "cache_tag", "cpython-399")
    later = bootstrap.stamp_for(steps.place)

    assert len({here.libraries, there.libraries, later.libraries}) == 3


def test_the_program_sees_its_own_environment_and_no_other() -> None:
    surprises = {"PATH": "/usr/bin", "VIRTUAL_ENV": "/other", "PYTHONHOME": "/x", "PYTHONPATH": "/y", "LANG": "C"}

    environ = bootstrap.clean_environ(surprises | {"PIP_TARGET": "/z"}, Path("/checkout/.venv"))

    assert environ == {
        "PATH": f"/checkout/.venv/bin{os.pathsep}/usr/bin",
        "VIRTUAL_ENV": "/checkout/.venv",
        "LANG": "C",
        "PIP_USER": "0",
    }


def test_a_python_without_ensurepip_is_told_which_package_to_install(
    monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    monkeypatch.setattr(bootstrap, "find_spec", lambda name: None)

    with pytest.raises(bootstrap.BootstrapError, match="apt install python3-venv"):
        steps.of_a_start()


def test_a_failed_step_is_explained_in_one_line_after_its_own(checkout: Path) -> None:
    run = bootstrap.runner(os.environ, guard=sys.stderr.fileno())

    with pytest.raises(bootstrap.BootstrapError, match="package index") as raised:
        run([sys.executable, "-c", "raise SystemExit(1)"])
    assert "\n" not in str(raised.value)


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert bootstrap.main([]) == 2
    assert "bootstrap.py COMMAND" in capsys.readouterr().err


def start(checkout: Path, *words: str) -> subprocess.Popen[str]:
    """A bootstrap of the checkout as a process of its own, in the middle of somebody else's virtual environment."""
    environ = os.environ | {"PYTHONPATH": "/nowhere", "VIRTUAL_ENV": "/nowhere"}
    script = str(checkout / "worker" / "bootstrap.py")
    return subprocess.Popen(
        [sys.executable, script, *words],
        cwd=checkout.parent,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def wait_until(happened: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def is_busy(guard: Path) -> bool:
    """Whether somebody holds the guard that keeps others out."""
    if not guard.exists():
        return False
    with guard.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_step_that_outlives_its_bootstrap_still_keeps_others_out(steps: Steps, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "end")
    with bootstrap.alone(steps.place) as guard:
        bootstrap.runner(os.environ, guard)(["sh", "-c", 'read line < "$0" &', str(tmp_path / "end")])

    assert is_busy(Path(f"{steps.place.folder}.busy"))
    (tmp_path / "end").write_text("\n")
    wait_until(lambda: not is_busy(Path(f"{steps.place.folder}.busy")), seconds=10)


def test_real_installations_survive_a_kill_and_wait_for_each_other(checkout: Path) -> None:
    """The first is killed while it installs, two more start at once, a fourth finds nothing to do, a fifth a change."""
    python, builds = checkout / ".venv" / "bin" / "python", checkout / "builds.txt"
    killed = start(checkout, "demo")
    wait_until(python.exists, seconds=30)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=30)
    assert not builds.exists()

    both = [start(checkout, "demo", "--seed", "7") for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert {out for out, _ in answers} == {f"['demo', '--seed', '7'] {checkout.parent} None\n"}
    assert builds.read_text() == "built\n"
    assert sum("Waiting for another process" in err for _, err in answers) >= 1
    assert not is_busy(checkout / ".venv.busy")

    began = time.monotonic()
    again = start(checkout, "show")
    out, err = again.communicate(timeout=30)
    assert (out.split(" ")[0], err, again.returncode) == ("['show']", "", 0)
    assert time.monotonic() - began < 1
    assert builds.read_text() == "built\n"

    (checkout / "pyproject.toml").write_text(PYPROJECT + 'description = "changed"\n')
    changed = start(checkout, "show")
    out, err = changed.communicate(timeout=30)
    assert (out.split(" ")[0], changed.returncode) == ("['show']", 0), err
    assert builds.read_text() == "built\nbuilt\n"


def test_in_ci_the_programs_that_tests_need_are_installed_where_that_can_be_done() -> None:
    """As root, by apt-get; on a desk nothing is installed that nobody asked for."""
    there, here = {"apt-get"}, {"apt-get", *bootstrap.TEST_PACKAGES}

    def commands(found: set[str], user: int = 0, **environ: str) -> list[str]:
        which = {name: f"/usr/bin/{name}" for name in found}.get
        return [" ".join(words) for words in bootstrap.commands_for_tests(environ, user, which)]

    assert commands(there, CI="true") == [
        "apt-get update",
        "apt-get install -y --no-install-recommends chromium chromium-driver systemd",
    ]
    assert commands(here - {"systemd-analyze"}, CI="true")[1].endswith(" --no-install-recommends systemd")
    for nothing in (
        commands(there),
        commands(there, user=7, CI="true"),
        commands(here, CI="true"),
        commands(set(), CI="1"),
    ):
        assert nothing == []
