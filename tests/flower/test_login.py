"""The login of a real Flower: a password, or OAuth at a provider on this machine."""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.cookiejar import CookieJar
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from tests.flowers import LOGIN, Flower, flower
from tests.servers import free_port

SECRET = "oauth-secret-8c1f"
ALLOWED = "ann@shop.example"
GITHUB = {
    "FLOWER_AUTH": ALLOWED,
    "FLOWER_AUTH_PROVIDER": "flower.views.auth.GithubLoginHandler",
    "FLOWER_OAUTH2_KEY": "client-7",
    "FLOWER_OAUTH2_SECRET": SECRET,
    "FLOWER_OAUTH2_REDIRECT_URI": "https://flower.shop.example/login",
}
OKTA = GITHUB | {"FLOWER_AUTH_PROVIDER": "flower.views.auth.OktaLoginHandler"}
NO_PASSWORD = {"FLOWER_BASIC_AUTH": ""}


@pytest.fixture(autouse=True)
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    """Name a broker and a database."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")


class Provider(BaseHTTPRequestHandler):
    """An OAuth provider, in the form of Okta. `person` is who is logged in there."""

    person = ALLOWED

    def do_GET(self) -> None:
        """Log the person in at once, or tell who it is."""
        address = urlsplit(self.path)
        if address.path == "/v1/authorize":
            query = parse_qs(address.query)
            self.send_response(302)
            answer = urlencode({"code": "code-1", "state": query["state"][0]})
            self.send_header("Location", f"{query['redirect_uri'][0]}?{answer}")
            self.end_headers()
        else:
            self._answer({"email": type(self).person, "email_verified": True})

    def do_POST(self) -> None:
        """Exchange a code for a token, if the secret is right."""
        fields = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        is_right = (fields["code"], fields["client_secret"]) == (["code-1"], [SECRET])
        self._answer({"access_token": "token-1"} if is_right else {})

    def _answer(self, document: dict[str, object]) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""


@pytest.fixture
def provider() -> Iterator[str]:
    """The address of a running provider."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Provider) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error, which has its address."""

    def redirect_request(self, *_: object) -> None:
        """Follow no redirect."""


@contextmanager
def refused(status: int) -> Iterator[pytest.ExceptionInfo[urllib.error.HTTPError]]:
    """Expect that a page answers with this status. Its connection is closed."""
    with pytest.raises(urllib.error.HTTPError, match=str(status)) as answered:
        yield answered
    answered.value.close()


def redirect(shown: Flower, path: str) -> str:
    """Return the address that a page redirects to."""
    opener = urllib.request.build_opener(NoRedirects)
    with refused(302) as answered:
        opener.open(f"http://127.0.0.1:{shown.port}{path}", timeout=10)
    return str(answered.value.headers["Location"])


# ── a password ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_file_with_a_password_when_flower_starts_then_it_counts_and_no_other_is_made(tmp_path: Path) -> None:
    file = tmp_path / "our_flower.py"
    file.write_text("basic_auth = ['viewer:password']\n")

    with flower(tmp_path, **NO_PASSWORD, FLOWER_CONF=str(file)) as shown:
        assert json.loads(shown.page("/api/tasks")) == {}

    assert "log in as" not in shown.log.read_text()


def test_given_no_login_when_flower_starts_then_it_makes_a_password(tmp_path: Path) -> None:
    with flower(tmp_path, **NO_PASSWORD) as shown:
        words = shown.log.read_text().partition("Flower: log in as admin with ")[2]
        login = base64.b64encode(f"admin:{words.split()[0]}".encode()).decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{shown.port}/tasks", headers={"Authorization": f"Basic {login}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310  # always http
            assert answer.status == 200
        with refused(401):
            shown.page("/tasks")


# ── OAuth ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_oauth_when_a_page_is_opened_then_it_leads_to_the_provider_and_no_password_is_made(
    tmp_path: Path,
) -> None:
    domain = f"127.0.0.1:{free_port()}"
    with flower(tmp_path, **NO_PASSWORD, **GITHUB, FLOWER_GITHUB_OAUTH_DOMAIN=domain) as shown:
        login, api = redirect(shown, "/tasks"), redirect(shown, "/api/tasks")
        provider = urlsplit(redirect(shown, "/login"))

    assert (login, api) == ("/login?next=%2Ftasks", "/login?next=%2Fapi%2Ftasks")
    assert (provider.scheme, provider.netloc, provider.path) == ("https", domain, "/login/oauth/authorize")
    query = parse_qs(provider.query)
    assert query["client_id"] == ["client-7"]
    assert query["redirect_uri"] == ["https://flower.shop.example/login"]
    assert "log in as" not in shown.log.read_text()


@pytest.mark.parametrize("source", ["environment", "file"])
def test_given_oauth_when_people_log_in_then_only_those_of_flower_auth_may_look(
    source: str, tmp_path: Path, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    settings = OKTA | {
        "FLOWER_OAUTH2_OKTA_BASE_URL": provider,
        "FLOWER_OAUTH2_REDIRECT_URI": f"http://127.0.0.1:{port}/login",
    }
    if source == "file":
        (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        settings = {}

    with flower(tmp_path, **NO_PASSWORD, **settings, FLOWER_PORT=str(port)) as shown:
        ann = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        with ann.open(f"http://127.0.0.1:{port}/tasks", timeout=10) as page:
            landed, text = page.url, page.read().decode()
        with ann.open(f"http://127.0.0.1:{port}/api/tasks", timeout=10) as page:
            tasks = json.load(page)
        monkeypatch.setattr(Provider, "person", "bob@shop.example")
        bob = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        with refused(403):
            bob.open(f"http://127.0.0.1:{port}/tasks", timeout=10)

    assert landed.startswith(f"http://127.0.0.1:{port}/")
    assert "Flower" in text
    assert tasks == {}
    assert SECRET not in shown.log.read_text()


def test_given_oauth_and_a_password_when_a_page_is_opened_then_it_asks_for_both(tmp_path: Path) -> None:
    with flower(tmp_path, **GITHUB) as shown:
        with refused(401):
            urllib.request.urlopen(f"http://127.0.0.1:{shown.port}/tasks", timeout=10)  # always http
        request = urllib.request.Request(
            f"http://127.0.0.1:{shown.port}/tasks",
            headers={"Authorization": f"Basic {base64.b64encode(LOGIN.encode()).decode()}"},
        )
        with refused(302):
            urllib.request.build_opener(NoRedirects).open(request, timeout=10)
