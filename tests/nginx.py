"""Run a real nginx with TLS in front of the admin page, configured as the manual says."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme

from tests.docs.manual import PAGES, blocks
from tests.servers import free_port, is_listening, missing
from tests.waiting import wait_until

HOST = "ops.example.com"
CONFIGURATION = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    port_in_redirect off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {server}
}}
"""


@dataclass(frozen=True, slots=True)
class Nginx:
    """A running nginx: its port on this machine, and the file of the authority that signed its certificate."""

    port: int
    authority: Path


@contextmanager
def nginx(folder: Path, backend: str, *, strip_prefix: bool = False) -> Iterator[Nginx]:
    """Serve `backend`, such as `127.0.0.1:5556`, with the server of the manual. It can strip the path prefix."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")
    if program is None:
        missing("nginx")
    folder.mkdir()
    authority, port = trustme.CA(), free_port()
    certificate = authority.issue_cert(HOST)
    authority.cert_pem.write_to_path(folder / "authority.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for part in certificate.cert_chain_pems:
        part.write_to_path(folder / "certificate.pem", append=True)
    server = _server(folder, port, backend, strip_prefix)
    (folder / "nginx.conf").write_text(CONFIGURATION.format(folder=folder, server=server))
    arguments = ["-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with (folder / "nginx.log").open("wb") as log:
        process = subprocess.Popen([program, *arguments], stdout=log, stderr=log)
    try:
        wait_until(
            lambda: process.poll() is not None or is_listening("127.0.0.1", port),
            "nginx listens",
            seen=(folder / "nginx.log").read_text,
        )
        assert process.poll() is None, (folder / "nginx.log").read_text()
        yield Nginx(port, folder / "authority.pem")
    finally:
        process.terminate()
        process.wait(10)


def _server(folder: Path, port: int, backend: str, strip_prefix: bool) -> str:
    """Return the server of the manual with the ports and files of the test."""
    [server] = blocks("nginx", PAGES["deploying"])
    changes = (
        (r"listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        (r"ssl_certificate +\S+;", f"ssl_certificate {folder}/certificate.pem;"),
        (r"ssl_certificate_key +\S+;", f"ssl_certificate_key {folder}/key.pem;"),
        (r"proxy_pass http://127.0.0.1:5556;", f"proxy_pass http://{backend}{'/' if strip_prefix else ''};"),
    )
    for pattern, replacement in changes:
        server, places = re.subn(pattern, replacement, server)
        assert places == 1, pattern
    return server
