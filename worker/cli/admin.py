"""The command `admin`."""

import click

from worker.errors import SettingsError
from worker.settings import load


@click.command()
@click.option("--address", help="The address to listen on. Default: ADMIN_ADDRESS, 127.0.0.1.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    help="The port to listen on; 0 chooses a free port. Default: ADMIN_PORT, 5556.",
)
def admin(address: str | None, port: int | None) -> None:
    """Serve the admin page for operators.

    It shows jobs, outputs, accounts and plots. It needs no API key, only the DATABASE_URL, REDIS_URL and
    STORAGE_URL of the workers. The password is ADMIN_PASSWORD; if that is not set, a new password is printed at the
    start. Who logs in with ADMIN_VIEWER_PASSWORD may look and change nothing.
    """
    settings = load("admin")
    try:
        from worker.admin.serve import listen_address_of, serve  # an optional dependency
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("worker"):
            raise
        raise SettingsError(f"`admin` needs {error.name}: pip install 'fetch-worker[admin]'") from None
    serve(settings, listen_address_of(settings, address, port))
