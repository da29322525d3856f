"""Process identity (host, pid, start time), so that other processes on the host can detect a dead claim holder."""

import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

PROC = Path("/proc")


def host_name() -> str:
    """Return 8 hex digits for this host, boot and pid namespace, or an empty string if unknown."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = (PROC / "self/ns/pid").readlink()  # process ids are only valid inside their container
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {space}".encode()).hexdigest()[:8]


def holder_name() -> str:
    """Return a name for this process: host, process id, and start time, because process ids are reused."""
    host, pid = host_name(), os.getpid()
    started = started_at(pid)
    return f"{host}.{pid}.{started}" if host and started else secrets.token_hex(8)


def started_at(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot. Empty if there is no such process."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the process name before it may contain blanks
    return "" if fields[0] in ("Z", "X") else fields[19]


def liveness(holder: str) -> Literal["runs", "dead", "unknown"]:
    """Return whether a holder runs or is dead. Unknown for processes of other hosts."""
    if dead_holders([holder]):
        return "dead"
    host = host_name()
    return "runs" if host and holder.startswith(f"{host}.") else "unknown"


def dead_holders(holders: Iterable[str]) -> list[str]:
    """Return the holders that were processes of this host and have ended. Nothing is known of other hosts."""
    host = host_name()
    dead = []
    for holder in holders:
        host_part, _, remainder = holder.partition(".")
        pid, _, started = remainder.partition(".")
        if host and host_part == host and pid.isdecimal() and started_at(int(pid)) != started:
            dead.append(holder)
    return dead
