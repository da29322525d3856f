"""The command `metrics`: Prometheus metrics, once or over HTTP. It needs the database, and no key."""

import logging
import signal
import sys
import threading
from collections.abc import Callable

import click

from worker.errors import SettingsError, Unavailable
from worker.settings import Settings, load
from worker.store.engine import engine_for

FROM_SETTINGS = "-"
PORTS = range(65_536)


@click.command()
@click.option("--listen", is_flag=False, flag_value=FROM_SETTINGS, metavar="[HOST:]PORT",
              help="Serve /metrics over HTTP until stopped; alone: where METRICS_ADDRESS and METRICS_PORT say, "
              "which is 127.0.0.1:9464.")  # fmt: skip
def metrics(listen: str | None) -> int:
    """Prometheus metrics, computed from the database: printed once, or served."""
    settings = load("metrics")
    try:
        from worker.metrics import families, reading, server
    except ImportError as missing:
        raise SettingsError(f"metrics need {missing.name}: pip install 'fetch-worker[metrics]'") from None
    engine = engine_for(settings.database)
    shared = reading.SharedReading(lambda: reading.read(engine, settings))
    made = families.registry(shared.get)
    logging.basicConfig(format="fetch-worker: %(message)s", level=logging.WARNING, stream=sys.stderr)
    if listen is None:
        click.echo(server.exposition(made), nl=False)
        return 0 if shared.get() is not None else 1
    host, port = _place(listen, settings)
    try:
        serving = server.MetricsServer(host, port, made)
    except OSError as error:
        raise Unavailable(f"can't listen on {host}, port {port}: {error.strerror or error}") from None
    click.echo(f"metrics are on http://{serving.address}/metrics", err=True)
    with serving:
        _until_told(serving.serve_forever, serving.shutdown)
    return 0


def _place(words: str, settings: Settings) -> tuple[str, int]:
    if words == FROM_SETTINGS:
        return settings.metrics_address, settings.metrics_port
    host, _, port = words.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or settings.metrics_address
    if not port.isdecimal() or len(port) > 5 or int(port) not in PORTS:
        raise click.BadParameter("is a port, or a host and a port: 9464, 0.0.0.0:9464", param_hint="--listen")
    return host, int(port)


def _until_told(work: Callable[[], None], end: Callable[[], None]) -> None:
    """Works until SIGTERM or Ctrl-C, both of which are a good end."""

    def told(*_: object) -> None:
        threading.Thread(target=end).start()  # it waits for the end of what this very thread does

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
    work()


COMMANDS: tuple[click.Command, ...] = (metrics,)
