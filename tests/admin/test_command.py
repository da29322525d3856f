"""The command `admin` reports in one line why it can't serve and what to do."""

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import wait_until
from worker.cli import main
from worker.settings import Settings
from worker.store.engine import make_engine
from worker.store.migrate import migrate


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str]:
    """Run a command. Return its exit code and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("module", ["flask", "flask_admin", "waitress"])
def test_without_the_extra_it_says_what_to_install(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [name for name in sys.modules if name.startswith("worker.admin")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)

    code, message = run(capsys, "admin")

    assert (code, message) == (2, f"fetch-worker: `admin` needs {module}: pip install 'fetch-worker[admin]'\n")


def test_other_commands_do_not_import_its_dependencies() -> None:
    program = (
        "import sys; from worker.cli.commands import group; list(group.commands.values()); "
        "print({'flask', 'waitress', 'worker.admin'} & set(sys.modules))"
    )

    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert process.stdout == "set()\n"


def test_without_tables_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/test.db")

    code, message = run(capsys, "admin", "--port", "0")

    assert code == 1
    assert "fetch-worker migrate" in message


def test_a_used_port_is_reported_with_the_settings_to_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/test.db")
    engine = make_engine(Settings(database_url=f"sqlite:///{tmp_path}/test.db").database)
    migrate(engine)
    engine.dispose()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setenv("ADMIN_PORT", str(port))

        code, message = run(capsys, "admin")

    assert code == 1
    assert message == (
        f"fetch-worker: can't listen on 127.0.0.1 port {port} (Address already in use): "
        "change ADMIN_ADDRESS or ADMIN_PORT\n"
    )


def test_given_a_served_page_when_sigterm_comes_then_it_ends_with_exit_code_0(
    migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel drops signals without a handler for process 1 of a container. An exit by the signal shows none."""
    shutil.copy(migrated_sqlite, tmp_path / "test.db")
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/test.db")
    program = [str(Path(sys.executable).with_name("fetch-worker")), "admin", "--port", "0"]
    log = tmp_path / "admin.log"
    with log.open("wb") as out, subprocess.Popen(program, stdout=out, stderr=out) as process:
        wait_until(lambda: "http://" in log.read_text(), "it serves", seen=log.read_text)
        process.send_signal(signal.SIGTERM)

        assert process.wait(30) == 0, log.read_text()
