"""Settings of the servers that a process connects to, and of its state directory."""

import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator
from sqlalchemy.engine import URL

from worker.configuration import server_urls, state_directory
from worker.configuration.setting_types import SettingsGroup, readable_by
from worker.errors import SettingsError
from worker.system.locked_cache import locked_property

EMBEDDED_SOCKET = "redis.sock"


class ServerSettings(SettingsGroup):
    """Database, Redis, broker, and the state directory, which holds the embedded Redis."""

    database_url: Annotated[str, readable_by(server_urls.database_url)] = "sqlite:///var/worker.db"
    redis_url: Annotated[str, AfterValidator(server_urls.redis_url)] | None = None
    broker_url: Annotated[str, AfterValidator(server_urls.broker_url)] | None = None
    state_directory: str = str(state_directory.DEFAULT)

    @locked_property
    def database(self) -> URL:
        """The database URL with its SQLAlchemy driver. Raises SettingsError if its folder is missing."""
        url = server_urls.database_url(self.database_url)
        if url.get_backend_name() == "sqlite" and url.database and not url.database.startswith((":memory:", "file:")):
            self._make_folder(Path(url.database).absolute().parent)
        return url

    @property
    def default_database_file(self) -> Path | None:
        """The database file that is used because DATABASE_URL is not set, or None if it is set."""
        if "database_url" in self.model_fields_set or not self.database.database:
            return None
        return Path(self.database.database).absolute()

    def _make_folder(self, folder: Path) -> None:
        """Create the folder of an SQLite file if it is the state directory. Any other must exist."""
        if folder.is_dir():
            return
        if folder not in (state_directory.DEFAULT.absolute(), state_directory.configured(self.state_directory)):
            raise SettingsError(
                f"DATABASE_URL names a file in {folder}, which is not a directory: create it, or correct it"
            )
        try:
            folder.mkdir(mode=state_directory.PRIVATE, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"DATABASE_URL: cannot create the directory {folder} ({error.strerror})") from None

    @locked_property
    def state(self) -> Path:
        """A writable directory for state. Raises SettingsError if there is none."""
        return state_directory.writable(state_directory.configured(self.state_directory))

    @property
    def partial_path(self) -> Path:
        """The directory for partial downloads of outputs that go to a bucket. Raises SettingsError if not writable."""
        return self.state / "partial"

    @locked_property
    def redis(self) -> str:
        """The Redis URL: the setting, or else the embedded server if it answers, or else the default URL."""
        if self.redis_url:
            return self.redis_url
        folder = state_directory.configured(self.state_directory)
        folders = [folder]
        with suppress(SettingsError):  # raised if the machine has no directory for temporary files
            folders.append(state_directory.fallback(folder))
        for candidate in folders:
            if answers(candidate / EMBEDDED_SOCKET):
                return f"redis+socket://{candidate / EMBEDDED_SOCKET}"
        return "redis://localhost:6379/0"

    @property
    def broker(self) -> str:
        """The URL of the Celery broker."""
        return self.broker_url or self.redis


def answers(path: Path) -> bool:
    """Return whether a server on this socket accepts connections from this user."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
