"""Every call to the hosted API. Raises nothing: what does not lead to an answer is a reply of its own, `ApiDown`."""

import json
import time
from collections.abc import Mapping
from typing import Any

import requests
from pydantic import SecretStr
from requests.adapters import HTTPAdapter
from urllib3 import PoolManager
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from worker.core.fetch_address import AllowedApi, FetchAddress, fetch_address, is_training
from worker.core.reply import ApiDown, Odd, Reply, parse
from worker.errors import RefusedAddress
from worker.scrubber import Scrubber
from worker.timed_http import TimedHTTPConnection, TimedHTTPSConnection, TimeLimit, lean_session

MAX_ANSWER_BYTES = 32 * 1024 * 1024
CHUNK_BYTES = 64 * 1024
CONNECT_SECONDS = 10.0


class _Pool(HTTPConnectionPool):
    ConnectionCls = TimedHTTPConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = TimedHTTPSConnection


class _TimedAdapter(HTTPAdapter):
    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any) -> None:
        self.poolmanager = PoolManager(num_pools=connections, maxsize=maxsize, block=block, **pool_kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}


class HostedApi:
    """The API as one process sees it: one pooled session for all its threads, without proxies, netrc or cookies."""

    def __init__(self, allowed: AllowedApi, scrubber: Scrubber, *, timeout: float, connections: int) -> None:
        self._allowed = allowed
        self._scrubber = scrubber
        self._timeout = timeout
        self._session = lean_session(_TimedAdapter(pool_connections=8, pool_maxsize=connections))

    def permits(self, address: FetchAddress, remote_id: str) -> str | None:
        """Why the key may not go to this address, or None. Asked before each call, since settings change."""
        if address.url == f"{self._allowed.url}/fetch/{remote_id}":
            return None
        try:
            fetch_address(address.url, remote_id, self._allowed)
        except RefusedAddress as refused:
            return str(refused)
        return None

    def ask(self, address: FetchAddress, remote_id: str, key: SecretStr) -> Reply:
        """Asks about one job: one POST with the key in its body, never redirected, over within the time-out."""
        body: dict[str, str] = {"key": key.get_secret_value()}
        if address.id_in_body:
            body["request_id"] = remote_id
        try:
            with TimeLimit(self._timeout) as limit:
                status, headers, answer = self._post(address.url, body, limit)
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            return ApiDown(self._scrubber.text(f"no answer: {_kind(error)}"))
        if answer is None:
            return Odd(f"HTTP {status} with an answer of more than {MAX_ANSWER_BYTES} bytes")
        return parse(
            status,
            headers,
            self._scrubber.body(answer),
            remote_id=remote_id,
            now=time.time(),
            training=is_training(address.base),
        )

    def _post(self, url: str, body: dict[str, str], limit: TimeLimit) -> tuple[int, Mapping[str, str], bytes | None]:
        connect = min(CONNECT_SECONDS, limit.remaining)
        with self._session.post(
            url,
            data=json.dumps(body),
            headers={"Content-Type": "application/json", "Accept": "application/json"},
            timeout=(connect, limit.remaining),
            allow_redirects=False,
            stream=True,
        ) as response:
            read = bytearray()
            for chunk in response.iter_content(CHUNK_BYTES):
                read += chunk
                if len(read) > MAX_ANSWER_BYTES:
                    return response.status_code, response.headers, None
                if limit.over:
                    break
            if limit.over:  # where no length was declared, a connection that the watchdog ended looks like the end
                raise requests.Timeout("the whole call took too long")
            return response.status_code, response.headers, bytes(read)


def _kind(error: BaseException) -> str:
    """What went wrong, in words that carry no address, no body and no key."""
    if isinstance(error, requests.exceptions.SSLError):
        return "TLS trouble"
    if isinstance(error, requests.Timeout):
        return "time-out"
    if isinstance(error, requests.exceptions.ConnectionError):
        said = str(error)
        if "NameResolution" in said or "getaddrinfo" in said:
            return "the host's name is not known"
        return "connection refused" if "refused" in said else "the connection broke"
    return type(error).__name__
