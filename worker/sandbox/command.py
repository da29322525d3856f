"""Command line of the stand-in: announces its address and serves until a signal. Reads no environment variables."""

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
from worker.sandbox.orders import order_paths
from worker.sandbox.scenarios import SCENARIOS
from worker.sandbox.server import Sandbox

DEFAULT_PORT = 8377


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Return the exit code: 0 stopped by a signal, 1 could not listen, 2 wrong usage."""
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
        try:
            options = _options(arguments)
        except ValueError as error:
            parser.error(str(error))
    except SystemExit as error:
        return int(error.code or 0)
    with _stop_signals() as stop:
        try:
            sandbox = Sandbox(options, arguments.host, arguments.port, verbose=arguments.verbose)
        except OSError as error:
            reason = error.strerror or error
            print(f"{parser.prog}: cannot listen on {arguments.host} port {arguments.port}: {reason}", file=sys.stderr)
            return 1
        with sandbox:
            print(_announcement(sandbox, as_json=arguments.json), flush=True)
            stop.wait()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fetch-worker sandbox",
        description="A stand-in of the hosted image API, to try things out without an account.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # the defaults are those of SandboxOptions
    )
    add = parser.add_argument
    add("--host", type=_loopback, default="127.0.0.1", help="loopback address to listen on (127.0.0.1)")
    add("--port", type=_port, default=DEFAULT_PORT, help=f"port to listen on, 0 for any free one ({DEFAULT_PORT})")
    add("--seed", type=int,
        help="the same seed gives the same ids, durations and outputs (none: ids never used before)")  # fmt: skip
    add("--min-seconds", type=float, help="minimum duration of a job (2)")
    add("--max-seconds", type=float, help="maximum duration of a job (8)")
    add("--outputs", type=_count_range, default={}, metavar="N or N-M",
        help="pictures per job if the submission does not say (1-4)")  # fmt: skip
    add("--key", help=f"the key it accepts ({SandboxOptions().key})")
    add("--rps", type=float, help="requests per second before the rate limit applies (0: none)")
    add("--limit-style", choices=LIMIT_STYLES, help="form of the rate limit's answer")
    add("--plan", choices=tuple(PLANS), help="how many orders may wait: 5, 10, 15, or any number (enterprise)")
    add("--slots", type=int, help="how many orders may wait, instead of the plan's number (0: any number)")
    add("--scenario", dest="scenarios", action="append", default=[], metavar="NAME",
        help="a problem to simulate, from the list below; several are used in turn, one per job")  # fmt: skip
    add("--failure-rate", type=float, help="share of jobs that fail (0)")
    add("--size", type=int, help="width and height of a picture in pixels (512)")
    add("--json", action="store_true", default=False, help="announce the address as one JSON document")
    add("--verbose", action="store_true", default=False, help="log one line per request to standard error")
    return parser


def _epilog() -> str:
    width = max(map(len, SCENARIOS)) + 2
    scenarios = "\n".join(f"  {name:<{width}}{scenario.about}" for name, scenario in SCENARIOS.items())
    return (
        f"scenarios (--scenario NAME, or the field `scenario` of an order):\n{scenarios}\n\n"
        f"orders are accepted at these paths below /api/:\n  " + "\n  ".join(order_paths())
    )


def _options(arguments: argparse.Namespace) -> SandboxOptions:
    values = {name: value for name, value in vars(arguments).items() if name in SandboxOptions.__dataclass_fields__}
    return SandboxOptions(**values | arguments.outputs | {"scenarios": tuple(arguments.scenarios)})


def _announcement(sandbox: Sandbox, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({"url": sandbox.url, "root_url": sandbox.root_url, "key": sandbox.options.key})
    return f"The stand-in listens at {sandbox.url} and accepts the key {sandbox.options.key} (Ctrl-C stops it)"


def _loopback(text: str) -> str:
    host = "127.0.0.1" if text == "localhost" else text
    try:
        is_loopback = ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise argparse.ArgumentTypeError(f"{text!r} is not a loopback address such as 127.0.0.1 or ::1")
    return host


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _count_range(text: str) -> dict[str, int]:
    minimum, dash, maximum = text.partition("-")
    if not (minimum.isascii() and minimum.isdigit() and (not dash or (maximum.isascii() and maximum.isdigit()))):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a range such as 1-4")
    return {"min_outputs": int(minimum), "max_outputs": int(maximum or minimum)}


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Provide an event that SIGTERM and SIGINT set. The previous handlers are restored afterwards."""
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
