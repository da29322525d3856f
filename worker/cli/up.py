"""The command `up`."""

import click

from worker.launch.up import up as run_up


@click.command()
def up() -> int:
    """Run the processes of the Procfile until Ctrl-C.

    Processes that die are restarted. Without REDIS_URL it also starts an embedded Redis on var/redis.sock.
    """
    return run_up()
