"""Run the benchmarks and print a table: `python -m tests.benchmarks [PART…] [--rounds 5] [--seconds 4] [--json FILE]`.

The worker processes, the fake API, PostgreSQL and Redis share the cores of this machine. So only ratios from the same
round are meaningful, and absolute figures are those of the best round. "Bare" is a loop of
`requests.Session().post(url, json=…).json()` in a separate process, against the same server, which answers at once.
Processor time is user and system time of all worker processes. `must` and `aim` are the targets of this project.
"""

import argparse
import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.deployment import api_server, cpu_seconds
from tests.benchmarks.orders import measure_orders
from tests.benchmarks.pace import measure_pace
from tests.benchmarks.polls import measure_idle, measure_polls, measure_scale
from tests.benchmarks.rows import (
    measure_claims,
    measure_recording,
    measure_share,
    measure_tracking,
)
from tests.benchmarks.scale_out import measure_scale_out
from tests.benchmarks.server import PROCESSING
from tests.benchmarks.table import Table
from tests.benchmarks.transfer import measure_downloads, measure_transfer


def server_speed(calls: int = 20_000) -> str:
    """Measure the fake API with a raw socket that sends fifty requests at a time. Return a sentence."""
    request = b"POST /api/v3/fetch/1 HTTP/1.1\r\nHost: x\r\nContent-Length: 13\r\n\r\n" + b'{"key":"sk-"}'
    with api_server() as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        began, used = time.perf_counter(), cpu_seconds([server.process.pid])
        client.settimeout(10)
        size = len(PROCESSING) * 50
        for _ in range(calls // 50):
            client.sendall(request * 50)
            remaining = size
            while remaining > 0:
                remaining -= len(client.recv(1_000_000))
        seconds = time.perf_counter() - began
        spent = cpu_seconds([server.process.pid]) - used
    return f"The fake API answers {calls / seconds:,.0f} requests/s at {spent / calls * 1e6:.0f} µs CPU each."


def main() -> int:
    """Run the named parts and print the table. Return 1 if a `must` was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each window")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds, seconds = options.rounds, options.seconds
    parts: dict[str, Callable[[Table, Path], None]] = {
        "polls": lambda table, folder: measure_polls(table, folder, rounds, seconds),
        "scale": lambda table, folder: measure_scale(table, folder, rounds, seconds),
        "share": lambda table, folder: measure_share(table, folder, rounds, seconds),
        "claims": measure_claims,
        "recording": lambda table, folder: measure_recording(table, folder, rounds),
        "tracking": lambda table, folder: measure_tracking(table, folder, rounds),
        "orders": lambda table, folder: measure_orders(table, folder, rounds, seconds),
        "transfer": lambda table, folder: measure_transfer(table, folder, rounds),
        "downloads": lambda table, folder: measure_downloads(table, folder, rounds),
        "scale-out": lambda table, folder: measure_scale_out(table, folder, rounds, seconds),
        "pace": measure_pace,
        "idle": lambda table, folder: measure_idle(table, folder, seconds * 5),
    }
    unknown = [name for name in options.parts if name not in parts]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    table = Table()
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        for name in options.parts or parts:
            print(f"{name} …", flush=True)
            parts[name](table, Path(folder) / name)
    print(f"\n{table.text()}\n\n{server_speed()}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in table.rows], indent=1, ensure_ascii=False))
    return 1 if any(row.reached == "NO" for row in table.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
