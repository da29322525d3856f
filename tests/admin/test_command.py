"""The command `admin` where it can't serve: one line says why and what to do."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from worker.cli import main
from worker.settings import Settings
from worker.store.engine import make_engine
from worker.store.migrate import migrate


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int | str | None, str]:
    """A command's exit code, and what it printed for people."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("module", ["flask", "flask_admin", "pygal", "waitress"])
def test_without_its_extra_it_says_what_to_install(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [name for name in sys.modules if name.startswith("worker.admin")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)

    code, words = said(capsys, "admin")

    assert (code, words) == (2, f"fetch-worker: `admin` needs {module}: pip install 'fetch-worker[admin]'\n")


def test_no_other_command_loads_what_it_needs() -> None:
    program = (
        "import sys, worker.cli.commands; print({'flask', 'pygal', 'waitress', 'worker.admin'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"


def test_without_tables_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/test.db")

    code, words = said(capsys, "admin", "--port", "0")

    assert code == 1
    assert "fetch-worker migrate" in words


def test_a_port_that_is_taken_is_said_with_the_settings_that_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/test.db")
    engine = make_engine(Settings(database_url=f"sqlite:///{tmp_path}/test.db").database)
    migrate(engine)
    engine.dispose()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("ADMIN_PORT", str(port))

        code, words = said(capsys, "admin")

    assert code == 1
    assert words == (
        f"fetch-worker: can't listen on 127.0.0.1 port {port} (Address already in use): see ADMIN_ADDRESS, ADMIN_PORT\n"
    )
