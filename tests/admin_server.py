"""Run the command `admin` on a real port."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.waiting import wait_until

ADDRESS = re.compile(r"Admin: (http://\S+)/\n")


@contextmanager
def served(folder: Path, redis_url: str, *arguments: str, **settings: str) -> Iterator[tuple[str, Path]]:
    """Run the command in a process without API keys. Yields its URL and its log file."""
    log = folder / "admin.log"
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
    environment |= {
        "DATABASE_URL": f"sqlite:///{folder}/test.db", "REDIS_URL": redis_url, "STORAGE_URL": f"file:{folder}/out",
        "FETCH_WORKER_DOTENV": "off", **settings,
    }  # fmt: skip
    with log.open("wb") as out:
        program = [str(Path(sys.executable).with_name("fetch-worker")), "admin", "--port", "0", *arguments]
        process = subprocess.Popen(program, cwd=folder, env=environment, stdout=out, stderr=out)
    try:
        wait_until(
            lambda: process.poll() is not None or ADDRESS.search(log.read_text()), "it serves", seen=log.read_text
        )
        match = ADDRESS.search(log.read_text())
        assert match is not None, log.read_text()
        yield match[1], log
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130), log.read_text()
    finally:
        process.kill()
        process.wait()
