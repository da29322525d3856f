"""The command line: `fetch-worker COMMAND`. Answers on stdout, messages on stderr; 0 done, 1 could not, 2 usage."""

import sys


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits with its code."""
    try:
        # Imported here, so that a Ctrl-C while everything loads is answered like any other.
        from worker.cli.commands import run_command

        code = run_command(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)
