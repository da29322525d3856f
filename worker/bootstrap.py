"""Runs the product from a bare Python: fills a virtual environment from the lock file, then executes the program."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - older Pythons must be able to parse this file, to show the message
    sys.exit("fetch-worker needs Python 3.11 or newer; this one is {}.{}.{}.".format(*sys.version_info[:3]))

if __name__ == "__main__" and not __package__ and not sys.flags.safe_path:
    del sys.path[0]  # when run as a script, this is worker/, whose modules would shadow the standard library

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
USAGE = """\
usage: python3 worker/bootstrap.py COMMAND [ARGUMENTS…]

   demo, up, migrate, …   any command of fetch-worker, run in .venv
   test                   lint, format, types, import rules and all tests, run in .venv-test; then the tests
                                                 marked every_python on each other supported Python of this machine
   test ARGUMENTS…        only pytest, with these arguments
   check                  only lint, format, types and import rules
   lock [--upgrade]       write new lock files from pyproject.toml (needs the program uv)

The environments are filled from the lock files. Nothing is installed while those are unchanged."""

STATIC_CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("lint-imports",),
)
SUPPORTED_PYTHONS = ("3.11", "3.12", "3.13")
# Exits with 0 if this is a Python of that version that can make virtual environments.
IS_USABLE = "import sys, ensurepip, venv; sys.exit(sys.argv[1] != '{}.{}'.format(*sys.version_info))"
LOCK_CONTENTS = {
    "requirements.lock": ("--all-extras", "--group", "build"),
    "requirements-dev.lock": ("--all-extras", "--group", "dev", "--constraint", "requirements.lock"),
}
# If set, these would redirect the installation or give our Python other modules.
FOREIGN_VARIABLES = frozenset(
    {
        "PIP_PREFIX",
        "PIP_REQUIRE_HASHES",
        "PIP_ROOT",
        "PIP_TARGET",
        "PYTHONHOME",
        "PYTHONPATH",
        "__PYVENV_LAUNCHER__",
    }
)
INTERRUPTED = 130  # exit code of shells for a program that was ended by Ctrl-C


class BootstrapError(Exception):
    """No program was started. The message says what to do."""


class Interpreter(NamedTuple):
    """A Python to make an environment with. `release` is `3.12`, or `3.12.1` if the exact version matters."""

    path: str
    release: str

    @property
    def cache_tag(self) -> str:
        return "cpython-{}{}".format(*self.release.split("."))


# The Python below an active virtual environment, because the active one may be the folder that is cleared.
THIS_PYTHON = Interpreter(getattr(sys, "_base_executable", sys.executable), platform.python_version())


class Environment(NamedTuple):
    """A virtual environment of a checkout, with its lock file and its Python."""

    root: Path
    folder: Path
    lock: Path
    interpreter: Interpreter = THIS_PYTHON

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.folder / "installed-from"


class Stamp(NamedTuple):
    """Hashes of the inputs of an environment. It is written last, after everything is installed."""

    libraries: str
    project: str


class Plan(NamedTuple):
    """The actions for a command line: checks to run in sequence, or else a program to execute.

    `pytest` runs on the environment's Python, `pytest_elsewhere` on each other supported Python of the machine.
    """

    environment: Environment
    checks: tuple[tuple[str, ...], ...] = ()
    pytest: tuple[str, ...] = ()
    pytest_elsewhere: tuple[str, ...] = ()
    program: tuple[str, ...] = ()


class Result(NamedTuple):
    """The exit code of a check, with its name in the summary."""

    name: str
    code: int


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code. Does not return if another program is executed."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        if not (ROOT / "pyproject.toml").exists():
            raise BootstrapError(f"{ROOT} is not a checkout of fetch-worker: use the command fetch-worker instead.")
        if arguments[0] == "lock":
            return write_locks(ROOT, arguments[1:])
        return execute(plan_for(arguments, ROOT, cores=os.cpu_count() or 1))
    except BootstrapError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"bootstrap: {error}. Is the disk full, or is {ROOT} not writable?", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bootstrap: interrupted; run the same command to continue.", file=sys.stderr)
        return INTERRUPTED


def plan_for(arguments: Sequence[str], root: Path, *, cores: int) -> Plan:
    """Return the plan for a command line that names a command."""
    product = Environment(root, root / ".venv", root / "requirements.lock")
    tests = Environment(root, root / ".venv-test", root / "requirements-dev.lock")
    command, options = arguments[0], arguments[1:]
    if command == "check":
        return Plan(tests, checks=STATIC_CHECKS)
    if command == "test" and options:
        return Plan(tests, program=("pytest", *options))
    if command == "test":
        pytest = ("pytest", "-n", "2", "--dist", "worksteal") if cores > 1 else ("pytest",)
        elsewhere = (*pytest, "-m", "every_python and not long")
        return Plan(tests, checks=STATIC_CHECKS, pytest=pytest, pytest_elsewhere=elsewhere)
    return Plan(product, program=("fetch-worker", *arguments))


def execute(plan: Plan) -> int:
    """Fill the environment, then run the checks or execute the program."""
    environment = plan.environment
    ensure_ready(environment)
    if plan.program:
        if environment.lock.name == "requirements-dev.lock":
            os.chdir(environment.root)  # pytest's arguments are paths in the checkout
        sys.stdout.flush()
        environ = clean_environ(os.environ, environment.folder)
        os.execve(environment.folder / "bin" / plan.program[0], plan.program, environ)  # noqa: S606 - signals go straight to it
    if not plan.pytest:
        return summary([run_check(environment, command) for command in plan.checks])
    return run_tests(plan)


def run_tests(plan: Plan) -> int:
    """Run the checks and all tests, then the every_python tests on the other Pythons. Return the exit code.

    The environments of the other Pythons are filled during the static checks, which use one core.
    """
    environment = plan.environment
    others = other_environments(environment, find_pythons(os.environ))
    with ThreadPoolExecutor(max_workers=1) as threads:
        filling = {release: threads.submit(ensure_ready, other) for release, other in others.items()}
        results = [run_check(environment, command) for command in plan.checks]
        for future in filling.values():
            future.exception()  # wait, because tests that measure time need the machine for themselves
    results.append(run_check(environment, plan.pytest))
    tested = [f"{environment.interpreter.release} (all tests)"]
    for release, other in others.items():
        results.append(run_elsewhere(other, filling[release], plan.pytest_elsewhere))
        tested.append(f"{release} (the tests marked every_python)")
    code = summary(results)
    print(f"tested on Python {', '.join(tested)}")
    tested_fully = release_of(environment.interpreter)
    if missing := [release for release in SUPPORTED_PYTHONS if release not in others and release != tested_fully]:
        print(f"NOT tested on Python {', '.join(missing)}: not found on this machine")
    return code


def run_elsewhere(environment: Environment, filling: "Future[None]", command: Sequence[str]) -> Result:
    """Run a check in the environment of another Python, whose installation may have failed."""
    error = filling.exception()
    if isinstance(error, (BootstrapError, OSError)):
        print(f"--- Python {environment.interpreter.release}: {error}", flush=True)
        return Result(f"installation into {environment.folder.name}", 1)
    filling.result()
    return run_check(environment, command)


def run_check(environment: Environment, command: Sequence[str]) -> Result:
    """Run a program of the environment."""
    name = " ".join(command)
    if environment.interpreter is not THIS_PYTHON:
        name = f"Python {environment.interpreter.release}: {name}"
    print(f"--- {name}", flush=True)
    environ = clean_environ(os.environ, environment.folder)
    arguments = [str(environment.folder / "bin" / command[0]), *command[1:]]
    return Result(name, subprocess.run(arguments, cwd=environment.root, env=environ, check=False).returncode)


def summary(results: Sequence[Result]) -> int:
    """Print what passed and what failed. Return the exit code of the first failure."""
    print("--- summary")
    for name, code in results:
        print(f"{'ok    ' if code == 0 else 'FAILED'} {name}")
    return next((code for _, code in results if code != 0), 0)


def release_of(interpreter: Interpreter) -> str:
    """Return `3.12` for Python 3.12.1."""
    return ".".join(interpreter.release.split(".")[:2])


def other_environments(environment: Environment, pythons: Mapping[str, str]) -> dict[str, Environment]:
    """Return an environment next to `environment` for each Python of another release."""
    return {
        release: environment._replace(
            folder=environment.folder.with_name(f"{environment.folder.name}-{release}"),
            interpreter=Interpreter(path, release),
        )
        for release, path in pythons.items()
        if release != release_of(environment.interpreter)
    }


def find_pythons(environ: Mapping[str, str]) -> dict[str, str]:
    """Return a Python for each supported release: on the PATH, or where pyenv and uv install them."""
    pythons = {}
    for release in SUPPORTED_PYTHONS:
        usable = (path for path in python_candidates(release, environ) if is_usable(path, release))
        if path := next(usable, None):
            pythons[release] = path
    return pythons


def python_candidates(release: str, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield possible paths of a Python of a release."""
    for folder in environ.get("PATH", os.defpath).split(os.pathsep):
        if program := shutil.which(f"python{release}", path=folder):
            yield program
    home = Path(environ.get("HOME", "/"))
    pyenv = Path(environ.get("PYENV_ROOT", home / ".pyenv")) / "versions"
    uv = Path(environ.get("UV_PYTHON_INSTALL_DIR", home / ".local" / "share" / "uv" / "python"))
    for versions, name in ((pyenv, f"{release}.*"), (uv, f"cpython-{release}.*")):
        for installed in sorted(versions.glob(name), reverse=True):
            yield str(installed / "bin" / f"python{release}")


