"""From a bare Python to the running product: fills a virtual environment from the lock, then becomes the program."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - an older Python meets this file first, and has to be able to parse it
    sys.exit("fetch-worker needs Python 3.11 or newer; this one is {}.{}.{}.".format(*sys.version_info[:3]))

if __name__ == "__main__" and not __package__ and not sys.flags.safe_path:
    del sys.path[0]  # run as a script, that is worker/: its modules must not stand before the standard library's

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
  test                   lint, format, types, import fence and all tests, run in .venv-test; then the tests
                         marked every_python on each other supported Python of this machine
  test ARGUMENTS…        pytest alone, with these arguments
  check                  lint, format, types and import fence alone
  lock [--upgrade]       write the lock files anew from pyproject.toml (needs the program uv)

The environments are filled from the lock files; while those are unchanged, nothing is installed."""

STATIC_CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("lint-imports",),
)
SUPPORTED_PYTHONS = ("3.11", "3.12", "3.13")
# Exits with 0 where this is a Python of that version that can make virtual environments.
IS_USABLE = "import sys, ensurepip, venv; sys.exit(sys.argv[1] != '{}.{}'.format(*sys.version_info))"
LOCK_CONTENTS = {
    "requirements.lock": ("--all-extras", "--group", "build"),
    "requirements-dev.lock": ("--all-extras", "--group", "dev", "--constraint", "requirements.lock"),
}
# Set for something else, these would send the installation elsewhere or give our Python other modules.
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
INTERRUPTED = 130  # the exit code that shells give to a program ended by Ctrl-C


class BootstrapError(Exception):
    """Nothing was started; the text says what to do."""


class Interpreter(NamedTuple):
    """A Python to make an environment with; `release` is `3.12`, or `3.12.1` where the exact one matters."""

    path: str
    release: str

    @property
    def cache_tag(self) -> str:
        return "cpython-{}{}".format(*self.release.split("."))


# The Python below an active virtual environment: that one may be the very folder that is cleared.
THIS_PYTHON = Interpreter(getattr(sys, "_base_executable", sys.executable), platform.python_version())


class Environment(NamedTuple):
    """A virtual environment of a checkout, the lock file that says what is in it, and its Python."""

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
    """Two hashes of what an environment was made from; it is written when everything else is there."""

    libraries: str
    project: str


class Plan(NamedTuple):
    """What a command line asks for: checks to run one after the other, or else a program to become.

    `pytest` runs on the environment's Python, `pytest_elsewhere` on each other supported Python of the machine.
    """

    environment: Environment
    checks: tuple[tuple[str, ...], ...] = ()
    pytest: tuple[str, ...] = ()
    pytest_elsewhere: tuple[str, ...] = ()
    program: tuple[str, ...] = ()


class Result(NamedTuple):
    """The exit code of a check, under the name that the summary shows."""

    name: str
    code: int


