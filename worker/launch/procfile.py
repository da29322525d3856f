"""Read a Procfile: which programs to start, and with which environment."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.configuration.environment import read_environment
from worker.errors import SettingsError
from worker.settings import DOTENV_SWITCH, KEY_NAMES

RELEASE = "release"  # run once before the others
KEY_HOLDER = "worker"  # the only process that is given the API keys

_PACKAGE = Path(__file__).parents[1]
_LINE = re.compile(r"(?P<name>[A-Za-z0-9_-]+):\s*(?P<command>\S.*)")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a Procfile."""

    name: str
    command: str


@dataclass(frozen=True, slots=True)
class Program:
    """A program to start, with its whole environment. If it `outlives` the others, it is stopped after them.

    A program that is `watched` gets a heartbeat socket. Once it has sent a heartbeat, it must go on sending them.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    outlives: bool = False
    watched: bool = False


def own_procfile() -> Path:
    """Return the Procfile of this version: inside the installed package, or beside it in a source checkout."""
    inside = _PACKAGE / "Procfile"
    return inside if inside.is_file() else _PACKAGE.parent / "Procfile"


def read_procfile(path: Path) -> list[Line]:
    """Return the lines of a Procfile. Raises SettingsError for a line that cannot be read."""
    lines: list[Line] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(text.strip())
        if match is None:
            raise SettingsError(f"{path}, line {number}: a Procfile line must have the form `name: command`")
        if any(line.name == match["name"] for line in lines):
            raise SettingsError(f"{path}, line {number}: the name {match['name']} is used twice")
        lines.append(Line(match["name"], match["command"]))
    return lines


def merged_environment(dotenv: Path | None) -> dict[str, str]:
    """Return the environment for our processes, including the `.env` file, which they need not read again."""
    return prepared(dict(os.environ) | read_environment(os.environ, dotenv))


def prepared(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which our own programs are found first and no `.env` file is read."""
    programs = [str(Path(sys.executable).parent)]
    if Path(sys.argv[0]).is_file():
        programs.append(str(Path(sys.argv[0]).absolute().parent))
    path = [*dict.fromkeys(programs), environment.get("PATH", os.defpath)]
    # CELERY_* variables belong to the web app.
    inherited = {name: value for name, value in environment.items() if not name.startswith("CELERY_")}
    return inherited | {"PATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", DOTENV_SWITCH: "off"}


def program(line: Line, environment: Mapping[str, str]) -> Program:
    """Return the program for a line. Only the process that polls gets the API keys."""
    variables = {
        name: value for name, value in environment.items() if line.name == KEY_HOLDER or name.upper() not in KEY_NAMES
    }
    prefix = "exec env" if re.match(r"[A-Za-z_]\w*=", line.command) else "exec"  # replace the shell
    return Program(line.name, ("/bin/sh", "-c", f"{prefix} {line.command}"), variables, watched=True)