def is_usable(python: str, release: str) -> bool:
    """Return whether this program is a Python of that release that can make virtual environments."""
    try:
        command = [python, "-I", "-c", IS_USABLE, release]
        return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False  # pyenv has shims for all releases; those of unselected releases fail


def ensure_ready(environment: Environment) -> None:
    """Fill the environment if it is not up to date. Raise BootstrapError on failure."""
    if is_ready(environment):
        return
    with install_lock(environment) as lock_fd:
        if not is_ready(environment):  # another process may have filled it while this one waited
            fill(environment, runner(clean_environ(os.environ, environment.folder), lock_fd))


def stamp_for(environment: Environment) -> Stamp:
    """Return the stamp of an up-to-date environment."""
    libraries = hashlib.sha256(environment.lock.read_bytes())
    for trait in (environment.interpreter.cache_tag, platform.machine(), str(environment.root)):
        libraries.update(f"\0{trait}".encode())
    return Stamp(libraries.hexdigest(), hashlib.sha256((environment.root / "pyproject.toml").read_bytes()).hexdigest())


def stamp_of(environment: Environment) -> Stamp | None:
    """Return the stamp of the environment. None if it is unfinished, or its Python is missing or another one."""
    try:
        libraries, project = environment.stamp.read_text().split()
        config = (environment.folder / "pyvenv.cfg").read_text()
    except (FileNotFoundError, ValueError):
        return None
    releases = [line.partition("=")[2].strip() for line in config.splitlines() if line.startswith("version =")]
    same_release = any(f"{release}.".startswith(f"{environment.interpreter.release}.") for release in releases)
    return Stamp(libraries, project) if same_release and environment.python.exists() else None


