"""The command `metrics`: print Prometheus metrics or serve them over HTTP. Needs the database, but no API key."""

import logging
import signal
import sys
import threading
from collections.abc import Callable

import click

from worker.errors import SettingsError, Unavailable
from worker.settings import Settings, load
from worker.store.engine import engine_for
from worker.store.reports.recent_counts import RecentCounts

FROM_SETTINGS = "-"
PORTS = range(65_536)


@click.command()
@click.option("--listen", is_flag=False, flag_value=FROM_SETTINGS, metavar="[HOST:]PORT",
              help="Serve /metrics over HTTP until stopped. Without a value: on METRICS_ADDRESS and METRICS_PORT, "
              "by default 127.0.0.1:9464.")  # fmt: skip
def metrics(listen: str | None) -> int:
    """Print or serve Prometheus metrics. They are computed from the database."""
    settings = load("metrics")
    try:
        from worker.metrics import definitions, figures, server
    except ImportError as error:
        raise SettingsError(f"metrics need {error.name}: pip install 'fetch-worker[metrics]'") from None
    engine = engine_for(settings.database)
    counts = RecentCounts()
    shared = figures.SharedFigures(lambda: figures.read_figures(engine, settings, counts))
    registry = definitions.registry(shared.get)
    logging.basicConfig(format="fetch-worker: %(message)s", level=logging.WARNING, stream=sys.stderr)
    if listen is None:
        click.echo(server.exposition(registry), nl=False)
        return 0 if shared.get() is not None else 1
    host, port = _listen_address(listen, settings)
    try:
        metrics_server = server.MetricsServer(host, port, registry)
    except OSError as error:
        raise Unavailable(f"can't listen on {host}, port {port}: {error.strerror or error}") from None
    click.echo(f"serving metrics on http://{metrics_server.address}/metrics", err=True)
    with metrics_server:
        _run_until_signal(metrics_server.serve_forever, metrics_server.shutdown)
    return 0


def _listen_address(value: str, settings: Settings) -> tuple[str, int]:
    if value == FROM_SETTINGS:
        return settings.metrics_address, settings.metrics_port
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or settings.metrics_address
    if not port.isdecimal() or len(port) > 5 or int(port) not in PORTS:
        raise click.BadParameter("must be a port, or a host and a port: 9464, 0.0.0.0:9464", param_hint="--listen")
    return host, int(port)


def _run_until_signal(work: Callable[[], None], end: Callable[[], None]) -> None:
    """Run `work` until SIGTERM or Ctrl-C. Both end it normally."""

    def stop(*_: object) -> None:
        threading.Thread(target=end).start()  # in another thread: `end` waits until `work` has returned

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    work()
