"""The bootstrap: what it plans, when it installs, and that it survives being killed and being started twice."""

import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.waiting import wait_until
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
            (self.place.folder / "pyvenv.cfg").write_text(f"version = {platform.python_version()}\n")

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


def test_test_alone_plans_every_check_and_all_tests() -> None:
    plan = bootstrap.plan_for(["test"], Path("/checkout"), cores=2)

    assert [check[0] for check in plan.checks] == ["ruff", "ruff", "mypy", "lint-imports"]
    assert plan.pytest == ("pytest", "-n", "2")
    assert plan.environment.lock.name == "requirements-dev.lock"


def test_check_plans_the_same_checks_without_tests() -> None:
    plan = bootstrap.plan_for(["check"], Path("/checkout"), cores=1)

    assert plan.checks == bootstrap.plan_for(["test"], Path("/checkout"), cores=1).checks
    assert plan.pytest == plan.pytest_elsewhere == ()


def environment_with_a_shell(place: bootstrap.Environment) -> bootstrap.Environment:
    """Return the environment, up to date as far as the bootstrap can tell, with the program `sh` in it."""
    (place.folder / "bin").mkdir(parents=True)
    (place.folder / "bin" / "sh").symlink_to("/bin/sh")
    place.python.touch()
    (place.folder / "pyvenv.cfg").write_text(f"version = {place.interpreter.release}\n")
    place.stamp.write_text("\n".join(bootstrap.stamp_for(place)))
    return place


