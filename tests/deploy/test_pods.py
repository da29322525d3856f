"""The pods of the Kubernetes manifests run as a node runs them, and survive an outage of their servers.

No cluster is needed: namespaces of Linux give each process what its pod has. It is process 1, its root file system is
read-only, its user is unknown to the system and has no home, and its environment comes from the manifests alone.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select

from tests.deploy.manifests import Document, container, of_kind, pods
from tests.faults.proxy import Proxy, running_proxy
from tests.faults.servers import KEY, PATIENCE, children, running_redis, tail
from tests.servers import free_port, missing
from tests.waiting import wait_until
from worker import track
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.schema import jobs

BIN = Path(sys.executable).parent
UID = 1_234_567  # no user of this machine, as OpenShift chooses them
OUTAGE_SECONDS = 45.0  # longer than RECOVERY_SECONDS, after which a stalled process would end itself
IMAGE = {"PATH": f"{BIN}:/usr/bin:/bin", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": "/srv/tmp"}
# Empty volumes hide what the machine has at their places; the one at /tmp is at /srv/tmp. The user may read all files,
# because a checkout may be in a directory of root, and write to none of them.
AS_IN_A_POD = """
mount -t tmpfs -o mode=755 tmpfs /srv && mkdir /srv/outputs /srv/keys && mkdir -m 1777 /srv/tmp
mount --bind {volumes}/outputs /srv/outputs && mount --bind {volumes}/keys /srv/keys
mount -t tmpfs -o mode=755 tmpfs /var/lib && mkdir -m 0777 /var/lib/fetch-worker
mount -o remount,bind,ro /
cd /var/lib/fetch-worker
exec setpriv --reuid {uid} --regid {uid} --clear-groups --no-new-privs --securebits +no_setuid_fixup \
  --bounding-set -all,+dac_read_search --inh-caps -all,+dac_read_search --ambient-caps -all,+dac_read_search \
  env -i {variables} {command}
