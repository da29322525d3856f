"""The admin page behind a proxy: ADMIN_URL, and a real nginx with TLS, another name and a path prefix."""

import re
import time
from collections.abc import Callable, Iterator
from http.cookiejar import Cookie
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3.util.connection
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine

from tests import browsers
from tests.admin_pages import PASSWORD, TOKEN, Clock, add_stored
from tests.admin_server import served
from tests.browsers import Reader
from tests.nginx import HOST, Nginx, nginx
from tests.rows import NOW, add_job, read_job
from worker.admin.access import AccessControl
from worker.admin.site import make_site
from worker.configuration.admin_url import parse_admin_url
from worker.sandbox.pictures import draw
from worker.settings import load

URL = f"https://{HOST}/fetch"
ORIGIN = {"Origin": f"https://{HOST}"}
LINK = re.compile(r'(?:href|src|action)="([^"]*)"')
FAILED: dict[str, Any] = {"status": "failed", "due_at": None, "completed_at": NOW, "error_code": "api_failed"}
PAGES = ("/", "/jobs/", "/jobs/details/?id=1", "/outputs/", "/outputs/gallery/", "/accounts/", "/actions/", "/plots/")


@pytest.fixture
def engine(sqlite_engine: Engine) -> Engine:
    """SQLite only: the address does not depend on the database."""
    return sqlite_engine


