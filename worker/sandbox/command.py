"""The command line of the stand-in: says where it listens, serves until it is told to end. Reads no environment."""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from typing import NoReturn

from worker.sandbox.options import LIMIT_STYLES, PLANS, SandboxOptions
from worker.sandbox.orders import orders
from worker.sandbox.scenarios import SCENARIOS
from worker.sandbox.server import Sandbox

DEFAULT_PORT = 8377

_DEFAULTS = SandboxOptions()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. The exit code: 0 ended as told, 1 could not listen, 2 wrong usage."""
    parser = _parser()
    try:
        given = parser.parse_args(argv)
        try:
            options = _options(given)
        except ValueError as error:
            parser.error(str(error))
    except SystemExit as end:
        return int(end.code or 0)
    with _told_to_end() as told:
        try:
            sandbox = Sandbox(options, given.host, given.port, verbose=given.verbose)
        except OSError as error:
            reason = error.strerror or error
            print(f"{parser.prog}: can't listen on {given.host} port {given.port}: {reason}", file=sys.stderr)
            return 1
        with sandbox:
            print(_announcement(sandbox, as_json=given.json), flush=True)
            told.wait()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fetch-worker sandbox",
        description="A stand-in of the hosted image API, for trying things out without an account.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host", type=_loopback, default="127.0.0.1", help="loopback address to listen on (127.0.0.1)")
    add("--port", type=_port, default=DEFAULT_PORT, help=f"port to listen on, 0 for any free one ({DEFAULT_PORT})")
    add(
        "--seed", type=int, help="the same seed gives the same ids, durations and outputs (none: ids never used before)"
    )
    add("--min-seconds", type=float, default=_DEFAULTS.min_seconds, help="a job takes at least this long (2)")
    add("--max-seconds", type=float, default=_DEFAULTS.max_seconds, help="and at most this long (8)")
    add("--outputs", type=_span, default=(_DEFAULTS.min_outputs, _DEFAULTS.max_outputs), metavar="N or N-M",
        help="pictures per job, where the submission does not say (1-4)")  # fmt: skip
    add("--key", default=_DEFAULTS.key, help=f"the key it accepts ({_DEFAULTS.key})")
    add("--rps", type=float, default=_DEFAULTS.rps, help="calls per second before its rate limit answers (0: none)")
    add("--limit-style", choices=LIMIT_STYLES, default=_DEFAULTS.limit_style, help="how the rate limit answers")
    add(
        "--plan",
        choices=tuple(PLANS),
        default=_DEFAULTS.plan,
        help="how many orders may wait: 5, 10, 15, or any number (enterprise)",
    )
    add("--scenario", action="append", default=[], metavar="NAME",
        help="what goes wrong, by a name below; several are taken in turn by the jobs")  # fmt: skip
    add("--failure-rate", type=float, default=_DEFAULTS.failure_rate, help="share of jobs that fail (0)")
    add("--size", type=int, default=_DEFAULTS.size, help="pixels of a picture, both ways (512)")
    add("--json", action="store_true", help="announce the address as one JSON document")
    add("--verbose", action="store_true", help="one line per call on standard error")
    return parser


def _epilog() -> str:
    width = max(map(len, SCENARIOS)) + 2
    scenarios = "\n".join(f"  {name:<{width}}{scenario.about}" for name, scenario in SCENARIOS.items())
    return (
        f"scenarios (--scenario NAME, or the field `scenario` of an order):\n{scenarios}\n\n"
        f"orders are taken at these paths below /api/:\n  " + "\n  ".join(orders())
    )


def _options(given: argparse.Namespace) -> SandboxOptions:
    return SandboxOptions(
        seed=given.seed,
        min_seconds=given.min_seconds,
        max_seconds=given.max_seconds,
        min_outputs=given.outputs[0],
        max_outputs=given.outputs[1],
        key=given.key,
        rps=given.rps,
        limit_style=given.limit_style,
        size=given.size,
        failure_rate=given.failure_rate,
        plan=given.plan,
        scenarios=tuple(given.scenario),
    )


def _announcement(sandbox: Sandbox, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({"url": sandbox.url, "root_url": sandbox.root_url, "key": sandbox.options.key})
    return f"The stand-in listens at {sandbox.url} and takes the key {sandbox.options.key} (Ctrl-C ends it)"


def _loopback(text: str) -> str:
    host = "127.0.0.1" if text == "localhost" else text
    try:
        fits = ip_address(host).is_loopback
    except ValueError:
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(f"{text!r} is not a loopback address such as 127.0.0.1 or ::1")
    return host


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _span(text: str) -> tuple[int, int]:
    least, dash, most = text.partition("-")
    if not (least.isascii() and least.isdigit() and (not dash or (most.isascii() and most.isdigit()))):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a range such as 1-4")
    return int(least), int(most or least)


@contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; what they did before is put back at the end."""
    told = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: told.set()) for number in numbers}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
