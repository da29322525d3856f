"""The bootstrap: its plans, when it installs, and that it survives being killed and being started twice."""

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

# Builds an editable install, and adds a line to builds.txt for each build.
BACKEND = '''\
"""A build backend that only needs the standard library."""
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
    """A checkout with our bootstrap, empty lock files and a project without dependencies."""
    root = tmp_path / "a check out"
    (root / "worker").mkdir(parents=True)
    shutil.copy(SCRIPT, root / "worker" / "bootstrap.py")
    (root / "worker" / "platform.py").write_text("raise SystemExit('shadows the standard library')\n")
    (root / "backend.py").write_text(BACKEND)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "requirements.lock").write_text("# nothing\n")
    (root / "requirements-dev.lock").write_text("# nothing\n")
    return root


class Steps:
    """Replaces venv and pip: records which of them is run, and creates the files that they would create."""

    def __init__(self, environment: bootstrap.Environment) -> None:
        self.environment = environment
        self.names: list[str] = []
        self.fails_at = ""

    def __call__(self, command: Sequence[str]) -> None:
        name = next(option for option in ("venv", "--require-hashes", "--editable") if option in command)
        self.names.append(name)
        if name == self.fails_at:
            raise bootstrap.BootstrapError("stopped")
        if name == "venv":
            self.environment.python.parent.mkdir(parents=True, exist_ok=True)
            self.environment.python.touch()
            (self.environment.folder / "pyvenv.cfg").write_text(f"version = {platform.python_version()}\n")

    def run_once(self) -> list[str]:
        """Return the steps of one more start."""
        self.names.clear()
        if not bootstrap.is_ready(self.environment):
            bootstrap.fill(self.environment, self)
        return list(self.names)


EVERYTHING = ["venv", "--require-hashes", "--editable"]


@pytest.fixture
def steps(checkout: Path) -> Steps:
    return Steps(bootstrap.plan_for(["demo"], checkout, cores=2).environment)


@pytest.mark.parametrize(
    ("arguments", "folder", "program"),
    [
        (["demo", "--fast"], ".venv", ("fetch-worker", "demo", "--fast")),
        (["up"], ".venv", ("fetch-worker", "up")),
        (["track", "test"], ".venv", ("fetch-worker", "track", "test")),
        (["test", "-k", "pace"], ".venv-test", ("pytest", "-k", "pace")),
    ],
)
def test_a_command_becomes_a_program_of_its_environment(
    arguments: list[str], folder: str, program: tuple[str, ...]
) -> None:
    plan = bootstrap.plan_for(arguments, Path("/checkout"), cores=2)

    assert plan.environment.folder == Path("/checkout") / folder
    assert plan.program == program
    assert plan.checks == ()


def test_the_test_command_plans_every_check_and_all_tests() -> None:
    plan = bootstrap.plan_for(["test"], Path("/checkout"), cores=2)

    assert [check[0] for check in plan.checks] == ["ruff", "ruff", "mypy", "lint-imports"]
    assert plan.pytest == ("pytest", "-n", "2", "--dist", "worksteal")
    assert plan.environment.lock.name == "requirements-dev.lock"


def test_check_plans_the_same_checks_without_tests() -> None:
    plan = bootstrap.plan_for(["check"], Path("/checkout"), cores=1)

    assert plan.checks == bootstrap.plan_for(["test"], Path("/checkout"), cores=1).checks
    assert plan.pytest == plan.pytest_elsewhere == ()


def environment_with_a_shell(environment: bootstrap.Environment) -> bootstrap.Environment:
    """Return the environment with an up-to-date stamp and the program `sh`."""
    (environment.folder / "bin").mkdir(parents=True)
    (environment.folder / "bin" / "sh").symlink_to("/bin/sh")
    environment.python.touch()
    (environment.folder / "pyvenv.cfg").write_text(f"version = {environment.interpreter.release}\n")
    environment.stamp.write_text("\n".join(bootstrap.stamp_for(environment)))
    return environment


def test_all_checks_run_and_the_first_failure_gives_the_exit_code(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = environment_with_a_shell(bootstrap.plan_for(["check"], checkout, cores=1).environment)
    plan = bootstrap.Plan(environment, checks=tuple(("sh", "-c", f"exit {code}") for code in (0, 3, 4)))

    assert bootstrap.execute(plan) == 3
    assert capfd.readouterr().out.splitlines()[-3:] == [
        "ok     sh -c exit 0",
        "FAILED sh -c exit 3",
        "FAILED sh -c exit 4",
    ]


OTHER = "3.12" if sys.version_info[:2] != (3, 12) else "3.13"  # a supported Python other than this one


def plan_with_another_python(checkout: Path, monkeypatch: pytest.MonkeyPatch, *, elsewhere: str) -> bootstrap.Plan:
    """Return a plan with a test that passes on this Python, and `elsewhere` on the only other Python found."""
    environment = environment_with_a_shell(bootstrap.plan_for(["test"], checkout, cores=1).environment)
    monkeypatch.setattr(bootstrap, "find_pythons", lambda environ: {OTHER: "/usr/bin/pretended"})
    return bootstrap.Plan(environment, pytest=("sh", "-c", "exit 0"), pytest_elsewhere=("sh", "-c", elsewhere))


def test_the_summary_lists_the_tested_pythons_and_the_missing_ones(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_with_another_python(checkout, monkeypatch, elsewhere="exit 0")
    environment_with_a_shell(bootstrap.other_environments(plan.environment, {OTHER: "/usr/bin/pretended"})[OTHER])

    assert bootstrap.execute(plan) == 0
    missing = set(bootstrap.SUPPORTED_PYTHONS) - {OTHER, "{}.{}".format(*sys.version_info)}
    assert capfd.readouterr().out.splitlines()[-4:] == [
        "ok     sh -c exit 0",
        f"ok     Python {OTHER}: sh -c exit 0",
        f"tested on Python {platform.python_version()} (all tests), {OTHER} (the tests marked every_python)",
        f"NOT tested on Python {', '.join(sorted(missing))}: not found on this machine",
    ]


def test_a_failure_on_another_python_fails_the_run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_with_another_python(checkout, monkeypatch, elsewhere="exit 5")
    environment_with_a_shell(bootstrap.other_environments(plan.environment, {OTHER: "/usr/bin/pretended"})[OTHER])

    assert bootstrap.execute(plan) == 5


def test_a_failed_installation_for_another_python_fails_the_run(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_with_another_python(checkout, monkeypatch, elsewhere="exit 0")

    assert bootstrap.execute(plan) == 1
    assert f"FAILED installation into .venv-test-{OTHER}" in capfd.readouterr().out


def test_pythons_are_found_on_the_path_in_pyenv_and_in_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs with the right name that do not run, like a shim of pyenv, are skipped."""
    uv = tmp_path / "home" / ".local" / "share" / "uv" / "python"
    pythons = {
        "3.11": tmp_path / "bin" / "python3.11",
        "3.12": tmp_path / "home" / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3.12",
        "3.13": uv / "cpython-3.13.1-linux-x86_64-gnu" / "bin" / "python3.13",
    }
    shim = tmp_path / "bin" / "python3.13"
    for path in (*pythons.values(), shim):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\nexit {int(path == shim)}\n")
        path.chmod(0o755)

    result = bootstrap.find_pythons({"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home")})

    assert result == {release: str(path) for release, path in pythons.items()}


def test_this_python_is_only_usable_as_its_own_release() -> None:
    release = "{}.{}".format(*sys.version_info)

    assert bootstrap.is_usable(sys.executable, release)
    assert not bootstrap.is_usable(sys.executable, OTHER)
    assert not bootstrap.is_usable("/nowhere/python", release)


def test_an_unchanged_checkout_installs_once(steps: Steps) -> None:
    assert steps.run_once() == EVERYTHING
    assert steps.run_once() == []


def test_a_changed_lock_recreates_the_environment(steps: Steps) -> None:
    steps.run_once()
    steps.environment.lock.write_text("# something else\n")

    assert steps.run_once() == EVERYTHING
    assert steps.run_once() == []


def test_a_changed_pyproject_only_reinstalls_the_project(steps: Steps) -> None:
    steps.run_once()
    (steps.environment.root / "pyproject.toml").write_text("# something else\n")

    assert steps.run_once() == ["--editable"]
    assert steps.run_once() == []


@pytest.mark.parametrize("step", EVERYTHING)
def test_an_interrupted_installation_starts_again(steps: Steps, step: str) -> None:
    steps.fails_at = step
    with pytest.raises(bootstrap.BootstrapError):
        steps.run_once()
    steps.fails_at = ""

    assert steps.run_once() == EVERYTHING


def test_an_environment_whose_python_is_missing_is_recreated(steps: Steps) -> None:
    steps.run_once()
    steps.environment.python.unlink()

    assert steps.run_once() == EVERYTHING


def test_an_environment_of_another_python_is_recreated(steps: Steps) -> None:
    steps.run_once()
    (steps.environment.folder / "pyvenv.cfg").write_text("version = 3.11.0\n")

    assert steps.run_once() == EVERYTHING


def test_another_python_or_another_directory_has_another_stamp(steps: Steps, tmp_path: Path) -> None:
    this_stamp = bootstrap.stamp_for(steps.environment)
    moved = shutil.copytree(steps.environment.root, tmp_path / "moved")
    moved_stamp = bootstrap.stamp_for(bootstrap.plan_for(["demo"], moved, cores=1).environment)
    other_python_stamp = bootstrap.stamp_for(
        steps.environment._replace(interpreter=bootstrap.Interpreter("/usr/bin/python", "3.99.0"))
    )

    assert len({this_stamp.libraries, moved_stamp.libraries, other_python_stamp.libraries}) == 3


def test_the_program_only_sees_its_own_environment() -> None:
    variables = {"PATH": "/usr/bin", "VIRTUAL_ENV": "/other", "PYTHONHOME": "/x", "PYTHONPATH": "/y", "LANG": "C"}

    environ = bootstrap.clean_environ(variables | {"PIP_TARGET": "/z"}, Path("/checkout/.venv"))

    assert environ == {
        "PATH": f"/checkout/.venv/bin{os.pathsep}/usr/bin",
        "VIRTUAL_ENV": "/checkout/.venv",
        "LANG": "C",
        "PIP_USER": "0",
    }


def test_a_python_without_ensurepip_gives_advice_which_package_to_install(
    monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    monkeypatch.setattr(bootstrap, "find_spec", lambda name: None)

    with pytest.raises(bootstrap.BootstrapError, match="apt install python3-venv"):
        steps.run_once()


def test_a_failed_step_is_explained_in_one_line_after_its_own_output(checkout: Path) -> None:
    run = bootstrap.runner(os.environ, lock_fd=sys.stderr.fileno())

    with pytest.raises(bootstrap.BootstrapError, match="package index") as raised:
        run([sys.executable, "-c", "raise SystemExit(1)"])
    assert "\n" not in str(raised.value)


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert bootstrap.main([]) == 2
    assert "bootstrap.py COMMAND" in capsys.readouterr().err


def start(checkout: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a bootstrap of the checkout as a process, with another virtual environment active."""
    environ = os.environ | {"PYTHONPATH": "/nowhere", "VIRTUAL_ENV": "/nowhere"}
    script = str(checkout / "worker" / "bootstrap.py")
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=checkout.parent,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def is_busy(lock_file: Path) -> bool:
    """Return whether a process holds the lock."""
    if not lock_file.exists():
        return False
    with lock_file.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_step_that_outlives_its_bootstrap_still_holds_the_lock(steps: Steps, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "end")
    with bootstrap.install_lock(steps.environment) as lock_file:
        bootstrap.runner(os.environ, lock_file)(["sh", "-c", 'read line < "$0" &', str(tmp_path / "end")])

    assert is_busy(Path(f"{steps.environment.folder}.busy"))
    (tmp_path / "end").write_text("\n")
    wait_until(lambda: not is_busy(Path(f"{steps.environment.folder}.busy")), "the step has ended")


def test_real_installations_survive_a_kill_and_wait_for_each_other(checkout: Path) -> None:
    """The first run is killed, two start at once, the fourth has nothing to do, and the fifth finds a change."""
    python, builds = checkout / ".venv" / "bin" / "python", checkout / "builds.txt"
    first = start(checkout, "demo")
    wait_until(python.exists, "the first run has made a virtual environment")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    assert not builds.exists()

    next_two = [start(checkout, "demo", "--seed", "7") for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in next_two]
    assert [process.returncode for process in next_two] == [0, 0], answers
    assert {out for out, _ in answers} == {f"['demo', '--seed', '7'] {checkout.parent} None\n"}
    assert builds.read_text() == "built\n"
    assert sum("Waiting for another process" in err for _, err in answers) >= 1
    assert not is_busy(checkout / ".venv.busy")

    unchanged = start(checkout, "show")
    out, err = unchanged.communicate(timeout=60)
    assert (out.split(" ")[0], err, unchanged.returncode) == ("['show']", "", 0)
    assert builds.read_text() == "built\n"

    (checkout / "pyproject.toml").write_text(PYPROJECT + 'description = "changed"\n')
    changed = start(checkout, "show")
    out, err = changed.communicate(timeout=60)
    assert (out.split(" ")[0], changed.returncode) == ("['show']", 0), err
    assert builds.read_text() == "built\nbuilt\n"
