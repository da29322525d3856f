"""Who may come in: every request passes here first. Host, origin, login and token are checked, headers are set.

Nothing but the login itself and the library's own style sheets answers without a login. A request that may change
anything is a POST with the token of its session, from a page of ours.
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
LOGIN_SECONDS = 12 * 3600.0
LOGINS_MOST = 100
FORM_BYTES_MOST = 1 << 20
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
WAITERS_MOST = 1_000
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
    "Referrer-Policy": "same-origin",  # with none at all browsers hide the origin of a form, too
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(slots=True)
class Login:
    """Somebody who is logged in, until `ends`, on the clock of the door."""

    token: str
    ends: float


@dataclass(slots=True)
class Door:
    """The password, who is logged in, and whose guesses have to wait."""

    password: str
    address: str
    clock: Callable[[], float] = time.monotonic
    _logins: OrderedDict[str, Login] = field(default_factory=OrderedDict)
    _misses: OrderedDict[str, tuple[int, float]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, guest: str) -> float:
        """Seconds until this guest may try again."""
        with self._lock:
            return max(0.0, self._misses.get(guest, (0, 0.0))[1] - self.clock())

    def enter(self, guest: str, password: str) -> str | None:
        """A new login's id for the right password. Each wrong one makes the guest wait twice as long as before.

        Who has to wait is not listened to.
        """
        with self._lock:
            if self.clock() < self._misses.get(guest, (0, 0.0))[1]:
                return None
            if hmac.compare_digest(password.encode(), self.password.encode()):
                self._misses.pop(guest, None)
                return self._new_login()
            times = self._misses.pop(guest, (0, 0.0))[0]
            self._misses[guest] = (times + 1, self.clock() + min(FIRST_WAIT * 2 ** min(times, 10), LONGEST_WAIT))
            while len(self._misses) > WAITERS_MOST:
                self._misses.popitem(last=False)
            return None

    def _new_login(self) -> str:
        name = secrets.token_urlsafe(24)
        self._logins[name] = Login(secrets.token_urlsafe(24), self.clock() + LOGIN_SECONDS)
        while len(self._logins) > LOGINS_MOST:
            self._logins.popitem(last=False)
        return name

    def login(self, name: object) -> Login | None:
        """The login of this id, while it lasts."""
        with self._lock:
            found = self._logins.get(name) if isinstance(name, str) else None
            return found if found is not None and self.clock() < found.ends else None

    def leave(self, name: object) -> None:
        """Ends a login: its cookie opens nothing any more, wherever a copy of it may be."""
        with self._lock:
            if isinstance(name, str):
                self._logins.pop(name, None)

    def knows(self, host: str) -> bool:
        """Whether this server may be called by that name. Any other is a page elsewhere that points its name at us."""
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


def guard(app: Flask, door: Door) -> None:
    """Puts the door before every page of an app."""
    app.secret_key = secrets.token_bytes(32)  # nobody stays logged in over a restart
    app.config.update(
        SESSION_COOKIE_NAME=COOKIE,
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Strict",
        MAX_CONTENT_LENGTH=FORM_BYTES_MOST,
        MAX_FORM_MEMORY_SIZE=FORM_BYTES_MOST,
    )

    def check() -> AnyResponse | None:
        return _check(door)

    def log_in() -> AnyResponse | str:
        return _log_in(door)

    def log_out() -> AnyResponse:
        door.leave(session.pop("login", None))
        return redirect(url_for("login"))

    app.before_request(check)
    app.after_request(_with_headers)
    app.add_url_rule("/login", "login", log_in, methods=["GET", "POST"])
    app.add_url_rule("/logout", "logout", log_out, methods=["POST"])


def _check(door: Door) -> AnyResponse | None:
    if not door.knows(request.host):
        raise MisdirectedRequest("this server has another name: see ADMIN_ADDRESS")
    if request.method in CHANGES:
        _refuse_strangers()
    login = door.login(session.get("login"))
    g.token = "" if login is None else login.token
    if request.endpoint in OPEN_ENDPOINTS:
        return None
    if login is None:
        return _to_login()
    if request.method in CHANGES and not hmac.compare_digest(
        request.form.get("token", "").encode(), login.token.encode()
    ):
        raise Forbidden("the form is not of this login, or too old: go back, load the page again, try once more")
    return None


def _refuse_strangers() -> None:
    """A form of another site is refused, whatever it carries: browsers say where a request comes from."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site not in (None, "same-origin", "none"):
        raise Forbidden("this form is of another site")
    if origin is not None and urlsplit(origin).netloc.lower() != request.host.lower():
        raise Forbidden("this form is of another site")


def _to_login() -> AnyResponse:
    if request.method in CHANGES or request.endpoint in (None, "outputs.file", "plots.picture"):
        return Response("log in first\n", 401, mimetype="text/plain")
    return redirect(url_for("login", then=request.full_path.rstrip("?")))


def _log_in(door: Door) -> AnyResponse | str:
    then = own_path(request.values.get("then", "/"))
    guest = request.remote_addr or ""
    if request.method == "GET":
        return render_template("login.html", then=then)
    wait = door.wait(guest)
    if wait > 0:
        said = f"Too many wrong passwords: wait {wait:.0f} seconds." if wait >= 1 else "Wait a moment, then try again."
        return Response(render_template("login.html", then=then, said=said), 429, {"Retry-After": f"{wait + 1:.0f}"})
    name = door.enter(guest, request.form.get("password", ""))
    if name is None:
        log.warning("a wrong password from=%s", guest)
        return Response(render_template("login.html", then=then, said="That is not the password."), 401)
    door.leave(session.get("login"))
    session.clear()
    session["login"] = name
    return redirect(then)


def own_path(path: str) -> str:
    """A path of this server to go to, never another server's."""
    plain = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable() and "\\" not in path
    return path if plain else "/"


def _with_headers(response: Response) -> Response:
    response.headers.update(HEADERS)
    response.headers.setdefault("Content-Security-Policy", POLICY)
    return response
