"""The state directory: it holds the embedded Redis, Flower's tasks and partial downloads between runs.

If it is not writable, as in a container with a read-only root, a temporary directory of this user replaces it. All
processes on the machine use the same one.
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


def configured(setting: str) -> Path:
    """Return the absolute path that STATE_DIRECTORY names. systemd passes a list; the first entry is used."""
    return Path(next((item for item in setting.split(":") if item), str(DEFAULT))).absolute()


def fallback(folder: Path) -> Path:
    """Return the temporary directory that replaces `folder` for this user. It need not exist.

    Raises SettingsError if the machine has no directory for temporary files.
    """
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise SettingsError(
            f"STATE_DIRECTORY: neither {folder} nor a directory for temporary files is writable:"
            " name a writable directory, or mount one on /tmp"
        ) from None
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return temporary / f"fetch-worker-{os.geteuid()}-{name}"


@cache
def writable(folder: Path) -> Path:
    """Return `folder`, created if missing, or its substitute if it is not writable. A substitute is named on stderr.

    Raises SettingsError if neither is writable.
    """
    if _is_writable(folder):
        return folder
    fallback_folder = fallback(folder)
    if not _is_writable(fallback_folder) or not _is_private(fallback_folder):
        raise SettingsError(
            f"STATE_DIRECTORY: neither {folder} nor {fallback_folder} is writable: name a writable directory"
        )
    print(
        f"fetch-worker: {folder} is not writable: state goes to {fallback_folder} (set STATE_DIRECTORY to choose)",
        file=sys.stderr,
        flush=True,
    )
    return fallback_folder


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_private(folder: Path) -> bool:
    """Return whether this user owns the directory and others cannot write to it. Its parent is shared by all users."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
