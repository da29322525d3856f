"""Access control of the admin page: checks host, origin, login and token of each request, and sets headers.

Behind a proxy, `ADMIN_URL` names the only host and origin that are accepted. Without a login, only the login page and
the style sheets of Flask-Admin are served. A request that may change anything must be a POST from a page of this server
with the token of its session.
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

from worker.configuration.admin_url import AdminUrl

log = logging.getLogger(__name__)

COOKIE = "fetch_worker_admin"
ADMIN, VIEWER = "admin", "viewer"  # the names of logins: who may act, and who may only look
LOGIN_SECONDS = 12 * 3600.0
MAX_LOGINS = 100
MAX_FORM_BYTES = 1 << 20
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
MAX_WAITING_CLIENTS = 1_000
HEALTH = "health"  # the endpoint that is answered under any host: it says nothing about jobs
LOG_OUT = "logout"
OPEN_ENDPOINTS = frozenset({"login", "admin.static", HEALTH})
CHANGES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:;"
    " media-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
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

    @property
    def may_act(self) -> bool:
        """Whether it may change anything."""
        return self.name == ADMIN


@dataclass(slots=True)
class AccessControl:
    """The passwords, the current logins, and the waiting times after wrong passwords.

    `address` is what the server listens on. Behind a proxy, `url` is the address of the page.
    """

    password: str
    address: str
    clock: Callable[[], float] = time.monotonic
    url: AdminUrl | None = None
    viewer_password: str | None = None
    _logins: OrderedDict[str, Login] = field(default_factory=OrderedDict)
    _wrong_passwords: OrderedDict[str, tuple[int, float]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def seconds_to_wait(self, client: str) -> float:
        """Return the seconds until a client may try again."""
        with self._lock:
            return max(0.0, self._wrong_passwords.get(client, (0, 0.0))[1] - self.clock())

    def log_in(self, client: str, password: str) -> str | None:
        """Return the id of a new login for a right password, else `None`. The password decides whether it may act.

        Each wrong password doubles the waiting time of the client. A client that must wait is always refused.
        """
        with self._lock:
            if self.clock() < self._wrong_passwords.get(client, (0, 0.0))[1]:
                return None
            for name, right_password in ((ADMIN, self.password), (VIEWER, self.viewer_password)):
                if right_password and hmac.compare_digest(password.encode(), right_password.encode()):
                    self._wrong_passwords.pop(client, None)
                    return self._new_login(name)
            misses = self._wrong_passwords.pop(client, (0, 0.0))[0]
            self._wrong_passwords[client] = (
                misses + 1,
                self.clock() + min(FIRST_WAIT * 2 ** min(misses, 10), LONGEST_WAIT),
            )
            while len(self._wrong_passwords) > MAX_WAITING_CLIENTS:
                self._wrong_passwords.popitem(last=False)
            return None

    def _new_login(self, name: str) -> str:
        login_id = secrets.token_urlsafe(24)
        self._logins[login_id] = Login(name, secrets.token_urlsafe(24), self.clock() + LOGIN_SECONDS)
        same_name = [login_id for login_id, login in self._logins.items() if login.name == name]
        for oldest in same_name[:-MAX_LOGINS]:  # so viewers end no login of an admin
            del self._logins[oldest]
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
        if self.url is not None:
            return self.url.accepts_host(host)
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

    def accepts_origin(self, origin: str, host: str) -> bool:
        """Return whether an Origin or Referer header is of this server, which the Host header calls `host`."""
        if self.url is not None:
            return self.url.accepts_origin(origin)
        try:
            return urlsplit(origin).netloc.lower() == host.lower()
        except ValueError:
            return False


def guard(app: Flask, access: AccessControl) -> None:
    """Check every request of an app with `access`."""
    app.secret_key = secrets.token_bytes(32)  # a restart ends all logins
    app.config.update(
        SESSION_COOKIE_NAME=COOKIE,
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Strict",
        SESSION_COOKIE_SECURE=access.url is not None and access.url.secure,
        SESSION_COOKIE_PATH=(access.url.prefix if access.url is not None else "") or "/",
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
    app.add_url_rule("/logout", LOG_OUT, log_out, methods=["POST"])
    app.add_url_rule("/healthz", HEALTH, lambda: Response("ok\n", mimetype="text/plain"))


def _check(access: AccessControl) -> AnyResponse | None:
    if request.endpoint != HEALTH and not access.accepts_host(request.host):
        setting = "ADMIN_ADDRESS" if access.url is None else "ADMIN_URL"
        raise MisdirectedRequest(f"this is not the name of this server: see {setting}")
    if request.method in CHANGES:
        _refuse_other_sites(access)
    login = access.login(session.get("login"))
    g.login = login
    if request.endpoint in OPEN_ENDPOINTS:
        return None
    if login is None:
        return _to_login()
    if request.method in CHANGES and not hmac.compare_digest(
        request.form.get("token", "").encode(), login.token.encode()
    ):
        raise Forbidden("the form is too old or belongs to another login: go back, reload the page and try again")
    if request.method in CHANGES and request.endpoint != LOG_OUT and not login.may_act:
        raise Forbidden("a viewer may look, and change nothing: log in with ADMIN_PASSWORD to act")
    return None


def _refuse_other_sites(access: AccessControl) -> None:
    """Refuse forms of other sites, by the headers in which browsers send the origin of a request."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site not in (None, "same-origin", "none"):
        raise Forbidden("this form belongs to another site")
    if origin is None and access.url is not None:
        origin = request.headers.get("Referer")
    if origin is not None and not access.accepts_origin(origin, request.host):
        raise Forbidden("this form belongs to another site")


def _to_login() -> AnyResponse:
    if request.method in CHANGES or request.endpoint in (None, "outputs.file", "plots.picture"):
        return Response("log in first\n", 401, mimetype="text/plain")
    return redirect(url_for("login", then=this_path()))


def _log_in(access: AccessControl) -> AnyResponse | str:
    then = own_path(request.values.get("then", ""))
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


def this_path() -> str:
    """Return the path and query of this request, as the browser sees them: with the prefix of ADMIN_URL."""
    return request.script_root + request.full_path.rstrip("?")


def own_path(path: str) -> str:
    """Return a path of this page, or that of the overview if it could lead anywhere else."""
    overview = f"{request.script_root}/"
    plain = path.startswith(overview) and not path.startswith("//") and path.isprintable() and "\\" not in path
    return path if plain and ".." not in path.partition("?")[0].split("/") else overview


def _with_headers(response: Response) -> Response:
    response.headers.update(HEADERS)
    response.headers.setdefault("Content-Security-Policy", POLICY)
    return response
