"""The command line `fetch-worker COMMAND`: results on stdout, messages on stderr; exit code 1 failed, 2 wrong usage."""

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code."""
    try:
        # Imported here, so that Ctrl-C during the import is handled too.
        from worker.cli.commands import run_command

        code = run_command(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)
