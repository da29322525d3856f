"""Settings of downloads and of the storage for outputs."""

import re
from functools import cached_property
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field

from worker.configuration.setting_types import MAX_SECONDS, Network, Networks, SettingsGroup, networks, readable_by

DEFAULT_STORAGE = Path("var/outputs")
USER_AGENT = "fetch-worker/0.1.0"  # our own name, because many hosts refuse the names of HTTP libraries
_FILE = re.compile(r"file:(?://)?(?P<path>/(?!/)[^\x00]*)")
_S3 = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>[^\x00-\x1f]*))?")


def _storage(url: str) -> Path | tuple[str, str]:
    """Return the directory of a storage URL, or the bucket and the prefix of object names. Raises ValueError."""
    if not url:
        return DEFAULT_STORAGE.absolute()
    if match := _S3.fullmatch(url):
        return match["bucket"], (match["prefix"] or "").strip("/")
    if match := _FILE.fullmatch(url):
        return Path(match["path"])
    if url.startswith("s3:"):
        raise ValueError("must have a bucket, and may have a prefix, for example s3://pictures/app")
    raise ValueError("must be file: and an absolute path, for example file:/srv/outputs, or s3://bucket/prefix")


def _web_address(url: str) -> None:
    parts = urlsplit(url)
    if url and (parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment):
        raise ValueError("must be the URL at which a web server serves STORAGE_URL, such as https://host/outputs")


def _agent(text: str) -> None:
    if not (text.isascii() and text.isprintable()):
        raise ValueError("must be one line of ASCII text, for example shop/2.1 (+https://shop.example)")


class OutputSettings(SettingsGroup):
    """Downloads, and where their files go."""

    storage_url: Annotated[str, readable_by(_storage)] = ""
    storage_address: Annotated[str, readable_by(_web_address)] = ""
    output_max_bytes: int = Field(default=209_715_200, gt=0)
    output_max_pixels: int = Field(default=150_000_000, gt=0)
    output_timeout: float = Field(default=300.0, gt=0, le=86_400)
    output_deadline: float = Field(default=86_400.0, gt=0, le=MAX_SECONDS)
    output_allowed_networks: Networks = ""
    user_agent: Annotated[str, Field(max_length=256), readable_by(_agent)] = USER_AGENT
    downloads_per_host: int = Field(default=12, ge=1, le=1_000)

    @cached_property
    def allowed_networks(self) -> tuple[Network, ...]:
        """Non-public networks that downloads may reach."""
        return networks(self.output_allowed_networks)

    @cached_property
    def storage_path(self) -> Path | None:
        """The directory for outputs, or None if they are stored in a bucket."""
        storage = _storage(self.storage_url)
        return storage if isinstance(storage, Path) else None

    @cached_property
    def bucket(self) -> tuple[str, str] | None:
        """The bucket for outputs and the prefix of object names, or None if they are stored in a directory."""
        storage = _storage(self.storage_url)
        return None if isinstance(storage, Path) else storage
