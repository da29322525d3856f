"""The files of worker/deploy: their linters accept them, and they agree with the product."""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from ruamel.yaml import YAML  # check-jsonschema brings it
from sqlalchemy.engine import make_url

from tests.faults.pooler import SAMPLE, pgbouncer
from tests.servers import free_port, missing, postgres, redis_binary
from worker import track
from worker.cli.commands import group
from worker.launch.procfile import read_procfile
from worker.settings import KEY_NAMES, Settings, load
from worker.store.engine import SCHEMA_VERSION, make_engine
from worker.store.migrate import migrate

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "worker" / "deploy"
SYSTEMD = DEPLOY / "systemd"
BIN = Path(sys.executable).parent
INSTALLED = "/opt/fetch-worker/bin/"
PROCFILE = {line.name: line.command for line in read_procfile(ROOT / "Procfile")}
PROCESSES = ("worker", "downloads", "beat", "flower")
PAGES = {"metrics": "fetch-worker metrics --listen", "admin": "fetch-worker admin"}  # processes that only show things
WITH_KEYS = {"fetch-worker-worker@.service", "fetch-worker-up.service"}
COMMON = SYSTEMD / "fetch-worker-.service.d" / "common.conf"
UNITS = sorted(path for path in SYSTEMD.rglob("*") if path.is_file())
SERVICES = sorted(path.name for path in SYSTEMD.glob("*.service"))
TEXTS = sorted(path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix not in (".json", ".env"))
FOREIGN_VARIABLES = re.compile(r"(POSTGRES|PYTHON|PIP|AWS|MARIADB)_?[A-Z_]*|PATH|PYTHON")  # read by other programs
MAX_EXPOSURE = 20  # tenths: systemd calls up to 2 "ok", and a unit without restrictions has 96
SECURITY = "systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={MAX_EXPOSURE}"


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file that are not comments."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] not in "#;"]


def values(path: Path, name: str) -> list[str]:
    """Return all values of a name in a unit, or in the drop-in of all units."""
    return [line.partition("=")[2] for line in lines_of(path) if line.startswith(f"{name}=")]


def compose() -> dict[str, Any]:
    """Return the compose file with its references resolved."""
    document: dict[str, Any] = YAML(typ="safe").load(DEPLOY / "compose.yml")
    return document


def dockerfile_instructions() -> list[str]:
    """Return the instructions of the Dockerfile, one per line."""
    return lines_of_text((DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " "))


def lines_of_text(text: str) -> list[str]:
    """Return the lines that are not blank or comments."""
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def procfile_form(command: str) -> str:
    """Return a unit's command without its path, instance number and doubled percent signs."""
    return command.removeprefix(INSTALLED).replace("%i@", "@").replace("%%", "%")


# ── systemd ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units with the programs of this environment. systemd-analyze reports missing programs as errors."""
    if shutil.which("systemd-analyze") is None:
        missing("systemd-analyze")
    folder = tmp_path_factory.mktemp("units") / "system"
    shutil.copytree(SYSTEMD, folder)
    for path in folder.glob("*.service"):
        path.write_text(path.read_text().replace(INSTALLED, f"{BIN}/"))
    return folder


