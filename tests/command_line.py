"""Commands that run in the process of a test, as their entry point runs them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from worker.cli import main


@dataclass(frozen=True)
class Result:
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The JSON document on stdout."""
        return json.loads(self.out)


Run = Callable[..., Result]


def command_runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command. Any exception other than SystemExit fails the test."""

    def command(*arguments: str) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        result = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        assert "Traceback" not in result.err
        return Result(ended.value.code, result.out, result.err)

    return command
