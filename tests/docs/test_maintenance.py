"""The page Maintenance does what it says: each of its examples runs, on real servers, while a real worker runs."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psycopg
import pytest
import redis
from sqlalchemy import Engine, func, inspect, select, text
from sqlalchemy.engine import URL, make_url

from tests import servers
from tests.docs.manual import PAGES, blocks, section
from tests.faults.servers import PATIENCE, running_redis
from tests.servers import celery_worker, missing
from tests.waiting import wait_until
from worker import hold, resume, track
from worker.client.connection import loaded_settings
from worker.sandbox import Sandbox, SandboxOptions
from worker.settings import load
from worker.store.engine import close_engines, make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs, metadata

PAGE = PAGES["maintenance"]
KEY, NEW_KEY = "the-key-of-the-account", "the-next-key-of-the-account"
QUEUES = ("--queues", "fetch-worker,fetch-worker.polls,fetch-worker.downloads")
PROGRAMS = {"postgresql": "pg_dump", "mariadb": "mariadb-dump", "sqlite": "sqlite3"}
JOBS = 8


def example(title: str, containing: str, language: str = "sh") -> str:
    """Return the example of a section that contains this text."""
    return next(block for block in blocks(language, section(title, PAGE)) if containing in block)


def lines_with(block: str, *parts: str) -> str:
    """Return the lines of an example that contain one of these texts."""
    return "\n".join(line for line in block.splitlines() if any(part in line for part in parts))


def shell(script: str, folder: Path, **variables: str) -> str:
    """Run an example in `folder`, with its absolute paths below that folder. Fail if a line of it fails."""
    for path in ("/srv/outputs", "/backup"):
        script = script.replace(path, f"{folder}{path}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        ["sh", "-eu", "-c", script],
        cwd=folder, env=os.environ | {"PATH": path} | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout


def count(engine: Engine, status: str) -> int:
    """Return the number of jobs in this state."""
    with engine.connect() as connection:
        return int(connection.execute(select(func.count()).where(jobs.c.status == status)).scalar_one())


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redis_url: str) -> Iterator[Sandbox]:
    """A stand-in of the API, and the settings of a worker that uses it."""
    (tmp_path / "srv" / "outputs").mkdir(parents=True)
    (tmp_path / "backup").mkdir()
    with Sandbox(SandboxOptions(key=KEY, min_seconds=0.2, max_seconds=1.0, size=32)) as sandbox:
        for name, value in {
            "SD_API_URL": sandbox.url, "SD_API_KEY": KEY, "SD_API_RPS": "50", "POLL_MIN": "0.2",
            "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8", "REDIS_URL": redis_url,
            "STORAGE_URL": f"file:{tmp_path}/srv/outputs",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        yield sandbox


# ── backup and restore ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def sqlite_file(folder: Path) -> Iterator[str]:
    """Provide the URL of `var/worker.db`, after the page's advice to delete what belongs to the old file."""
    (folder / "var").mkdir(exist_ok=True)
    for path in (folder / "var").glob("worker.db*"):
        path.unlink()
    yield f"sqlite:///{folder}/var/worker.db"


def database(kind: str, folder: Path) -> AbstractContextManager[str]:
    """Provide a new database of a kind."""
    if shutil.which(PROGRAMS[kind]) is None or shutil.which("rsync") is None:
        missing(f"{PROGRAMS[kind]} and rsync")
    kinds: dict[str, Callable[[], AbstractContextManager[str]]] = {
        "postgresql": lambda: servers.postgres(folder / "postgres"),
        "mariadb": servers.mariadb,
        "sqlite": lambda: sqlite_file(folder),
    }
    return kinds[kind]()


def backup_lines(kind: str, url: URL) -> tuple[str, str]:
    """Return what the page says for a kind of database: the lines of the backup, and of the restore."""
    copy = example("Back up", "rsync")
    back = example("Restore", "rsync")
    if kind == "postgresql":
        return copy, back
    program, restore = ("mariadb-dump", "mariadb app") if kind == "mariadb" else ("sqlite3", "worker.db")
    dump = lines_with(example("Back up", "mariadb-dump"), program)
    load = lines_with(example("Restore", "mariadb app"), restore)
    checks = lines_with(back, "fetch-worker migrate", "verify")
    copied = "\n".join([dump, lines_with(copy, "rsync")])
    restored = "\n".join([lines_with(back, "rsync"), load, checks])
    server = f"--host={url.host} --port={url.port or 3306} --user={url.username} {url.database}"
    return copied.replace(" app", f" {server}"), restored.replace(" app", f" {server}")


