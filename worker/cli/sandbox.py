"""The command `sandbox`."""

import click

from worker.sandbox.command import main as run_sandbox


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
    options_metavar="[OPTIONS]",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="")
def sandbox(words: tuple[str, ...]) -> int:
    """Run only the stand-in of the API. `sandbox --help` lists its options."""
    return run_sandbox(words)
