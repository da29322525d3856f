"""Serve the admin page on one address until it is stopped."""

import logging
import os
import secrets
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

import waitress

from worker.admin.access import AccessControl
from worker.admin.site import make_site
from worker.configuration.admin_url import AdminUrl
from worker.configuration.monitoring_settings import ADMIN_PORT
from worker.errors import Unavailable
from worker.settings import Settings
from worker.store.engine import check_schema, engine_for

THREADS = 8
SECONDS_PER_REQUEST = 60


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """The address and port to serve on. Port 0 chooses a free port."""

    address: str
    port: int


def listen_address_of(settings: Settings, address: str | None, port: int | None) -> ListenAddress:
    """Return the address of the command line, or of the settings, or 127.0.0.1:5556."""
    chosen_port = settings.admin_port if port is None else port
    return ListenAddress(address or settings.admin_address, ADMIN_PORT if chosen_port is None else chosen_port)


def serve(settings: Settings, listen_address: ListenAddress) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises SchemaOutdated and Unavailable."""
    check_schema(engine_for(settings.database))
    listener = _listener(listen_address)
    port = listener.getsockname()[1]
    host = f"[{listen_address.address}]" if ":" in listen_address.address else listen_address.address
    url = settings.admin_page
    viewer_password = (
        None if settings.admin_viewer_password is None else settings.admin_viewer_password.get_secret_value()
    )
    access = AccessControl(_password(settings), listen_address.address, url=url, viewer_password=viewer_password)
    site = make_site(settings, access)
    _log_to_stderr()
    server = waitress.create_server(
        site,
        sockets=[listener],
        threads=THREADS,
        ident=None,
        channel_timeout=SECONDS_PER_REQUEST,
        clear_untrusted_proxy_headers=True,
        **_proxy_options(url, listen_address),
    )
    print(f"Admin: http://{host}:{port}/", file=sys.stderr, flush=True)
    if url is not None:
        print(f"Admin: only {url.origin}{url.prefix}/ is answered (ADMIN_URL)", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, _end)  # without a handler, process 1 of a container ignores it
    server.run()


def _end(*_: object) -> None:
    """End the server's loop, which handles SystemExit."""
    sys.exit(0)


def _proxy_options(url: AdminUrl | None, listen_address: ListenAddress) -> dict[str, Any]:
    """Return waitress's options for a proxy. It may pass the prefix on or strip it.

    Only a proxy on this host is trusted to name its client, for the waiting time after a wrong password.
    """
    if url is None:
        return {}
    return {
        "url_scheme": url.scheme,
        "url_prefix": url.prefix,
        "trusted_proxy": "::1" if ":" in listen_address.address else "127.0.0.1",
        "trusted_proxy_count": 1,
        "trusted_proxy_headers": "x-forwarded-for",
    }


def _log_to_stderr() -> None:
    """Log to stderr, so that actions and wrong passwords are visible where the process runs."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("worker")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _password(settings: Settings) -> str:
    if settings.admin_password is not None:
        return settings.admin_password.get_secret_value()
    password = secrets.token_urlsafe(12)
    print(f"Admin: log in with {password} (set ADMIN_PASSWORD to choose)", file=sys.stderr, flush=True)
    return password


def _listener(listen_address: ListenAddress) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in listen_address.address else socket.AF_INET
        return socket.create_server((listen_address.address, listen_address.port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise Unavailable(
            f"can't listen on {listen_address.address} port {listen_address.port} ({reason}): "
            "change ADMIN_ADDRESS or ADMIN_PORT"
        ) from None
