"""Who acts: the program that this process runs, and the user who started it. For the audit trail."""

import os
import pwd
import sys
from pathlib import Path

INTERACTIVE = ("", "-", "-c", "-m")  # sys.argv[0] of a Python without a program


def program_name() -> str:
    """Return the name of the running program, or an empty text in an interactive Python."""
    program = Path(next(iter(sys.argv), ""))
    name = program.parent.name if program.name == "__main__.py" else program.name
    return "" if name in INTERACTIVE else name


def user_name() -> str:
    """Return the operating-system user of this process. Under sudo, return the user who called it."""
    caller = os.environ.get("SUDO_USER", "")
    try:
        return caller or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container, the user may have no name
        return str(os.getuid())
