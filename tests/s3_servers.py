"""A real S3 server for the tests: SeaweedFS with its own ports, keys and folder for each test run."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.servers import START_SECONDS, missing

SERVICES = ("master", "volume", "filer", "admin", "s3")
TRIES = 3  # another process may take a free port before the server does


class S3Server:
    """A SeaweedFS server that can be stopped and started again with its data."""

    def __init__(self, folder: Path) -> None:
        self.key_id, self.secret = secrets.token_hex(8), secrets.token_hex(16)
        self._folder = folder
        self._binary = _binary()
        self._ports: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._mark = f"mark-{secrets.token_hex(8)}"  # a bucket that identifies this server
        self._marked = False
        (folder / "data").mkdir()
        (folder / "keys.json").write_text(
            '{"identities": [{"name": "tests", "actions": ["Admin", "Read", "Write", "List", "Tagging"],'
            f'"credentials": [{{"accessKey": "{self.key_id}", "secretKey": "{self.secret}"}}]}}]}}'
        )

    @property
    def endpoint(self) -> str:
        """The URL of the server."""
        return f"http://127.0.0.1:{self._ports[-1]}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables for a client of this server only."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    @cached_property
    def client(self) -> Any:
        """A plain client, to check the server's data independently of the tested code."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.key_id,
            aws_secret_access_key=self.secret,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10, proxies={}),
        )

    def bucket(self) -> str:
        """Create a bucket; return its name."""
        name = f"tests-{secrets.token_hex(8)}"
        self.client.create_bucket(Bucket=name)
        return name

    def start(self) -> None:
        """Start the server if it is not running, with the same ports and data as before."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        for _ in range(TRIES):
            self._ports = self._ports if self._marked else _free_ports(2 * len(SERVICES))
            self._process = self._popen()
            if self._answers(self._process):
                return
            self.stop()
            vars(self).pop("client", None)  # it has the old ports
        raise AssertionError(self._log.read_text())

    def stop(self) -> None:
        """Kill the server, as in a crash. A normal stop takes up to 15 seconds."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(10)
            for service, port in zip(SERVICES, self._ports[: len(SERVICES)], strict=True):
                Path(f"/tmp/seaweedfs-{service}-grpc-{port}.sock").unlink(missing_ok=True)

    @property
    def _log(self) -> Path:
        return self._folder / "weed.log"

    def _popen(self) -> "subprocess.Popen[bytes]":
        grpc, http = self._ports[: len(SERVICES)], self._ports[len(SERVICES) :]
        ports = [f"-{name}.port.grpc={port}" for name, port in zip(SERVICES, grpc, strict=True)]
        ports += [f"-{name}.port={port}" for name, port in zip(SERVICES, http, strict=True)]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [
                    *(self._binary, "-logtostderr", "mini", "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports),
                    *("-s3.config=keys.json", "-s3.iam=false", "-s3.autoCreateBucket=false"),
                    *("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"),
                    *("-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=1000"),
                    *("-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"),
                ],
                cwd=self._folder,
                # no settings of the user who runs the tests; one volume per bucket instead of seven
                env={"PATH": os.defpath, "HOME": str(self._folder), "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _answers(self, process: "subprocess.Popen[bytes]") -> bool:
        """Wait until the server reads and writes. Return False if it exited, for example because a port is taken."""
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.client
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and process.poll() is None:
            try:
                if not self._marked:
                    with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                        client.create_bucket(Bucket=self._mark)
                    client.put_object(Bucket=self._mark, Key="mark", Body=self._mark.encode())
                    self._marked = True
                assert client.get_object(Bucket=self._mark, Key="mark")["Body"].read() == self._mark.encode()
            except (BotoCoreError, ClientError):
                time.sleep(0.05)
            else:
                return process.poll() is None
        return False


def give_second_name(client: Any, bucket: str, name: str) -> None:
    """Make a boto3 client reach a bucket under a second name too, as stores with aliases do."""

    def rename(params: dict[str, Any], **_: Any) -> dict[str, Any]:
        return params | {"Bucket": bucket} if params.get("Bucket") == name else params

    client.meta.events.register("provide-client-params.s3", rename)


def _binary() -> str:
    try:
        import boto3  # noqa: F401  # an optional dependency
    except ImportError:
        missing("boto3")
    path = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if path is None:
        missing("SeaweedFS")
    return str(path)


def _free_ports(count: int) -> list[int]:
    """Return TCP ports that are free at the moment."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run an S3 server; stop it and delete its data afterwards."""
    server = S3Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder / "data", ignore_errors=True)
