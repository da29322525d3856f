"""A downloader with its own database and folder, and images for it to download."""

import hashlib
import ipaddress
import struct
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, update

from tests.rows import add_downloading, add_output, read_output
from worker.coordination.leases import LeaseKeeper
from worker.downloads.downloader import Downloader
from worker.downloads.options import DownloadOptions
from worker.net.address_guard import Guard, guarded_adapter
from worker.storage.local import FileStorage, path_of
from worker.store.schema import outputs
from worker.system.redaction import Scrubber

KEY = "sk-canary-7f3a"
MAX_BYTES = 1_048_576
MAX_PIXELS = 150_000_000
LOOPBACK = ipaddress.ip_network("127.0.0.0/8")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int = 8, height: int = 8, *, padding: int = 0) -> bytes:
    """Return a real PNG image, with `padding` bytes of text in it."""
    rows = (b"\x00" + b"\x30\x60\x90" * 8) * 8
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + (_chunk(b"tEXt", b"Comment\x00" + b"x" * padding) if padding else b"")
        + _chunk(b"IDAT", zlib.compress(rows))
        + _chunk(b"IEND", b"")
    )


PNG = png(padding=5_000)


@dataclass
class Stand:
    """A downloader with its own database and folder."""

    engine: Engine
    out: Path
    notified: list[int] = field(default_factory=list)
    timeout: float = 5.0
    per_host: int = 12
    slow_seconds: float = 30.0
    allowed: tuple[Any, ...] = (LOOPBACK,)

    def downloader(self) -> Downloader:
        """Return a new downloader, as in another process."""
        return Downloader(
            engine=self.engine,
            leases=LeaseKeeper(self.engine, lease=timedelta(seconds=30)),
            storage=FileStorage(self.out),
            guard=Guard(self.allowed),
            adapter=guarded_adapter(Guard(self.allowed), connections=8),
            scrubber=Scrubber([KEY]),
            options=DownloadOptions(
                max_bytes=MAX_BYTES,
                max_pixels=MAX_PIXELS,
                timeout=self.timeout,
                deadline=86_400,
                per_host=self.per_host,
                slow_seconds=self.slow_seconds,
            ),
            notify=self.notified.extend,
        )

    def add(self, url: str, **changes: Any) -> int:
        """Insert a new job with a due output; return the output's id."""
        with self.engine.begin() as connection:
            job_id = add_downloading(connection, hashlib.sha256(url.encode()).hexdigest())
            now = datetime.now(UTC)
            values: dict[str, Any] = {"url": url, "due_at": now, "listed_at": now}
            return add_output(connection, job_id, **(values | changes))

    def download(self, url: str, **changes: Any) -> Any:
        """Insert an output and run one attempt; return its row."""
        output_id = self.add(url, **changes)
        self.downloader().run(output_id)
        return read_output(self.engine, output_id)

    @property
    def files(self) -> list[Path]:
        """All files, including temporary files."""
        return [path for path in self.out.rglob("*") if path.is_file()]


def assert_stored(stand: Stand, row: Any, body: bytes) -> None:
    """Check that an output is stored completely, and that there is no other file."""
    assert (row.status, row.error_code, row.size_bytes) == ("stored", None, len(body)), row.error_message
    assert row.sha256 == hashlib.sha256(body).hexdigest()
    assert path_of(row.location).read_bytes() == body
    assert stand.files == [path_of(row.location)]


def make_due(engine: Engine) -> None:
    """Make the next attempt due now."""
    with engine.begin() as connection:
        connection.execute(update(outputs).where(outputs.c.due_at.is_not(None)).values(due_at=outputs.c.listed_at))