"""


@dataclass(frozen=True)
class Servers:
    """What the pods use, with proxies in front of the database and Redis."""

    engine: Engine
    proxies: tuple[Proxy, ...]
    variables: Mapping[str, str]
    volumes: Path

    def away(self) -> None:
        for proxy in self.proxies:
            proxy.mode = "refuse"
            proxy.cut_all()

    def back(self) -> None:
        for proxy in self.proxies:
            proxy.mode = "pass"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    with Sandbox(SandboxOptions(key=KEY, min_seconds=0.5, max_seconds=3.0, size=32)) as sandbox:
        monkeypatch.setenv("SD_API_URL", sandbox.url)
        yield sandbox


@pytest.fixture
def pod_servers(
    migrated_postgres: Engine, api: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Servers]:
    url = migrated_postgres.url
    for name in ("outputs", "keys"):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, UID, UID)
    (tmp_path / "keys" / "keys.json").write_text(f'{{"default": "{KEY}"}}')
    with ExitStack() as stack:
        redis_server = stack.enter_context(running_redis(tmp_path / "redis"))
        database = stack.enter_context(running_proxy(url.host or "127.0.0.1", url.port or 5432))
        broker = stack.enter_context(running_proxy("127.0.0.1", redis_server.port))
        real = url.set(drivername="postgresql")
        monkeypatch.setenv("DATABASE_URL", real.render_as_string(hide_password=False))
        monkeypatch.setenv("REDIS_URL", redis_server.url)
        proxied = real.set(host="127.0.0.1", port=database.port).render_as_string(hide_password=False)
        yield Servers(
            migrated_postgres,
            (database, broker),
            {
                "DATABASE_URL": proxied, "REDIS_URL": f"redis://127.0.0.1:{broker.port}/0", "SD_API_URL": api.url,
                "STORAGE_URL": "file:/srv/outputs", "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8",
                "POLL_MIN": "1", "SD_API_KEYS_FILE": "/srv/keys/keys.json",
            },
            tmp_path,
        )  # fmt: skip


class RunningPod:
    """A pod's process in namespaces of its own."""

    def __init__(self, name: str, pod: Document, servers: Servers, folder: Path) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        self.probe = container(pod).get("livenessProbe", {}).get("httpGet")
        self.port = free_port()
        script = AS_IN_A_POD.format(
            volumes=shlex.quote(str(servers.volumes)),
            uid=UID,
            variables=shlex.join(f"{key}={value}" for key, value in self._variables(pod, servers).items()),
            command=shlex.join(container(pod)["command"]),
        )
        unshare = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen([*unshare, "sh", "-ec", script], stdout=out, stderr=subprocess.STDOUT)

    def _variables(self, pod: Document, servers: Servers) -> dict[str, str]:
        secrets = {name: secret["stringData"] for name, secret in of_kind("Secret").items()}
        variables: dict[str, str] = IMAGE | of_kind("ConfigMap")["fetch-worker"]["data"] | secrets["fetch-worker"]
        for variable in container(pod).get("env", ()):
            source = variable.get("valueFrom", {}).get("secretKeyRef")
            values = {} if source is None else secrets[source["name"].removeprefix("fetch-worker-")]
            variables[variable["name"]] = variable["value"] if source is None else values[source["key"]]
        own = {
            name: value for name, value in servers.variables.items() if name != "SD_API_KEYS_FILE" or name in variables
        }
        port = {f"{self.name.upper()}_PORT": str(self.port)} if self.probe else {}
        return variables | own | port

    @property
    def answers(self) -> bool:
        """Whether the liveness probe of the pod passes, or it has none and its process runs."""
        if self.probe is None:
            return self.process.poll() is None
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.probe['path']}", timeout=60) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def end(self) -> int:
        """Send SIGTERM to process 1. Return its exit code."""
        (pid,) = children(self.process.pid)
        os.kill(pid, signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def running(servers: Servers, folder: Path) -> Iterator[dict[str, RunningPod]]:
    """Run the Job, and then a pod of each Deployment."""
    with ExitStack() as stack:
        running_pods = {}
        for name, pod in sorted(pods().items(), key=lambda item: item[0] != "migrate"):
            running_pods[name] = RunningPod(name, pod, servers, folder)
            stack.callback(running_pods[name].process.wait)
            stack.callback(running_pods[name].process.kill)
            if name == "migrate":
                assert running_pods.pop(name).process.wait(PATIENCE) == 0, (folder / "migrate.log").read_text()
        yield running_pods


def _track_and_wait(engine: Engine, api: Sandbox, folder: Path) -> None:
    ids = [track(api.submit(f"a lake at {hour}")) for hour in range(3)]

    def completed() -> bool:
        with engine.connect() as connection:
            done = select(func.count()).where(jobs.c.id.in_(ids), jobs.c.status == "completed")
            return connection.execute(done).scalar_one() == len(ids)

    wait_until(completed, "the jobs are completed", PATIENCE, seen=lambda: tail(folder / "worker.log"))


@pytest.mark.long
@pytest.mark.server
def test_given_pods_of_any_user_when_the_servers_are_away_then_no_probe_fails_and_work_goes_on_afterwards(
    pod_servers: Servers, api: Sandbox, tmp_path: Path
) -> None:
    if os.geteuid() or shutil.which("unshare") is None or shutil.which("setpriv") is None:
        missing("root, unshare and setpriv")
    with running(pod_servers, tmp_path) as running_pods:
        for name, pod in running_pods.items():
            wait_until(lambda pod=pod: pod.answers, f"{name} answers", PATIENCE, seen=pod.log.read_text)  # type: ignore[misc]
        _track_and_wait(pod_servers.engine, api, tmp_path)
        stored = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]
        assert stored
        assert {path.stat().st_uid for path in stored} == {UID}

        pod_servers.away()
        until = time.monotonic() + OUTAGE_SECONDS
        while time.monotonic() < until:
            assert {name: pod.answers for name, pod in running_pods.items()} == dict.fromkeys(running_pods, True)
            time.sleep(1)
        pod_servers.back()
        _track_and_wait(pod_servers.engine, api, tmp_path)

        assert {name: pod.end() for name, pod in running_pods.items()} == dict.fromkeys(running_pods, 0)
