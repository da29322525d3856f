"""S3 stores that lack features: a proxy in front of a real store that refuses or ignores these features."""

import http.client
import http.server
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.s3_servers import S3Server

FEATURES = ("If-None-Match", "checksum", "checksum mode", "batch delete", "batch delete without MD5")
CODES = {400: "InvalidArgument", 403: "AccessDenied", 405: "MethodNotAllowed", 501: "NotImplemented"}
SIGNATURE = ("authorization", "x-amz-date", "x-amz-content-sha256", "x-amz-security-token")  # the proxy signs again


class LesserStore:
    """A store and its missing features. `lacks` has a status of the refusal or `ignore` for each of them."""

    def __init__(self, server: S3Server, lacks: Mapping[str, int | str]) -> None:
        self.server = server
        self.lacks = dict(lacks)
        self.refused: list[str] = []
        self.port = 0

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables for a client of this store."""
        return self.server.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def lacking(self, method: str, path: str, headers: Mapping[str, str]) -> Iterator[str]:
        """Yield the features that a request uses and the store lacks."""
        batch = method == "POST" and "delete" in parse_qs(urlsplit(path).query, keep_blank_values=True)
        uses = {
            "If-None-Match": "if-none-match" in headers,
            "checksum": any(map(_is_checksum, headers)) or "aws-chunked" in headers.get("content-encoding", ""),
            "checksum mode": "x-amz-checksum-mode" in headers,
            "batch delete": batch,
            "batch delete without MD5": batch and "content-md5" not in headers,
            "everything": True,
        }
        return (feature for feature in self.lacks if uses[feature])


def _is_checksum(name: str) -> bool:
    return (
        name.startswith(("x-amz-checksum-", "x-amz-sdk-checksum-", "x-amz-trailer")) and name != "x-amz-checksum-mode"
    )


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ClassVar[LesserStore]

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        for feature in self.store.lacking(self.command, self.path, headers):
            self.store.refused.append(feature)
            refusal = self.store.lacks[feature]
            if isinstance(refusal, int):
                error = f"<Error><Code>{CODES[refusal]}</Code><Message>no</Message></Error>".encode()
                return self._answer(refusal, {"Content-Type": "application/xml"}, error)
            if feature.startswith("batch"):
                return self._answer(200, {"Content-Type": "application/xml"}, b"<DeleteResult></DeleteResult>")
            dropped = {"If-None-Match": {"if-none-match"}, "checksum mode": {"x-amz-checksum-mode"}}.get(feature)
            headers = {n: v for n, v in headers.items() if not (n in dropped if dropped else _is_checksum(n))}
        return self._forward(headers, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815  # the names that the base class calls

    def _forward(self, headers: dict[str, str], body: bytes) -> None:
        server = self.store.server
        host = urlsplit(server.endpoint).netloc
        removed = (*SIGNATURE, "host", "expect", "connection")
        forwarded = {name: value for name, value in headers.items() if name not in removed}
        request = AWSRequest(self.command, f"http://{host}{self.path}", headers=forwarded, data=body)
        S3SigV4Auth(Credentials(server.key_id, server.secret), "s3", "us-east-1").add_auth(request)
        connection = http.client.HTTPConnection(host, timeout=20)
        try:
            connection.request(self.command, self.path, body, dict(request.headers.items()))
            answer = connection.getresponse()
            self._answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def lesser_store(server: S3Server, lacks: Mapping[str, int | str]) -> Iterator[LesserStore]:
    """Run a store that lacks these features in front of `server`."""
    store = LesserStore(server, lacks)
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"store": store}))
    listener.daemon_threads = True
    store.port = listener.server_address[1]
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join(5)
