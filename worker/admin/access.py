"""Access control of the admin page: checks host, origin, login and token of each request, and sets headers.

Without a login, only the login page and the style sheets of Flask-Admin are served. A request that may change anything
must be a POST from a page of this server with the token of its session.
"""

import hmac
import ipaddress
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from flask import Flask, Response, g, redirect, render_template, request, session, url_for
from werkzeug.exceptions import Forbidden, MisdirectedRequest
from werkzeug.wrappers import Response as AnyResponse

log = logging.getLogger(__name__)

COOKIE = "fetch_worker_admin"
ADMIN = "admin"  # the name of a login
LOGIN_SECONDS = 12 * 3600.0
MAX_LOGINS = 100
MAX_FORM_BYTES = 1 << 20
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
MAX_WAITING_CLIENTS = 1_000
OPEN_ENDPOINTS = frozenset({"login", "admin.static"})
CHANGES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; media-src 'self';"
    " form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",  # "no-referrer" would also hide the origin of forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(slots=True)
class Login:
    """A login that is valid until `ends`, a time of the clock of `AccessControl`. `name` is in the audit trail."""

    name: str
    token: str
    ends: float


@dataclass(slots=True)
class AccessControl:
    """The password, the current logins, and the waiting times after wrong passwords."""

    password: str
    address: str
    clock: Callable[[], float] = time.monotonic
    _logins: OrderedDict[str, Login] = field(default_factory=OrderedDict)
    _wrong_passwords: OrderedDict[str, tuple[int, float]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def seconds_to_wait(self, client: str) -> float:
        """Return the seconds until a client may try again."""
        with self._lock:
            return max(0.0, self._wrong_passwords.get(client, (0, 0.0))[1] - self.clock())

    def log_in(self, client: str, password: str) -> str | None:
        """Return the id of a new login for the right password, else `None`.

        Each wrong password doubles the waiting time of the client. A client that must wait is always refused.
        """
        with self._lock:
            if self.clock() < self._wrong_passwords.get(client, (0, 0.0))[1]:
                return None
            if hmac.compare_digest(password.encode(), self.password.encode()):
                self._wrong_passwords.pop(client, None)
                return self._new_login()
            misses = self._wrong_passwords.pop(client, (0, 0.0))[0]
            self._wrong_passwords[client] = (
                misses + 1,
                self.clock() + min(FIRST_WAIT * 2 ** min(misses, 10), LONGEST_WAIT),
            )
            while len(self._wrong_passwords) > MAX_WAITING_CLIENTS:
                self._wrong_passwords.popitem(last=False)
            return None

    def _new_login(self) -> str:
        login_id = secrets.token_urlsafe(24)
        self._logins[login_id] = Login(ADMIN, secrets.token_urlsafe(24), self.clock() + LOGIN_SECONDS)
        while len(self._logins) > MAX_LOGINS:
            self._logins.popitem(last=False)
        return login_id

    def login(self, login_id: object) -> Login | None:
        """Return the login with this id, or `None` if it does not exist or has ended."""
        with self._lock:
            login = self._logins.get(login_id) if isinstance(login_id, str) else None
            return login if login is not None and self.clock() < login.ends else None

    def log_out(self, login_id: object) -> None:
        """End a login, also for copies of its cookie."""
        with self._lock:
            if isinstance(login_id, str):
                self._logins.pop(login_id, None)

    def accepts_host(self, host: str) -> bool:
        """Return whether a Host header names this server. Other names are refused (DNS rebinding)."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in (self.address.lower(), "localhost"):
            return True
        try:
            called, bound = ipaddress.ip_address(name), ipaddress.ip_address(self.address)
        except ValueError:
            return False
        return bound.is_unspecified or (called.is_loopback and bound.is_loopback)


def guard(app: Flask, access: AccessControl) -> None:
    """Check every request of an app with `access`."""
    app.secret_key = secrets.token_bytes(32)  # a restart ends all logins
    app.config.update(
        SESSION_COOKIE_NAME=COOKIE,
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Strict",
        MAX_CONTENT_LENGTH=MAX_FORM_BYTES,
        MAX_FORM_MEMORY_SIZE=MAX_FORM_BYTES,
    )

    def check() -> AnyResponse | None:
        return _check(access)

    def log_in() -> AnyResponse | str:
        return _log_in(access)

    def log_out() -> AnyResponse:
        access.log_out(session.pop("login", None))
        return redirect(url_for("login"))

    app.before_request(check)
    app.after_request(_with_headers)
    app.add_url_rule("/login", "login", log_in, methods=["GET", "POST"])
    app.add_url_rule("/logout", "logout", log_out, methods=["POST"])


def _check(access: AccessControl) -> AnyResponse | None:
    if not access.accepts_host(request.host):
        raise MisdirectedRequest("this is not the name of this server: see ADMIN_ADDRESS")
    if request.method in CHANGES:
        _refuse_other_sites()
    login = access.login(session.get("login"))
    g.token, g.login_name = ("", "") if login is None else (login.token, login.name)
    if request.endpoint in OPEN_ENDPOINTS:
        return None
    if login is None:
        return _to_login()
    if request.method in CHANGES and not hmac.compare_digest(
        request.form.get("token", "").encode(), login.token.encode()
    ):
        raise Forbidden("the form is too old or belongs to another login: go back, reload the page and try again")
    return None


def _refuse_other_sites() -> None:
    """Refuse forms of other sites, by the headers in which browsers send the origin of a request."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site not in (None, "same-origin", "none"):
        raise Forbidden("this form belongs to another site")
    if origin is not None and urlsplit(origin).netloc.lower() != request.host.lower():
        raise Forbidden("this form belongs to another site")


def _to_login() -> AnyResponse:
    if request.method in CHANGES or request.endpoint in (None, "outputs.file", "plots.picture"):
        return Response("log in first\n", 401, mimetype="text/plain")
    return redirect(url_for("login", then=request.full_path.rstrip("?")))


def _log_in(access: AccessControl) -> AnyResponse | str:
    then = own_path(request.values.get("then", "/"))
    client = request.remote_addr or ""
    if request.method == "GET":
        return render_template("login.html", then=then)
    wait = access.seconds_to_wait(client)
    if wait > 0:
        message = (
            f"Too many wrong passwords: wait {wait:.0f} seconds." if wait >= 1 else "Wait a moment, then try again."
        )
        return Response(
            render_template("login.html", then=then, message=message), 429, {"Retry-After": f"{wait + 1:.0f}"}
        )
    login_id = access.log_in(client, request.form.get("password", ""))
    if login_id is None:
        log.warning("wrong password from=%s", client)
        return Response(render_template("login.html", then=then, message="The password is wrong."), 401)
    access.log_out(session.get("login"))
    session.clear()
    session["login"] = login_id
    return redirect(then)


def own_path(path: str) -> str:
    """Return a path of this server, or `/` if it could lead to another server."""
    plain = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable() and "\\" not in path
    return path if plain else "/"


def _with_headers(response: Response) -> Response:
    response.headers.update(HEADERS)
    response.headers.setdefault("Content-Security-Policy", POLICY)
    return response