def _analyze(folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{folder}:"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.server
def test_systemd_analyze_accepts_the_units(units: Path) -> None:
    names = [f"./{name}".replace("@.", "@1.") for name in [*SERVICES, "fetch-worker.target"]]
    result = _analyze(units, "systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *names)

    assert (result.returncode, result.stderr, result.stdout) == (0, "", "")


@pytest.mark.server
@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_is_well_restricted(units: Path, name: str) -> None:
    result = _analyze(units, *SECURITY, f"./{name}".replace("@.", "@1."))

    assert result.returncode == 0, result.stdout[-200:] + result.stderr


def test_each_process_of_the_procfile_has_a_unit_with_its_command() -> None:
    commands_by_unit = {name: procfile_form(values(SYSTEMD / name, "ExecStart")[0]) for name in SERVICES}

    assert commands_by_unit.pop("fetch-worker-up.service") == "fetch-worker up"
    assert commands_by_unit.pop("fetch-worker-migrate.service") == PROCFILE["release"]
    commands = {re.split(r"[-@.]", name)[2]: command for name, command in commands_by_unit.items()}
    assert commands == {name: PROCFILE[name] for name in PROCESSES} | PAGES


def test_only_the_units_that_poll_get_the_keys() -> None:
    with_keys = {name for name in SERVICES if "/etc/fetch-worker/keys.env" in values(SYSTEMD / name, "EnvironmentFile")}

    assert with_keys == WITH_KEYS
    assert values(COMMON, "EnvironmentFile") == ["/etc/fetch-worker/fetch-worker.env"]


def test_processes_can_see_each_other_to_detect_dead_claim_holders() -> None:
    """A process that others cannot see counts as dead, and they release its claims."""
    for path in UNITS:
        assert not values(path, "ProtectProc") + values(path, "ProcSubset") + values(path, "DynamicUser"), path
        assert values(path, "User") == (["fetch-worker"] if path == COMMON else [])


@pytest.mark.parametrize("name", [name for name in SERVICES if "migrate" not in name])
def test_a_process_is_restarted_without_limit_unless_it_refuses_its_settings(name: str) -> None:
    assert values(SYSTEMD / name, "Restart") == ["always"]
    assert values(COMMON, "RestartPreventExitStatus") == ["2"]
    assert values(COMMON, "StartLimitIntervalSec") == ["0"]
    assert values(COMMON, "KillMode") == ["mixed"]
    assert values(SYSTEMD / name, "TimeoutStopSec"), "long enough for a clean stop"


# ── image and compose ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_hadolint_accepts_the_dockerfile() -> None:
    result = subprocess.run(
        [BIN / "hadolint", "--failure-threshold", "style", DEPLOY / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (result.returncode, result.stdout) == (0, "")


def test_the_compose_file_follows_its_specification() -> None:
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stdout + result.stderr


def test_each_process_of_the_procfile_has_a_container_with_its_command() -> None:
    services = compose()["services"]

    assert {name: services[name]["command"] for name in PROCESSES} == {name: PROCFILE[name] for name in PROCESSES}
    assert {name: shlex.join(services[name]["command"]) for name in PAGES} == PAGES
    assert shlex.join(services["migrate"]["command"]) == PROCFILE["release"]


def test_only_the_container_that_polls_gets_the_keys() -> None:
    services = compose()["services"]

    assert [name for name, service in services.items() if "keys.env" in service.get("env_file", [])] == ["worker"]


def test_every_process_waits_for_the_tables_and_has_time_to_stop() -> None:
    services = compose()["services"]

    for name in (*PROCESSES, *PAGES):
        assert services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        assert services[name]["stop_grace_period"]
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_the_broker_never_evicts_data() -> None:
    assert shlex.join(compose()["services"]["redis"]["command"]).endswith("--maxmemory-policy noeviction")


def test_ports_are_only_open_on_this_host() -> None:
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    for name in ("pgbouncer.ini", "valkey.conf"):
        (address,) = re.findall(r"^(?:listen_addr =|bind) (.+)$", (DEPLOY / name).read_text(), re.MULTILINE)
        assert address == "127.0.0.1"


def test_every_environment_file_has_an_example_and_none_is_shipped() -> None:
    expected = {name for service in compose()["services"].values() for name in service.get("env_file", [])}
    expected |= {Path(name).name for path in UNITS for name in values(path, "EnvironmentFile")}
    git, docker = ((ROOT / name).read_text().splitlines() for name in (".gitignore", ".dockerignore"))

    assert expected == {path.name.removesuffix(".example") for path in DEPLOY.glob("*.example")}
    assert "worker/deploy/*.env" in git
    assert "worker/deploy/*.env" in docker


def test_the_image_is_built_from_the_copied_files_and_contains_the_whole_wheel(tmp_path: Path) -> None:
    """Both .dockerignore and the COPY instructions are allow-lists, so a missing file is found here."""
    allowed = {line.removeprefix("!/") for line in lines_of(ROOT / ".dockerignore") if line.startswith("!/")}
    copied = [
        line.split()[1:-1] for line in dockerfile_instructions() if line.startswith("COPY ") and "--from" not in line
    ]
    names = {name.rstrip("/") for arguments in copied for name in arguments}
    for name in names:
        source, target = ROOT / name, tmp_path / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, ignore=_ignored) if source.is_dir() else shutil.copy(source, target)

    assert names == allowed
    from_checkout, from_copies = (
        _wheel(folder, tmp_path / name) for folder, name in ((ROOT, "all"), (tmp_path / "src", "some"))
    )
    assert from_copies == from_checkout
    assert {path.relative_to(ROOT).as_posix() for path in TEXTS} <= from_checkout


def _ignored(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name == "__pycache__" or fnmatch.fnmatch(name, "*.env")}


def _wheel(source: Path, target: Path) -> set[str]:
    target.mkdir()
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", target], cwd=source, check=True)
    (built,) = target.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_image_does_not_run_as_root_and_receives_signals_directly() -> None:
    instructions = [line.split(maxsplit=1) for line in dockerfile_instructions()]
    values_by_name = dict(instructions)

    assert values_by_name["USER"] == "10001:10001"
    assert values_by_name["STOPSIGNAL"] == "SIGTERM"
    assert values_by_name["CMD"] == '["fetch-worker", "up"]'
    assert values_by_name["HEALTHCHECK"].endswith('CMD ["fetch-worker", "doctor", "--liveness"]')
    assert all("${PYTHON}-slim-" in value for name, value in instructions if name == "FROM")
    (install_command,) = (value for name, value in instructions if name == "RUN" and "requirements.lock" in value)
    assert "--require-hashes" in install_command


# ── all files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def commands() -> set[str]:
    """Return every command line in the units, the compose file and the Dockerfile."""
    from_units = {procfile_form(values(SYSTEMD / name, "ExecStart")[0]) for name in SERVICES}
    from_compose = {
        service["command"] if isinstance(service["command"], str) else shlex.join(service["command"])
        for service in compose()["services"].values()
        if service["image"] == "fetch-worker"
    }
    lists = re.findall(r"CMD \[(.+)\]", (DEPLOY / "Dockerfile").read_text())
    return from_units | from_compose | {" ".join(re.findall(r'"([^"]+)"', quoted)) for quoted in lists}


@pytest.mark.parametrize("command", sorted(line for line in commands() if line.startswith("fetch-worker ")))
def test_our_commands_exist(command: str) -> None:
    _, name, *arguments = command.split()

    group.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("command", sorted(line for line in commands() if line.startswith("celery ")))
def test_celery_commands_exist(command: str) -> None:
    arguments = [str(BIN / "celery"), *command.split()[1:], "--help"]
    result = subprocess.run(
        arguments, env=os.environ | {"FLOWER_PORT": "0"}, capture_output=True, text=True, check=False
    )

    assert (result.returncode, result.stdout[:6]) == (0, "Usage:"), result.stderr


def test_there_are_no_other_commands() -> None:
    assert {line.split()[0] for line in commands()} == {"celery", "fetch-worker"}
    assert len(commands()) == len(PROCFILE) + len(PAGES) + 2


def test_every_variable_is_a_setting_or_belongs_to_another_program() -> None:
    settings = {name.upper() for name in Settings.model_fields}
    services = compose()["services"].values()
    names = {name for service in services for name in service.get("environment", {})}
    for path in DEPLOY.glob("*.example"):
        names |= set(re.findall(r"^(?:# )?([A-Z_]+)=", path.read_text(), re.MULTILINE))
    for path in UNITS:
        names |= {value.partition("=")[0] for value in values(path, "Environment")}
    names |= set(
        re.findall(
            r"\b([A-Z_]+)=", "\n".join(line for line in dockerfile_instructions() if line.startswith(("ENV", "ARG")))
        )
    )

    assert {name for name in names - settings if not FOREIGN_VARIABLES.fullmatch(name)} == set()
    assert {"DATABASE_URL", "REDIS_URL", "SD_API_KEY", "FLOWER_ADDRESS"} <= names


@pytest.mark.parametrize("name", ["fetch-worker.env", "compose.env", "keys.env"])
def test_an_example_can_be_used_unchanged_and_has_no_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(DEPLOY / f"{name}.example")
    for line in lines:
        variable, _, value = line.partition("=")
        assert not value or variable not in (*KEY_NAMES, "FLOWER_BASIC_AUTH", "ADMIN_PASSWORD"), variable
        assert not {'"', "'", " "} & set(value)
        monkeypatch.setenv(variable, value)

    assert lines
    assert load().secret_texts == ()


def test_no_file_names_a_package_registry() -> None:
    registries = re.compile(r"pypi|pythonhosted|index-url|trusted-host|docker\.io|ghcr\.io|quay\.io|npmjs|mcr\.", re.I)

    assert [path.name for path in TEXTS if registries.search(path.read_text(encoding="utf-8"))] == []


def test_the_readme_lists_every_file() -> None:
    guide = (DEPLOY / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in DEPLOY.iterdir() if path.is_file() and path.suffix != ".env"} - {"README.md"}

    assert {name for name in names if f"`{name}`" not in guide and f"]({name})" not in guide} == set()
    assert set(re.findall(r"`(?:worker/deploy/)?([a-z-]+\.(?:conf|ini|yml|example))`", guide)) <= names


# ── server configurations ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.server
def test_with_the_pgbouncer_configuration_tables_are_created_and_jobs_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(postgres(tmp_path / "postgres"))
        pooled = stack.enter_context(pgbouncer(url, tmp_path / "pgbouncer", sample=SAMPLE))
        monkeypatch.setenv("DATABASE_URL", pooled.url)
        engine = make_engine(make_url(pooled.url))
        stack.callback(engine.dispose)

        assert migrate(engine)[1] == SCHEMA_VERSION
        assert [track("12202888"), track("12202888")] == [1, 1]
        assert pooled.clients() >= 1


@pytest.mark.server
def test_postgresql_knows_every_parameter_of_our_configuration(tmp_path: Path) -> None:
    sample = dict(line.split(" = ") for line in lines_of(DEPLOY / "postgresql.conf"))
    with postgres(tmp_path / "postgres") as url, psycopg.connect(url) as connection:
        rows = connection.execute("SELECT name, vartype, enumvals, unit FROM pg_settings").fetchall()
    parameters = {row[0]: row[1:] for row in rows}

    assert sample["synchronous_commit"] == sample["fsync"] == "on"
    for name, value in sample.items():
        kind, choices, unit = parameters[name]
        if kind in ("bool", "enum"):
            assert value in (choices or ["on", "off"])
        elif kind == "integer" and unit is not None and name[:3] != "tcp":
            assert re.fullmatch(r"\d+(GB|MB|min|s)", value), f"{name}: the unit is missing"
        else:
            assert float(value) >= 0


@pytest.mark.server
def test_the_valkey_configuration_starts_a_server_that_evicts_nothing(tmp_path: Path) -> None:
    port = free_port()
    command = [redis_binary(), str(DEPLOY / "valkey.conf"), "--port", str(port), "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server, redis.Redis(port=port) as client:
        try:
            client.set_retry(redis.retry.Retry(redis.backoff.ConstantBackoff(0.1), 100))
            assert client.info("server")["process_id"] == server.pid
            config = client.config_get("maxmemory", "maxmemory-policy", "save", "appendonly")
            assert set(config.values()) == {"268435456", "noeviction", "", "no"}
        finally:
            server.terminate()
