"""Who holds a claim: a name for this process that others on the same host can tell the living from the dead by."""

import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

PROC = Path("/proc")


def host_name() -> str:
    """A name for this host since it was booted, as far as process ids reach: 8 hex digits, or empty where unknown."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = (PROC / "self/ns/pid").readlink()  # a container's process ids mean nothing outside of it
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {space}".encode()).hexdigest()[:8]


def holder_name() -> str:
    """A name for this process: its host, its id, and when it started, since ids are used again."""
    host, pid = host_name(), os.getpid()
    started = started_at(pid)
    return f"{host}.{pid}.{started}" if host and started else secrets.token_hex(8)


def started_at(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty where there is no such process."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the name before it may hold blanks
    return "" if fields[0] in ("Z", "X") else fields[19]


def fate(holder: str) -> Literal["runs", "dead", "unknown"]:
    """What is known of a holder: whether it is a process of this host that runs or is no more, or of another host."""
    if dead([holder]):
        return "dead"
    host = host_name()
    return "runs" if host and holder.startswith(f"{host}.") else "unknown"


def dead(holders: Iterable[str]) -> list[str]:
    """Those of the holders that were processes of this host and are no more. Of other hosts nothing is known."""
    host = host_name()
    gone = []
    for holder in holders:
        where, _, rest = holder.partition(".")
        pid, _, started = rest.partition(".")
        if host and where == host and pid.isdecimal() and started_at(int(pid)) != started:
            gone.append(holder)
    return gone