def is_ready(environment: Environment) -> bool:
    return stamp_of(environment) == stamp_for(environment)


def fill(environment: Environment, run: Callable[[Sequence[str]], None]) -> None:
    """Make the environment, or only reinstall the project if the libraries are up to date."""
    expected, present = stamp_for(environment), stamp_of(environment)
    environment.stamp.unlink(missing_ok=True)
    pip = [str(environment.python), "-I", "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input"]
    if present is None or present.libraries != expected.libraries:
        print_progress(f"Installing into {environment.folder.name} (first time only, about a minute) …")
        require_ensurepip()
        run([environment.interpreter.path, "-I", "-m", "venv", "--clear", str(environment.folder)])
        run([*pip, "--require-hashes", "--requirement", str(environment.lock)])
    else:
        print_progress(f"Updating {environment.folder.name} …")
    run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(environment.root)])
    unfinished = environment.stamp.with_suffix(".new")
    unfinished.write_text("\n".join(expected) + "\n")
    unfinished.replace(environment.stamp)


def require_ensurepip() -> None:
    """Raise BootstrapError if venv is incomplete. Debian and Ubuntu have a separate package for half of it."""
    if find_spec("ensurepip") is None or find_spec("venv") is None:
        raise BootstrapError(
            "this Python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv"
        )


def runner(environ: Mapping[str, str], lock_fd: int) -> Callable[[Sequence[str]], None]:
    """Return a function that runs an installation step. It raises BootstrapError on failure."""

    def run(command: Sequence[str]) -> None:
        # The step inherits the lock: if this process is killed, the next one waits until the step ends.
        if subprocess.run(command, env=environ, check=False, pass_fds=[lock_fd], stdout=sys.stderr).returncode != 0:
            raise BootstrapError(
                "the installation failed, for the reason above. It needs pip's package index (or a mirror that "
                "pip's configuration names). Run the same command to try again."
            )

    return run


@contextlib.contextmanager
def install_lock(environment: Environment) -> Iterator[int]:
    """Hold the lock of the environment, waiting for other processes. Yields its file descriptor."""
    lock_fd = os.open(f"{environment.folder}.busy", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_progress(f"Waiting for another process that installs into {environment.folder.name} …")
            fcntl.flock(lock_fd, fcntl.LOCK_EX)
        yield lock_fd
    finally:
        os.close(lock_fd)


def clean_environ(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return the variables as if this environment, and no other, had been activated."""
    variables = {name: value for name, value in environ.items() if name not in FOREIGN_VARIABLES}
    path = os.pathsep.join([str(folder / "bin"), variables.get("PATH", os.defpath)])
    return variables | {"PATH": path, "VIRTUAL_ENV": str(folder), "PIP_USER": "0"}


def write_locks(root: Path, arguments: Sequence[str]) -> int:
    """Resolve pyproject.toml for every platform and for Python 3.11 and later, with hashes and without URLs."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise BootstrapError("writing the locks needs the program uv (pip install uv).")
    for lock, contents in LOCK_CONTENTS.items():
        command = [uv, "pip", "compile", "pyproject.toml", *contents, "--universal", "--python-version", "3.11"]
        command += ["--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--quiet"]
        command += ["--output-file", lock]
        command += ["--custom-compile-command", "python3 worker/bootstrap.py lock", *arguments]
        process = subprocess.run(command, cwd=root, stdout=subprocess.DEVNULL, check=False)
        if process.returncode != 0:
            return process.returncode
        print_progress(f"Wrote {lock}")
    return 0


def print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # standard output is for the program that follows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