@pytest.fixture
def site(engine: Engine, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flask:
    """The site, as `ADMIN_URL` places it."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}/out")
    return make_site(load(), AccessControl(PASSWORD, "127.0.0.1", Clock(), url=parse_admin_url(URL)))


class Placed:
    """A client that sends requests as waitress passes them on: with the scheme and the prefix of the address."""

    def __init__(self, client: FlaskClient) -> None:
        self.client = client

    def get(self, path: str, **options: Any) -> Any:
        """Get a page below the prefix."""
        return self.client.get(path, base_url=URL, **options)

    def post(self, path: str, form: dict[str, object], headers: dict[str, str]) -> Any:
        """Send a form."""
        return self.client.post(path, data=form, headers=headers, base_url=URL)


@pytest.fixture
def placed(site: Flask) -> Placed:
    """A client without a login."""
    return Placed(site.test_client())


# ── the address ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["127.0.0.1:5556", "localhost", "evil.test", f"{HOST}.evil.test", f"{HOST}:8443"])
def test_given_an_address_then_every_other_host_header_is_refused(host: str, placed: Placed) -> None:
    answer = placed.get("/login", headers={"Host": host, "X-Forwarded-Host": HOST})

    assert answer.status_code == 421
    assert "ADMIN_URL" in answer.text


def test_a_health_check_is_answered_under_any_host(placed: Placed) -> None:
    for host in ("127.0.0.1:5556", "10.1.2.3:5556", HOST):
        answer = placed.client.get("/healthz", headers={"Host": host})
        assert (answer.status_code, answer.text) == (200, "ok\n")
    assert placed.client.post("/healthz", headers={"Host": "evil.test"}).status_code == 421


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        *((ORIGIN, 302), ({"Referer": f"{URL}/login"}, 302), ({}, 302)),
        *(({"Origin": f"http://{HOST}"}, 403), ({"Origin": "null"}, 403), ({"Origin": "https://evil.test"}, 403)),
        *(({"Referer": "https://evil.test/"}, 403), ({"Referer": f"http://{HOST}/fetch/login"}, 403)),
        ({"Origin": "https://evil.test", "Referer": f"{URL}/login"}, 403),
    ],
)
def test_given_an_address_then_forms_of_other_origins_are_refused(
    headers: dict[str, str], status: int, placed: Placed
) -> None:
    assert placed.post("/login", {"password": PASSWORD}, headers).status_code == status


def test_given_an_address_then_the_cookie_is_only_for_its_https_and_its_path(placed: Placed) -> None:
    cookie = placed.post("/login", {"password": PASSWORD}, ORIGIN).headers["Set-Cookie"]

    assert {"Secure", "HttpOnly", "SameSite=Strict", "Path=/fetch"} <= {part.strip() for part in cookie.split(";")}


@pytest.mark.parametrize(
    ("then", "location"),
    [
        ("/fetch/jobs/?status=failed", "/fetch/jobs/?status=failed"),
        *(("/jobs/", "/fetch/"), ("//evil.test/fetch/", "/fetch/"), ("/fetching/", "/fetch/"), ("", "/fetch/")),
        *(("https://evil.test/fetch/", "/fetch/"), ("/fetch/../shop/", "/fetch/"), ("/fetch/\\evil", "/fetch/")),
    ],
)
def test_given_an_address_when_logged_in_then_the_next_page_is_below_its_path(
    then: str, location: str, placed: Placed
) -> None:
    answer = placed.post("/login", {"password": PASSWORD, "then": then}, ORIGIN)

    assert (answer.status_code, answer.headers["Location"]) == (302, location)


def test_given_an_address_then_every_link_of_every_page_is_below_its_path(
    placed: Placed, engine: Engine, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        add_stored(connection, tmp_path / "out", b"bytes")
        add_job(connection, "2", **FAILED)
    placed.post("/login", {"password": PASSWORD}, ORIGIN)

    for page in (*PAGES, "/jobs/details/?id=2", "/login", "/nowhere"):
        links = [link for link in LINK.findall(placed.get(page).text) if not link.startswith("data:")]
        assert links
        assert [link for link in links if not link.startswith("/fetch/")] == [], page


# ── a real nginx ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["the prefix is passed on", "the prefix is stripped"])
def server(
    request: pytest.FixtureRequest, engine: Engine, tmp_path: Path, redis_url: str
) -> Iterator[tuple[Nginx, Path, str]]:
    """The command behind nginx. Yields nginx, the log of the command, and the address of the command itself."""
    strip_prefix = request.param == "the prefix is stripped"
    with (
        served(tmp_path, redis_url, ADMIN_PASSWORD=PASSWORD, ADMIN_URL=URL) as (address, log),
        nginx(tmp_path / "nginx", address.removeprefix("http://"), strip_prefix=strip_prefix) as proxy,
    ):
        yield proxy, log, address


@pytest.fixture
def visitor(server: tuple[Nginx, Path, str], monkeypatch: pytest.MonkeyPatch) -> requests.Session:
    """A client that reaches nginx under the name of the page, and checks its certificate."""
    connect: Callable[..., Any] = urllib3.util.connection.create_connection

    def connect_to_nginx(address: tuple[str, int], *arguments: Any, **options: Any) -> Any:
        target = ("127.0.0.1", server[0].port) if address == (HOST, 443) else address
        return connect(target, *arguments, **options)

    monkeypatch.setattr(urllib3.util.connection, "create_connection", connect_to_nginx)
    session = requests.Session()
    session.trust_env = False
    session.verify = str(server[0].authority)
    return session


@pytest.mark.server
@pytest.mark.usefixtures("interruptible")
def test_given_nginx_when_an_operator_logs_in_acts_and_logs_out_then_everything_is_below_the_path(
    server: tuple[Nginx, Path, str], visitor: requests.Session, engine: Engine, tmp_path: Path
) -> None:
    picture = draw("a lake", "1", 0, 32)
    with engine.begin() as connection:
        _, output_id = add_stored(connection, tmp_path / "out", picture, remote_id="done")
        dead = add_job(connection, "dead", **FAILED)

    outside = visitor.get(f"{URL}/jobs/?status=failed")
    style = visitor.get(f"https://{HOST}{LINK.findall(outside.text)[1]}")
    wrong = visitor.post(f"{URL}/login", data={"password": "no"}, headers={**ORIGIN, "X-Forwarded-For": "6.6.6.6"})
    spoofed = visitor.post(f"{URL}/login", data={"password": PASSWORD}, headers={"Origin": "https://evil.test"})
    assert (wrong.status_code, spoofed.status_code) == (401, 403)
    time.sleep(0.6)  # after a wrong password
    then = {"password": PASSWORD, "then": "/fetch/jobs/?status=failed"}
    inside = visitor.post(f"{URL}/login", data=then, headers=ORIGIN)
    token = TOKEN.search(inside.text)
    assert token is not None
    form = {"token": token[1], "action": "retry", "rowid": dead, "confirmed": "yes", "url": "/fetch/jobs/?held=yes"}
    done = visitor.post(f"{URL}/jobs/action/", data=form, headers=ORIGIN)
    links = [link for link in LINK.findall(done.text) if not link.startswith("data:")]
    assets = {link: visitor.get(f"https://{HOST}{link}").status_code for link in links if "/assets/" in link}
    file = visitor.get(f"{URL}/outputs/file/{output_id}")
    [cookie] = [kept for kept in visitor.cookies if isinstance(kept, Cookie)]
    bare = visitor.get(URL)
    logged_out = visitor.post(f"{URL}/logout", data={"token": token[1]}, headers=ORIGIN)
    after = visitor.get(f"{URL}/jobs/")

    assert outside.url == f"{URL}/login?then=/fetch/jobs/?status%3Dfailed"
    assert (style.status_code, style.headers["Content-Type"].partition(";")[0]) == (200, "text/css")
    assert (inside.url, inside.status_code) == (f"{URL}/jobs/?status=failed", 200)
    assert (done.url, done.status_code) == (f"{URL}/jobs/?held=yes", 200)
    assert "1 job retried." in done.text
    assert read_job(engine, dead).status == "pending"
    assert [link for link in links if not link.startswith("/fetch/")] == []
    assert assets == {"/fetch/assets/site.css": 200, "/fetch/assets/site.js": 200}
    assert file.content == picture
    assert (cookie.domain, cookie.path, cookie.secure) == (HOST, "/fetch", True)
    assert (bare.url, bare.status_code) == (f"{URL}/", 200)
    assert (logged_out.url, after.url) == (f"{URL}/login", f"{URL}/login?then=/fetch/jobs/")
    assert "wrong password from=127.0.0.1" in server[1].read_text()


@pytest.mark.server
@pytest.mark.usefixtures("interruptible")
def test_given_nginx_then_no_other_host_reaches_the_page(
    server: tuple[Nginx, Path, str], visitor: requests.Session
) -> None:
    forged = {"X-Forwarded-Host": "evil.test", "X-Forwarded-Proto": "http", "Forwarded": "host=evil.test;proto=http"}

    through_nginx = visitor.get(f"{URL}/login", headers={"Host": "evil.test"})
    forwarded = visitor.get(f"{URL}/jobs/", headers=forged, allow_redirects=False)
    direct = requests.get(f"{server[2]}/login", timeout=10)

    assert (through_nginx.status_code, direct.status_code) == (421, 421)
    assert "evil.test" not in through_nginx.text
    assert forwarded.headers["Location"] == "/fetch/login?then=/fetch/jobs/"


@pytest.mark.server
@pytest.mark.usefixtures("interruptible")
def test_given_nginx_when_a_real_browser_opens_the_page_then_it_can_act(
    server: tuple[Nginx, Path, str], engine: Engine, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        dead = add_job(connection, "dead", **FAILED)
        add_stored(connection, tmp_path / "out", draw("a lake", "1", 0, 128), remote_id="done")
    rules = f"MAP {HOST}:443 127.0.0.1:{server[0].port}, "
    with browsers.chromium(tmp_path / "profile", "--ignore-certificate-errors", rules=rules) as browser:
        reader = Reader(browser, URL)
        reader.open("/jobs/?status=failed")
        reader.log_in(PASSWORD)
        listed = (browser.current_url, reader.jobs())
        reader.press(f"a[href='/fetch/jobs/details/?id={dead}']")
        reader.press("button[value=retry]")
        reader.press("#confirm")
        retried = (reader.message(), read_job(engine, dead).status)
        reader.open("/outputs/gallery/")
        pictures = reader.widths("figure img")
        reader.press("#logout")
        outside = browser.current_url
        errors = reader.errors()

    assert listed == (f"{URL}/jobs/?status=failed", [str(dead)])
    assert retried == ("1 job retried.", "pending")
    assert pictures == [128]
    assert outside == f"{URL}/login"
    assert errors == []
