"""How it is deployed: the files of worker/deploy are what their own linters accept, and agree with the product."""

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
from worker.launch.supervisor import read_procfile
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
KEYED = {"fetch-worker-worker@.service", "fetch-worker-up.service"}
COMMON = SYSTEMD / "fetch-worker-.service.d" / "common.conf"
UNITS = sorted(path for path in SYSTEMD.rglob("*") if path.is_file())
SERVICES = sorted(path.name for path in SYSTEMD.glob("*.service"))
TEXTS = sorted(path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix not in (".json", ".env"))
OTHERS = re.compile(r"(POSTGRES|PYTHON|PIP|AWS|MARIADB)_?[A-Z_]*|PATH|PYTHON")  # names of variables that others read
MOST_EXPOSED = 20  # tenths: systemd calls up to 2 "ok", and a unit without any of it has 96
SECURITY = "systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={MOST_EXPOSED}"


def lines_of(path: Path) -> list[str]:
    """The lines of a file that are no comments."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] not in "#;"]


def values(path: Path, name: str) -> list[str]:
    """What a unit, or the drop-in of all units, says of a name, as often as it does."""
    return [line.partition("=")[2] for line in lines_of(path) if line.startswith(f"{name}=")]


def compose() -> dict[str, Any]:
    """The compose file, with what it repeats by reference."""
    read: dict[str, Any] = YAML(typ="safe").load(DEPLOY / "compose.yml")
    return read


def image() -> list[str]:
    """The instructions of the Dockerfile, one a line."""
    return lines_of_text((DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " "))


def lines_of_text(text: str) -> list[str]:
    """Lines without comments and blank ones."""
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def as_in_the_procfile(command: str) -> str:
    """A unit's command without what only a unit has: a path, the number of the process, doubled percent signs."""
    return command.removeprefix(INSTALLED).replace("%i@", "@").replace("%%", "%")


# ── systemd ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units, with the programs of this environment: a unit whose program is not there is no good one."""
    if shutil.which("systemd-analyze") is None:
        missing("systemd-analyze")
    folder = tmp_path_factory.mktemp("units") / "system"
    shutil.copytree(SYSTEMD, folder)
    for path in folder.glob("*.service"):
        path.write_text(path.read_text().replace(INSTALLED, f"{BIN}/"))
    return folder