def test_all_checks_run_and_the_first_failure_gives_the_exit_code(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = environment_with_a_shell(bootstrap.plan_for(["check"], checkout, cores=1).environment)
    plan = bootstrap.Plan(place, checks=tuple(("sh", "-c", f"exit {code}") for code in (0, 3, 4)))

    assert bootstrap.execute(plan) == 3
    assert capfd.readouterr().out.splitlines()[-3:] == [
        "ok     sh -c exit 0",
        "FAILED sh -c exit 3",
        "FAILED sh -c exit 4",
    ]


OTHER = "3.12" if sys.version_info[:2] != (3, 12) else "3.13"  # a supported Python that does not run this test


def plan_with_another_python(checkout: Path, monkeypatch: pytest.MonkeyPatch, *, elsewhere: str) -> bootstrap.Plan:
    """Plan one test for this Python, which passes, and `elsewhere` for the only other one of the machine."""
    place = environment_with_a_shell(bootstrap.plan_for(["test"], checkout, cores=1).environment)
    monkeypatch.setattr(bootstrap, "find_pythons", lambda environ: {OTHER: "/usr/bin/pretended"})
    return bootstrap.Plan(place, pytest=("sh", "-c", "exit 0"), pytest_elsewhere=("sh", "-c", elsewhere))


def test_the_summary_names_the_pythons_that_were_tested_and_those_that_were_not_found(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_with_another_python(checkout, monkeypatch, elsewhere="exit 0")
    environment_with_a_shell(bootstrap.other_environments(plan.environment, {OTHER: "/usr/bin/pretended"})[OTHER])

    assert bootstrap.execute(plan) == 0
    absent = set(bootstrap.SUPPORTED_PYTHONS) - {OTHER, "{}.{}".format(*sys.version_info)}
    assert capfd.readouterr().out.splitlines()[-4:] == [
        "ok     sh -c exit 0",
        f"ok     Python {OTHER}: sh -c exit 0",
        f"tested on Python {platform.python_version()} (all tests), {OTHER} (the tests marked every_python)",
        f"NOT tested on Python {', '.join(sorted(absent))}: not found on this machine",
    ]


def test_a_failure_on_another_python_fails_the_line(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_with_another_python(checkout, monkeypatch, elsewhere="exit 5")
    environment_with_a_shell(bootstrap.other_environments(plan.environment, {OTHER: "/usr/bin/pretended"})[OTHER])

    assert bootstrap.execute(plan) == 5


def test_an_environment_of_another_python_that_cannot_be_filled_fails_the_line(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_with_another_python(checkout, monkeypatch, elsewhere="exit 0")

    assert bootstrap.execute(plan) == 1
    assert f"FAILED installation into .venv-test-{OTHER}" in capfd.readouterr().out


def test_pythons_are_found_on_the_path_in_pyenv_and_in_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the right name that is no such Python, like a shim of pyenv, is passed over."""
    uv = tmp_path / "home" / ".local" / "share" / "uv" / "python"
    places = {
        "3.11": tmp_path / "bin" / "python3.11",
        "3.12": tmp_path / "home" / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3.12",
        "3.13": uv / "cpython-3.13.1-linux-x86_64-gnu" / "bin" / "python3.13",
    }
    shim = tmp_path / "bin" / "python3.13"
    for path in (*places.values(), shim):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\nexit {int(path == shim)}\n")
        path.chmod(0o755)

    found = bootstrap.find_pythons({"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home")})

    assert found == {release: str(path) for release, path in places.items()}


def test_this_python_is_usable_as_its_own_release_alone() -> None:
    release = "{}.{}".format(*sys.version_info)

    assert bootstrap.is_usable(sys.executable, release)
    assert not bootstrap.is_usable(sys.executable, OTHER)
    assert not bootstrap.is_usable("/nowhere/python", release)


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


def test_an_environment_of_another_python_is_made_anew(steps: Steps) -> None:
    steps.of_a_start()
    (steps.place.folder / "pyvenv.cfg").write_text("version = 3.11.0\n")

    assert steps.of_a_start() == EVERYTHING


def test_another_python_or_another_place_has_another_stamp(steps: Steps, tmp_path: Path) -> None:
    here = bootstrap.stamp_for(steps.place)
    moved = shutil.copytree(steps.place.root, tmp_path / "moved")
    there = bootstrap.stamp_for(bootstrap.plan_for(["demo"], moved, cores=1).environment)
    other = bootstrap.stamp_for(steps.place._replace(interpreter=bootstrap.Interpreter("/usr/bin/python", "3.99.0")))

    assert len({here.libraries, there.libraries, other.libraries}) == 3


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
    run = bootstrap.runner(os.environ, lock_fd=sys.stderr.fileno())

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
    with bootstrap.install_lock(steps.place) as guard:
        bootstrap.runner(os.environ, guard)(["sh", "-c", 'read line < "$0" &', str(tmp_path / "end")])

    assert is_busy(Path(f"{steps.place.folder}.busy"))
    (tmp_path / "end").write_text("\n")
    wait_until(lambda: not is_busy(Path(f"{steps.place.folder}.busy")), "the step has ended")


def test_real_installations_survive_a_kill_and_wait_for_each_other(checkout: Path) -> None:
    """The first is killed while it installs, two more start at once, a fourth finds nothing to do, a fifth a change."""
    python, builds = checkout / ".venv" / "bin" / "python", checkout / "builds.txt"
    killed = start(checkout, "demo")
    wait_until(python.exists, "the first one has made a virtual environment")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    assert not builds.exists()

    both = [start(checkout, "demo", "--seed", "7") for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert {out for out, _ in answers} == {f"['demo', '--seed', '7'] {checkout.parent} None\n"}
    assert builds.read_text() == "built\n"
    assert sum("Waiting for another process" in err for _, err in answers) >= 1
    assert not is_busy(checkout / ".venv.busy")

    again = start(checkout, "show")
    out, err = again.communicate(timeout=60)
    assert (out.split(" ")[0], err, again.returncode) == ("['show']", "", 0)
    assert builds.read_text() == "built\n"

    (checkout / "pyproject.toml").write_text(PYPROJECT + 'description = "changed"\n')
    changed = start(checkout, "show")
    out, err = changed.communicate(timeout=60)
    assert (out.split(" ")[0], changed.returncode) == ("['show']", 0), err
    assert builds.read_text() == "built\nbuilt\n"