def files(outputs: Path) -> set[Path]:
    """Return the stored files, relative to their directory."""
    return {path.relative_to(outputs) for path in outputs.rglob("*.png")}


@pytest.mark.server
@pytest.mark.parametrize("kind", PROGRAMS)
def test_given_a_backup_of_a_running_worker_when_it_is_restored_then_every_output_is_whole_and_the_rest_is_done_again(
    kind: str, api: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = tmp_path / "srv" / "outputs"
    with database(kind, tmp_path) as url:
        monkeypatch.setenv("DATABASE_URL", url)
        engine = make_engine(load().database)
        migrate(engine)
        ids = [track(api.submit(f"picture {number}")) for number in range(JOBS)]
        later = ids[JOBS // 2 :]
        assert all(hold(job_id) for job_id in later)
        dump, copy = backup_lines(kind, make_url(url))[0].splitlines()
        with celery_worker(tmp_path, *QUEUES):
            wait_until(lambda: count(engine, "completed") == JOBS // 2, "one half is completed", PATIENCE)
            shell(dump, tmp_path)
            assert all(resume(job_id) for job_id in later)
            wait_until(lambda: count(engine, "completed") == JOBS, "all are completed", PATIENCE)
            shell(copy, tmp_path)
        engine.dispose()
        close_engines()  # as an app that is stopped
    before = files(outputs)
    shutil.rmtree(outputs)
    outputs.mkdir()

    with database(kind, tmp_path) as url:
        monkeypatch.setenv("DATABASE_URL", url)
        loaded_settings.cache_clear()
        shell(backup_lines(kind, make_url(url))[1], tmp_path)
        engine = make_engine(load().database)
        report = json.loads(shell("fetch-worker verify --dry-run --json", tmp_path))
        assert (report["wrong"], report["whole"]) == ([], report["checked"])
        assert len(report["orphans"]) == len(before) - report["whole"] > 0, "files that were stored after the dump"
        assert all(resume(job_id) for job_id in later)
        with celery_worker(tmp_path, *QUEUES):
            wait_until(lambda: count(engine, "completed") == JOBS, "all are completed again", PATIENCE)
        report = json.loads(shell("fetch-worker verify --json", tmp_path))
        engine.dispose()

    assert (report["wrong"], report["orphans"], report["kept"]) == ([], [], [])
    assert files(outputs) == before


@pytest.mark.server
def test_after_a_restore_on_postgresql_ids_can_be_skipped(migrated_postgres: Engine) -> None:
    (statement,) = [code for code in section("Restore", PAGE).split("`") if code.startswith("SELECT setval")]
    with migrated_postgres.begin() as connection:
        if connection.execute(select(func.count()).select_from(jobs)).scalar_one() == 0:
            connection.execute(text("SELECT nextval('fetch_jobs_id_seq')"))
        before = connection.execute(text("SELECT last_value FROM fetch_jobs_id_seq")).scalar_one()
        connection.exec_driver_sql(statement.replace("max(id)", "coalesce(max(id), 1)"))
        assert connection.execute(text("SELECT nextval('fetch_jobs_id_seq')")).scalar_one() >= 1_000_000 >= before
        connection.rollback()


# ── secrets ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.server
def test_given_a_new_key_at_the_api_when_the_key_file_is_replaced_then_the_same_worker_goes_on(
    api: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"default": KEY}))
    monkeypatch.setenv("SD_API_KEYS_FILE", str(file))
    monkeypatch.delenv("SD_API_KEY")
    with sqlite_file(tmp_path) as url:
        monkeypatch.setenv("DATABASE_URL", url)
        engine = make_engine(load().database)
        migrate(engine)
        with celery_worker(tmp_path, *QUEUES) as process:
            track(api.submit("before"))
            wait_until(lambda: count(engine, "completed") == 1, "the first is completed", PATIENCE)
            api.options_now(key=NEW_KEY)  # the old one ends too early
            track(api.submit("after"))
            wait_until(
                lambda: "key rejected" in shell("fetch-worker status --json", tmp_path), "the account is held", PATIENCE
            )
            (tmp_path / "keys.new").write_text(json.dumps({"default": NEW_KEY}))
            shell("mv keys.new keys.json", tmp_path)

            wait_until(lambda: count(engine, "completed") == 2, "the second is completed", PATIENCE)
            assert process.poll() is None
        engine.dispose()


@pytest.mark.server
def test_given_two_logins_when_the_first_one_ends_then_the_second_one_acts_as_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = f"fetch_worker_test_{secrets.token_hex(4)}"
    (end,) = [code for code in section("Change a secret", PAGE).split("`") if "NOLOGIN" in code]
    statements = (example("Change a secret", "CREATE ROLE", "sql") + end).replace("fetch_worker", first)
    with servers.postgres(tmp_path / "postgres") as url, psycopg.connect(url, autocommit=True) as server:
        server.execute(f"CREATE ROLE {first} LOGIN PASSWORD 'OLD'".encode())
        server.execute(f"GRANT CREATE ON SCHEMA public TO {first}".encode())
        server.execute(statements.encode())
        try:
            second = make_url(url).set(username=f"{first}_2", password="NEW").render_as_string(hide_password=False)
            monkeypatch.setenv("DATABASE_URL", second)
            shell("fetch-worker migrate", tmp_path)
            assert track("12202888") > 0
            owners = server.execute("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'").fetchall()
            assert owners == [(first,)]
        finally:
            server.execute(f"DROP OWNED BY {first}, {first}_2".encode())
            server.execute(f"DROP ROLE {first}_2, {first}".encode())


def test_given_two_redis_passwords_when_the_old_one_is_removed_then_the_new_one_works(tmp_path: Path) -> None:
    codes = [code for code in section("Change a secret", PAGE).split("`") if code.startswith("ACL SETUSER")]
    with running_redis(tmp_path / "redis") as server:
        server.execute("CONFIG", "SET", "requirepass", "OLD")
        server.password = "OLD"
        server.execute(*codes[0].split())
        for password in ("OLD", "NEW"):
            with redis.Redis(port=server.port, password=password) as client:
                assert client.ping()
        server.password = "NEW"
        server.execute(*codes[1].split())
        with redis.Redis(port=server.port, password="OLD") as client, pytest.raises(redis.AuthenticationError):
            client.ping()


# ── removal ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_when_the_tables_are_dropped_then_nothing_of_ours_is_left(empty: Engine) -> None:
    migrate(empty)
    with empty.begin() as connection:
        connection.execute(text("CREATE TABLE fetchers (id INTEGER PRIMARY KEY)"))
    statements = example("Remove fetch-worker", "DROP TABLE", "sql").split(";")
    with empty.begin() as connection:
        for statement in statements:
            if statement.strip():
                connection.exec_driver_sql(statement)

    assert inspect(empty).get_table_names() == ["fetchers"]
    assert len(statements) - 1 == len(metadata.tables) + 1  # and Alembic's version table


@pytest.mark.server
def test_when_a_shared_redis_is_cleaned_then_only_our_keys_are_gone(
    api: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("redis-cli") is None:
        missing("redis-cli")
    with running_redis(tmp_path / "redis") as server, sqlite_file(tmp_path) as url:
        monkeypatch.setenv("REDIS_URL", server.url)
        monkeypatch.setenv("DATABASE_URL", url)
        engine = make_engine(load().database)
        migrate(engine)
        track(api.submit("a picture"))
        with celery_worker(tmp_path, *QUEUES):
            wait_until(lambda: count(engine, "completed") == 1, "it is completed", PATIENCE)
        engine.dispose()
        with server.client as client:
            client.set("shop.basket", "1")
            keys = set(client.keys())
            assert any(b"fetch-worker" in key for key in keys)
            shell(lines_with(example("Remove fetch-worker", "redis-cli"), "--scan"), tmp_path, REDIS_URL=server.url)

            left = set(client.keys())
            assert left == {key for key in keys if b"fetch-worker" not in key}
            assert b"shop.basket" in left
            shell(lines_with(example("Remove fetch-worker", "redis-cli"), "FLUSHDB"), tmp_path, REDIS_URL=server.url)
            assert client.keys() == []