def _analyze(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    own = os.environ | {"SYSTEMD_UNIT_PATH": f"{folder}:"}
    return subprocess.run(words, cwd=folder, env=own, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.server
def test_systemd_finds_nothing_to_say_about_the_units(units: Path) -> None:
    names = [f"./{name}".replace("@.", "@1.") for name in [*SERVICES, "fetch-worker.target"]]
    said = _analyze(units, "systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *names)

    assert (said.returncode, said.stderr, said.stdout) == (0, "", "")


@pytest.mark.server
@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_is_shut_in_well(units: Path, name: str) -> None:
    said = _analyze(units, *SECURITY, f"./{name}".replace("@.", "@1."))

    assert said.returncode == 0, said.stdout[-200:] + said.stderr


def test_each_process_of_the_procfile_has_a_unit_that_runs_its_line() -> None:
    found = {name: as_in_the_procfile(values(SYSTEMD / name, "ExecStart")[0]) for name in SERVICES}

    assert found.pop("fetch-worker-up.service") == "fetch-worker up"
    assert found.pop("fetch-worker-migrate.service") == PROCFILE["release"]
    named = {name.removeprefix("fetch-worker-").removesuffix(".service").rstrip("@") for name in found}
    assert named == set(PROCESSES)
    assert all(line == PROCFILE[re.split(r"[-@.]", name)[2]] for name, line in found.items())


def test_only_the_processes_that_poll_are_given_the_keys() -> None:
    read = {name for name in SERVICES if "/etc/fetch-worker/keys.env" in values(SYSTEMD / name, "EnvironmentFile")}

    assert read == KEYED
    assert values(COMMON, "EnvironmentFile") == ["/etc/fetch-worker/fetch-worker.env"]


def test_processes_see_one_another_since_they_tell_the_dead_by_it() -> None:
    """A process that is not seen is taken for dead, and what it holds is given to others."""
    for path in UNITS:
        assert not values(path, "ProtectProc") + values(path, "ProcSubset") + values(path, "DynamicUser"), path
        assert values(path, "User") == (["fetch-worker"] if path == COMMON else [])


@pytest.mark.parametrize("name", [name for name in SERVICES if "migrate" not in name])
def test_a_process_that_dies_is_started_again_for_ever_and_one_that_refuses_its_settings_is_not(name: str) -> None:
    assert values(SYSTEMD / name, "Restart") == ["always"]
    assert values(COMMON, "RestartPreventExitStatus") == ["2"]
    assert values(COMMON, "StartLimitIntervalSec") == ["0"]
    assert values(COMMON, "KillMode") == ["mixed"]
    assert values(SYSTEMD / name, "TimeoutStopSec"), "as long as a polite stop takes"


# ── image and compose ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_hadolint_finds_nothing_to_say_about_the_dockerfile() -> None:
    said = subprocess.run(
        [BIN / "hadolint", "--failure-threshold", "style", DEPLOY / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (said.returncode, said.stdout) == (0, "")


def test_the_compose_file_is_one_by_its_specification() -> None:
    words = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yml")]
    said = subprocess.run(words, capture_output=True, text=True, check=False)

    assert said.returncode == 0, said.stdout + said.stderr


def test_each_process_of_the_procfile_has_a_container_that_runs_its_line() -> None:
    services = compose()["services"]

    assert {name: services[name]["command"] for name in PROCESSES} == {name: PROCFILE[name] for name in PROCESSES}
    assert shlex.join(services["migrate"]["command"]) == PROCFILE["release"]


def test_only_the_container_that_polls_is_given_the_keys() -> None:
    services = compose()["services"]

    assert [name for name, one in services.items() if "keys.env" in one.get("env_file", [])] == ["worker"]


def test_every_process_waits_for_the_tables_and_is_given_time_to_end() -> None:
    services = compose()["services"]

    for name in PROCESSES:
        assert services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        assert services[name]["stop_grace_period"]
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_the_broker_never_evicts() -> None:
    assert shlex.join(compose()["services"]["redis"]["command"]).endswith("--maxmemory-policy noeviction")


def test_ports_are_open_on_this_machine_alone() -> None:
    ports = [port for one in compose()["services"].values() for port in one.get("ports", [])]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    for name in ("pgbouncer.ini", "valkey.conf"):
        (listens,) = re.findall(r"^(?:listen_addr =|bind) (.+)$", (DEPLOY / name).read_text(), re.MULTILINE)
        assert listens == "127.0.0.1"


def test_every_file_of_variables_has_an_example_and_none_is_shipped() -> None:
    wanted = {name for one in compose()["services"].values() for name in one.get("env_file", [])}
    wanted |= {Path(name).name for path in UNITS for name in values(path, "EnvironmentFile")}
    git, docker = ((ROOT / name).read_text().splitlines() for name in (".gitignore", ".dockerignore"))

    assert wanted == {path.name.removesuffix(".example") for path in DEPLOY.glob("*.example")}
    assert "worker/deploy/*.env" in git
    assert "worker/deploy/*.env" in docker


def test_the_image_is_made_from_what_it_copies_and_holds_all_that_the_wheel_does(tmp_path: Path) -> None:
    """The build's context is an allow-list, and the build takes still less of it: a file that is missing shows here."""
    allowed = {line.removeprefix("!/") for line in lines_of(ROOT / ".dockerignore") if line.startswith("!/")}
    copied = [line.split()[1:-1] for line in image() if line.startswith("COPY ") and "--from" not in line]
    names = {name.rstrip("/") for words in copied for name in words}
    for name in names:
        source, target = ROOT / name, tmp_path / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, ignore=_ignored) if source.is_dir() else shutil.copy(source, target)

    assert names == allowed
    whole, made = (_wheel(folder, tmp_path / name) for folder, name in ((ROOT, "all"), (tmp_path / "src", "some")))
    assert made == whole
    assert {path.relative_to(ROOT).as_posix() for path in TEXTS} <= whole


def _ignored(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name == "__pycache__" or fnmatch.fnmatch(name, "*.env")}


def _wheel(source: Path, target: Path) -> set[str]:
    target.mkdir()
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", target], cwd=source, check=True)
    (built,) = target.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_image_runs_as_nobody_in_particular_and_takes_signals_itself() -> None:
    words = [line.split(maxsplit=1) for line in image()]
    said = dict(words)

    assert said["USER"] == "10001:10001"
    assert said["STOPSIGNAL"] == "SIGTERM"
    assert said["CMD"] == '["fetch-worker", "up"]'
    assert said["HEALTHCHECK"].endswith('CMD ["fetch-worker", "doctor", "--liveness"]')
    assert all("${PYTHON}-slim-" in what for name, what in words if name == "FROM")
    (install,) = (what for name, what in words if name == "RUN" and "requirements.lock" in what)
    assert "--require-hashes" in install


# ── what all of them say ──────────────────────────────────────────────────────────────────────────────────────────────


def commands() -> set[str]:
    """Every command line that something starts."""
    from_units = {as_in_the_procfile(values(SYSTEMD / name, "ExecStart")[0]) for name in SERVICES}
    from_compose = {
        one["command"] if isinstance(one["command"], str) else shlex.join(one["command"])
        for one in compose()["services"].values()
        if one["image"] == "fetch-worker"
    }
    lists = re.findall(r"CMD \[(.+)\]", (DEPLOY / "Dockerfile").read_text())
    return from_units | from_compose | {" ".join(re.findall(r'"([^"]+)"', words)) for words in lists}


@pytest.mark.parametrize("command", sorted(line for line in commands() if line.startswith("fetch-worker ")))
def test_a_command_of_ours_is_one(command: str) -> None:
    _, name, *words = command.split()

    group.commands[name].make_context(name, words)


@pytest.mark.parametrize("command", sorted(line for line in commands() if line.startswith("celery ")))
def test_a_command_of_celery_is_one(command: str) -> None:
    words = [str(BIN / "celery"), *command.split()[1:], "--help"]
    said = subprocess.run(words, env=os.environ | {"FLOWER_PORT": "0"}, capture_output=True, text=True, check=False)

    assert (said.returncode, said.stdout[:6]) == (0, "Usage:"), said.stderr


def test_there_is_no_other_command() -> None:
    assert {line.split()[0] for line in commands()} == {"celery", "fetch-worker"}
    assert len(commands()) == len(PROCFILE) + 2


def test_every_variable_is_a_setting_or_belongs_to_another_program() -> None:
    known = {name.upper() for name in Settings.model_fields}
    services = compose()["services"].values()
    named = {name for one in services for name in one.get("environment", {})}
    for path in DEPLOY.glob("*.example"):
        named |= set(re.findall(r"^(?:# )?([A-Z_]+)=", path.read_text(), re.MULTILINE))
    for path in UNITS:
        named |= {value.partition("=")[0] for value in values(path, "Environment")}
    named |= set(re.findall(r"\b([A-Z_]+)=", "\n".join(line for line in image() if line.startswith(("ENV", "ARG")))))

    assert {name for name in named - known if not OTHERS.fullmatch(name)} == set()
    assert {"DATABASE_URL", "REDIS_URL", "SD_API_KEY", "FLOWER_ADDRESS"} <= named


@pytest.mark.parametrize("name", ["fetch-worker.env", "compose.env", "keys.env"])
def test_an_example_is_taken_as_it_stands_and_holds_no_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(DEPLOY / f"{name}.example")
    for line in lines:
        variable, _, value = line.partition("=")
        assert not value or variable not in (*KEY_NAMES, "FLOWER_BASIC_AUTH"), variable
        assert not {'"', "'", " "} & set(value)
        monkeypatch.setenv(variable, value)

    assert lines
    assert load().secret_texts == ()


def test_no_file_names_a_registry_of_packages() -> None:
    registries = re.compile(r"pypi|pythonhosted|index-url|trusted-host|docker\.io|ghcr\.io|quay\.io|npmjs|mcr\.", re.I)

    assert [path.name for path in TEXTS if registries.search(path.read_text(encoding="utf-8"))] == []


def test_the_guide_names_every_file() -> None:
    guide = (DEPLOY / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in DEPLOY.iterdir() if path.is_file() and path.suffix != ".env"} - {"README.md"}

    assert {name for name in names if f"`{name}`" not in guide and f"]({name})" not in guide} == set()
    assert set(re.findall(r"`(?:worker/deploy/)?([a-z-]+\.(?:conf|ini|yml|example))`", guide)) <= names


# ── samples for servers ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.server
def test_the_sample_of_pgbouncer_lets_tables_be_made_and_jobs_be_tracked(
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
def test_postgresql_knows_every_name_of_the_sample_and_what_it_is_set_to(tmp_path: Path) -> None:
    said = dict(line.split(" = ") for line in lines_of(DEPLOY / "postgresql.conf"))
    with postgres(tmp_path / "postgres") as url, psycopg.connect(url) as connection:
        rows = connection.execute("SELECT name, vartype, enumvals, unit FROM pg_settings").fetchall()
    known = {row[0]: row[1:] for row in rows}

    assert said["synchronous_commit"] == said["fsync"] == "on"
    for name, value in said.items():
        kind, choices, unit = known[name]
        if kind in ("bool", "enum"):
            assert value in (choices or ["on", "off"])
        elif kind == "integer" and unit is not None and name[:3] != "tcp":
            assert re.fullmatch(r"\d+(GB|MB|min|s)", value), f"{name}: a number without its unit is a riddle"
        else:
            assert float(value) >= 0


@pytest.mark.server
def test_the_sample_of_valkey_starts_a_server_that_keeps_all_and_evicts_nothing(tmp_path: Path) -> None:
    port = free_port()
    words = [redis_binary(), str(DEPLOY / "valkey.conf"), "--port", str(port), "--dir", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as server, redis.Redis(port=port) as client:
        try:
            client.set_retry(redis.retry.Retry(redis.backoff.ConstantBackoff(0.1), 100))
            assert client.info("server")["process_id"] == server.pid
            kept = client.config_get("maxmemory", "maxmemory-policy", "save", "appendonly")
            assert set(kept.values()) == {"268435456", "noeviction", "", "no"}
        finally:
            server.terminate()
