"""The directory for what a process keeps between its runs: the embedded server, Flower's tasks, partial files.

Where it can't be written, as in a container with a read-only root, a temporary directory of this user takes its place:
the same one for every process on the machine.
"""

import hashlib
import os
import stat
import sys
import tempfile
from functools import cache
from pathlib import Path

from worker.errors import SettingsError

DEFAULT = Path("var")
PRIVATE = 0o700


def chosen(setting: str) -> Path:
    """Return what STATE_DIRECTORY names, absolute: the first of a list as systemd hands it out."""
    return Path(next((item for item in setting.split(":") if item), str(DEFAULT))).absolute()


def substitute(folder: Path) -> Path:
    """Return the temporary directory that takes the place of `folder` for this user, whether or not it is there.

    Raises SettingsError where the machine has no directory for temporary files.
    """
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise SettingsError(
            f"STATE_DIRECTORY: neither {folder} nor a directory for temporary files can be written to:"
            " name one that can, or mount one on /tmp"
        ) from None
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return temporary / f"fetch-worker-{os.geteuid()}-{name}"


@cache
def writable(folder: Path) -> Path:
    """Return `folder`, made where it is missing, or its substitute, which is then named in one line on stderr.

    Raises SettingsError where neither can be written to.
    """
    if _is_writable(folder):
        return folder
    place = substitute(folder)
    if not _is_writable(place) or not _is_private(place):
        raise SettingsError(f"STATE_DIRECTORY: neither {folder} nor {place} can be written to: name one that can")
    print(
        f"fetch-worker: {folder} can't be written to: state goes to {place} (set STATE_DIRECTORY to choose)",
        file=sys.stderr,
        flush=True,
    )
    return place


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_private(folder: Path) -> bool:
    """Whether nobody else made this directory, or can put anything into it: all users share the parent."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
