"""Serving the page for operators on one address of this machine, until it is stopped."""

import logging
import os
import secrets
import socket
import sys
from dataclasses import dataclass

import waitress

from worker.admin.door import Door
from worker.admin.site import make_site
from worker.errors import Unavailable
from worker.settings import Settings
from worker.store.engine import check_schema, engine_for

PORT = 5556
THREADS = 8
SECONDS_PER_REQUEST = 60


@dataclass(frozen=True, slots=True)
class Place:
    """Where it is served. Port 0 takes one that is free."""

    address: str
    port: int


def place_of(settings: Settings, address: str | None, port: int | None) -> Place:
    """Where to serve: as the command line says, else the settings, else 127.0.0.1:5556."""
    chosen = settings.admin_port if port is None else port
    return Place(address or settings.admin_address, PORT if chosen is None else chosen)


def serve(settings: Settings, place: Place) -> None:
    """Serves until Ctrl-C. Raises SchemaOutdated, Unavailable."""
    check_schema(engine_for(settings.database))
    listener = _listener(place)
    port = listener.getsockname()[1]
    host = f"[{place.address}]" if ":" in place.address else place.address
    site = make_site(settings, Door(_password(settings), place.address))
    _log_to_stderr()
    server = waitress.create_server(
        site,
        sockets=[listener],
        threads=THREADS,
        ident=None,
        channel_timeout=SECONDS_PER_REQUEST,
        clear_untrusted_proxy_headers=True,
    )
    print(f"Admin: http://{host}:{port}/", file=sys.stderr, flush=True)
    server.run()


def _log_to_stderr() -> None:
    """Who acted, and who could not come in, is told where the process is started."""
    shown = logging.StreamHandler()
    shown.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("worker")
    ours.addHandler(shown)
    ours.setLevel(logging.INFO)


def _password(settings: Settings) -> str:
    if settings.admin_password is not None:
        return settings.admin_password.get_secret_value()
    password = secrets.token_urlsafe(12)
    print(f"Admin: log in with {password} (set ADMIN_PASSWORD to choose)", file=sys.stderr, flush=True)
    return password


def _listener(place: Place) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in place.address else socket.AF_INET
        return socket.create_server((place.address, place.port), family=family)
    except OSError as error:
        said = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise Unavailable(
            f"can't listen on {place.address} port {place.port} ({said}): see ADMIN_ADDRESS, ADMIN_PORT"
        ) from None
