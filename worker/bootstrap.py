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
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
USAGE = """\
usage: python3 worker/bootstrap.py COMMAND [ARGUMENTS…]

  demo, up, migrate, …   any command of fetch-worker, run in .venv
  test                   lint, format, types, import fence and all tests, run in .venv-test
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
TEST_PACKAGES = {"chromium": "chromium", "chromedriver": "chromium-driver", "systemd-analyze": "systemd"}
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


class Environment(NamedTuple):
    """A virtual environment of a checkout and the lock file that says what is in it."""

    root: Path
    folder: Path
    lock: Path

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
    """What a command line asks for: checks to run one after the other, or else a program to become."""

    environment: Environment
    checks: tuple[tuple[str, ...], ...] = ()
    program: tuple[str, ...] = ()


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
        at_once = ("-n", "2") if cores > 1 else ()
        return Plan(tests, checks=(*STATIC_CHECKS, ("pytest", *at_once)))
    return Plan(product, program=("fetch-worker", *words))


def carry_out(plan: Plan) -> int:
    """Makes the environment ready, then runs the checks or becomes the program."""
    place = plan.environment
    environ = clean_environ(os.environ, place.folder)
    if not is_ready(place):
        with alone(place) as guard:
            if not is_ready(place):  # another bootstrap may have done it while we waited
                fill(place, runner(environ, guard))
    if any(check[0] == "pytest" for check in plan.checks):
        for words in commands_for_tests(os.environ, os.geteuid(), shutil.which):
            subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
    if plan.program:
        if place.lock.name == "requirements-dev.lock":
            os.chdir(place.root)  # pytest's arguments are paths in the checkout
        sys.stdout.flush()
        os.execve(place.folder / "bin" / plan.program[0], plan.program, environ)  # noqa: S606 - signals go straight to it
    return run_checks(plan.checks, place, environ)


def commands_for_tests(
    environ: Mapping[str, str], user: int, which: Callable[[str], str | None]
) -> tuple[tuple[str, ...], ...]:
    """What installs the programs that some tests need and no wheel has: in CI, as root, on Debian and its kin.

    On a desk those tests are skipped.
    """
    wanted = [package for program, package in TEST_PACKAGES.items() if not which(program)]
    if not environ.get("CI") or user != 0 or which("apt-get") is None or not wanted:
        return ()
    return ("apt-get", "update"), ("apt-get", "install", "-y", "--no-install-recommends", *wanted)


def run_checks(checks: Sequence[Sequence[str]], place: Environment, environ: Mapping[str, str]) -> int:
    """Runs every check, also after a failure; the exit code is that of the first failure."""
    codes = {}
    for check in checks:
        print(f"--- {' '.join(check)}", flush=True)
        codes[" ".join(check)] = subprocess.run(
            [place.folder / "bin" / check[0], *check[1:]], cwd=place.root, env=environ, check=False
        ).returncode
    print("--- in short")
    for name, code in codes.items():
        print(f"{'ok    ' if code == 0 else 'FAILED'} {name}")
    return next((code for code in codes.values() if code != 0), 0)


def stamp_for(place: Environment) -> Stamp:
    """The stamp that the environment has when it is up to date."""
    libraries = hashlib.sha256(place.lock.read_bytes())
    for trait in (sys.implementation.cache_tag, platform.machine(), str(place.root)):
        libraries.update(f"\0{trait}".encode())
    return Stamp(libraries.hexdigest(), hashlib.sha256((place.root / "pyproject.toml").read_bytes()).hexdigest())


def stamp_of(place: Environment) -> Stamp | None:
    """The stamp that the environment has; None where it was never finished, or its Python has gone."""
    try:
        libraries, project = place.stamp.read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return Stamp(libraries, project) if place.python.exists() else None


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
        # The Python below an active virtual environment: that one may be the very folder we clear.
        run([getattr(sys, "_base_executable", sys.executable), "-I", "-m", "venv", "--clear", str(place.folder)])
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
