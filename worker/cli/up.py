"""The command `up`."""

import click

from worker.launch.up import up as run_up


@click.command()
@click.option("--verbose", is_flag=True, help="On a terminal, show all lines of all processes.")
def up(verbose: bool) -> int:
    """Run the processes of the Procfile until Ctrl-C.

    Processes that die are restarted. Without REDIS_URL it also starts an embedded Redis on var/redis.sock.

    On a terminal it shows what runs and where, when everything is ready, and from then on warnings, errors and changes
    of state. If its output is no terminal, it shows all lines.
    """
    return run_up(verbose=verbose)