def main(words: Sequence[str]) -> int:
    """Exit code, for what does not end in another program."""
    if not words or words[0] in {"-h", "--help"}:
        print(USAGE, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    try:
        if not (ROOT / "pyproject.toml").exists():
            raise BootstrapError(f"{ROOT} is no checkout of fetch-worker: call its command fetch-worker itself.")
        if words[0] == "lock":
            return write_locks(ROOT, words[1:])
        return carry_out(plan_for(words, ROOT, cores=os.cpu_count() or 1))
    except BootstrapError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"bootstrap: {error}. Is there room on the disk, and may you write in {ROOT}?", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bootstrap: interrupted; the same line goes on from here.", file=sys.stderr)
        return INTERRUPTED


def plan_for(words: Sequence[str], root: Path, *, cores: int) -> Plan:
    """The plan for a command line that names a command."""
    product = Environment(root, root / ".venv", root / "requirements.lock")
    tests = Environment(root, root / ".venv-test", root / "requirements-dev.lock")
    command, arguments = words[0], words[1:]
    if command == "check":
        return Plan(tests, checks=STATIC_CHECKS)
    if command == "test" and arguments:
        return Plan(tests, program=("pytest", *arguments))
    if command == "test":
        pytest = ("pytest", "-n", "2") if cores > 1 else ("pytest",)
        elsewhere = (*pytest, "-m", "every_python and not long")
        return Plan(tests, checks=STATIC_CHECKS, pytest=pytest, pytest_elsewhere=elsewhere)
    return Plan(product, program=("fetch-worker", *words))


def carry_out(plan: Plan) -> int:
    """Fill the environment, then run the checks or become the program."""
    place = plan.environment
    make_ready(place)
    if plan.program:
        if place.lock.name == "requirements-dev.lock":
            os.chdir(place.root)  # pytest's arguments are paths in the checkout
        sys.stdout.flush()
        environ = clean_environ(os.environ, place.folder)
        os.execve(place.folder / "bin" / plan.program[0], plan.program, environ)  # noqa: S606 - signals go straight to it
    if not plan.pytest:
        return summary([run_check(place, words) for words in plan.checks])
    return run_tests(plan)


def run_tests(plan: Plan) -> int:
    """Run the checks and all tests, then the tests for every Python on the others; return the exit code.

    The environments of the others are filled while the static checks run, which use one core.
    """
    place = plan.environment
    others = other_environments(place, find_pythons(os.environ))
    with ThreadPoolExecutor(max_workers=1) as threads:
        filling = {release: threads.submit(make_ready, other) for release, other in others.items()}
        results = [run_check(place, words) for words in plan.checks]
        for future in filling.values():
            future.exception()  # wait: tests that measure time share the machine with nothing of ours
    results.append(run_check(place, plan.pytest))
    tested = [f"{place.interpreter.release} (all tests)"]
    for release, other in others.items():
        results.append(run_elsewhere(other, filling[release], plan.pytest_elsewhere))
        tested.append(f"{release} (the tests marked every_python)")
    code = summary(results)
    print(f"tested on Python {', '.join(tested)}")
    this = release_of(place.interpreter)
    if absent := [release for release in SUPPORTED_PYTHONS if release not in others and release != this]:
        print(f"NOT tested on Python {', '.join(absent)}: not found on this machine")
    return code


def run_elsewhere(place: Environment, filling: "Future[None]", words: Sequence[str]) -> Result:
    """Run a check in the environment of another Python, whose installation may have failed."""
    error = filling.exception()
    if isinstance(error, (BootstrapError, OSError)):
        print(f"--- Python {place.interpreter.release}: {error}", flush=True)
        return Result(f"installation into {place.folder.name}", 1)
    filling.result()
    return run_check(place, words)


def run_check(place: Environment, words: Sequence[str]) -> Result:
    """Run a program of the environment."""
    name = " ".join(words)
    if place.interpreter is not THIS_PYTHON:
        name = f"Python {place.interpreter.release}: {name}"
    print(f"--- {name}", flush=True)
    environ = clean_environ(os.environ, place.folder)
    command = [str(place.folder / "bin" / words[0]), *words[1:]]
    return Result(name, subprocess.run(command, cwd=place.root, env=environ, check=False).returncode)


def summary(results: Sequence[Result]) -> int:
    """Print what passed and what failed; return the exit code of the first failure."""
    print("--- in short")
    for name, code in results:
        print(f"{'ok    ' if code == 0 else 'FAILED'} {name}")
    return next((code for _, code in results if code != 0), 0)


def release_of(interpreter: Interpreter) -> str:
    """Return `3.12` for Python 3.12.1."""
    return ".".join(interpreter.release.split(".")[:2])


def other_environments(place: Environment, pythons: Mapping[str, str]) -> dict[str, Environment]:
    """Return an environment beside `place` for each Python found of another release."""
    return {
        release: place._replace(
            folder=place.folder.with_name(f"{place.folder.name}-{release}"), interpreter=Interpreter(path, release)
        )
        for release, path in pythons.items()
        if release != release_of(place.interpreter)
    }


def find_pythons(environ: Mapping[str, str]) -> dict[str, str]:
    """Find a Python of each supported release: on the PATH, or where pyenv and uv keep theirs."""
    pythons = {}
    for release in SUPPORTED_PYTHONS:
        usable = (path for path in python_candidates(release, environ) if is_usable(path, release))
        if path := next(usable, None):
            pythons[release] = path
    return pythons


def python_candidates(release: str, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the places where a Python of a release may be."""
    for folder in environ.get("PATH", os.defpath).split(os.pathsep):
        if found := shutil.which(f"python{release}", path=folder):
            yield found
    home = Path(environ.get("HOME", "/"))
    pyenv = Path(environ.get("PYENV_ROOT", home / ".pyenv")) / "versions"
    uv = Path(environ.get("UV_PYTHON_INSTALL_DIR", home / ".local" / "share" / "uv" / "python"))
    for versions, name in ((pyenv, f"{release}.*"), (uv, f"cpython-{release}.*")):
        for installed in sorted(versions.glob(name), reverse=True):
            yield str(installed / "bin" / f"python{release}")


def is_usable(python: str, release: str) -> bool:
    """Return whether this program is a Python of that release that can make virtual environments."""
    try:
        words = [python, "-I", "-c", IS_USABLE, release]
        return subprocess.run(words, capture_output=True, check=False, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False  # pyenv's shims are programs of every release, and fail for those that are not chosen


def make_ready(place: Environment) -> None:
    """Fill the environment where it is not up to date. Raise BootstrapError where that fails."""
    if is_ready(place):
        return
    with alone(place) as guard:
        if not is_ready(place):  # another bootstrap may have done it while we waited
            fill(place, runner(clean_environ(os.environ, place.folder), guard))


def stamp_for(place: Environment) -> Stamp:
    """The stamp that the environment has when it is up to date."""
    libraries = hashlib.sha256(place.lock.read_bytes())
    for trait in (place.interpreter.cache_tag, platform.machine(), str(place.root)):
        libraries.update(f"\0{trait}".encode())
    return Stamp(libraries.hexdigest(), hashlib.sha256((place.root / "pyproject.toml").read_bytes()).hexdigest())


def stamp_of(place: Environment) -> Stamp | None:
    """The stamp that the environment has; None where it was never finished, or its Python is gone or another one."""
    try:
        libraries, project = place.stamp.read_text().split()
        config = (place.folder / "pyvenv.cfg").read_text()
    except (FileNotFoundError, ValueError):
        return None
    releases = [line.partition("=")[2].strip() for line in config.splitlines() if line.startswith("version =")]
    same = any(f"{release}.".startswith(f"{place.interpreter.release}.") for release in releases)
    return Stamp(libraries, project) if same and place.python.exists() else None


def is_ready(place: Environment) -> bool:
    return stamp_of(place) == stamp_for(place)


def fill(place: Environment, run: Callable[[Sequence[str]], None]) -> None:
    """Makes the environment anew, or only installs the project again where the libraries are those of the lock."""
    wanted, present = stamp_for(place), stamp_of(place)
    place.stamp.unlink(missing_ok=True)
    pip = [str(place.python), "-I", "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input"]
    if present is None or present.libraries != wanted.libraries:
        tell(f"Installing into {place.folder.name} (first time only, about a minute) …")
        require_ensurepip()
        run([place.interpreter.path, "-I", "-m", "venv", "--clear", str(place.folder)])
        run([*pip, "--require-hashes", "--requirement", str(place.lock)])
    else:
        tell(f"Bringing {place.folder.name} up to date …")
    run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(place.root)])
    unfinished = place.stamp.with_suffix(".new")
    unfinished.write_text("\n".join(wanted) + "\n")
    unfinished.replace(place.stamp)


def require_ensurepip() -> None:
    """Debian and its descendants leave half of venv to a package of its own."""
    if find_spec("ensurepip") is None or find_spec("venv") is None:
        raise BootstrapError(
            "this Python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv"
        )


def runner(environ: Mapping[str, str], guard: int) -> Callable[[Sequence[str]], None]:
    """Runs a step of the installation, or raises BootstrapError."""

    def run(words: Sequence[str]) -> None:
        # The step keeps the guard open: where we are killed, the next bootstrap waits for the end of the step.
        if subprocess.run(words, env=environ, check=False, pass_fds=[guard], stdout=sys.stderr).returncode != 0:
            raise BootstrapError(
                "the installation stopped, for the reason above. It needs the package index of pip (or a mirror that "
                "pip's configuration names). The same line tries again."
            )

    return run


@contextlib.contextmanager
def alone(place: Environment) -> Iterator[int]:
    """Waits until no other process fills the environment; gives the file descriptor that keeps others out."""
    guard = os.open(f"{place.folder}.busy", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"Waiting for another process that installs into {place.folder.name} …")
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield guard
    finally:
        os.close(guard)


def clean_environ(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The variables as if the environment had been activated, and no other one ever."""
    kept = {name: value for name, value in environ.items() if name not in FOREIGN_VARIABLES}
    path = os.pathsep.join([str(folder / "bin"), kept.get("PATH", os.defpath)])
    return kept | {"PATH": path, "VIRTUAL_ENV": str(folder), "PIP_USER": "0"}


def write_locks(root: Path, arguments: Sequence[str]) -> int:
    """Resolves pyproject.toml for every platform and Python from 3.11 on, with hashes and without addresses."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise BootstrapError("writing the locks needs the program uv (pip install uv).")
    for lock, contents in LOCK_CONTENTS.items():
        words = [uv, "pip", "compile", "pyproject.toml", *contents, "--universal", "--python-version", "3.11"]
        words += ["--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--quiet", "--output-file", lock]
        words += ["--custom-compile-command", "python3 worker/bootstrap.py lock", *arguments]
        ended = subprocess.run(words, cwd=root, stdout=subprocess.DEVNULL, check=False)
        if ended.returncode != 0:
            return ended.returncode
        tell(f"Wrote {lock}")
    return 0


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # standard output belongs to the program that follows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
