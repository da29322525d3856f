"""Access control: requests without a login, tokens of forms, Host headers and passwords."""

import re
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, select

from tests.admin_pages import PASSWORD, Clock, Operator, add_stored
from tests.rows import add_job, read_job
from worker.admin.access import LOGIN_SECONDS, OPEN_ENDPOINTS, AccessControl
from worker.store.schema import breakers

ACTIONS = ("retry", "cancel", "hold", "resume", "notify")


@pytest.fixture
def engine(sqlite_engine: Engine) -> Engine:
    """SQLite only: access control does not depend on the database."""
    return sqlite_engine


def filled(rule: str) -> str:
    """Return a URL for a rule, with values for its parameters."""
    return re.sub(r"<(?:(\w+):)?\w+>", lambda match: "1" if match[1] == "int" else "site.css", rule)


def test_no_page_and_no_action_answers_without_a_login(
    site: Flask, guest: FlaskClient, engine: Engine, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection)
        add_stored(connection, tmp_path / "out", b"bytes", remote_id="2")
    before = read_job(engine, job_id)
    rules = [rule for rule in site.url_map.iter_rules() if rule.endpoint not in OPEN_ENDPOINTS]

    answers = {}
    for rule in rules:
        answers[rule.rule, "GET"] = guest.get(filled(rule.rule))
        for action in ACTIONS:
            form = {"action": action, "rowid": job_id, "confirmed": "yes", "scope": "account", "name": "default"}
            answers[rule.rule, action] = guest.post(filled(rule.rule), data=form)

    assert len(rules) >= 12
    for (path, method), answer in answers.items():
        to_login = answer.status_code == 302 and answer.headers["Location"].startswith("/login")
        assert to_login or answer.status_code == 401, (path, method, answer.status_code)
        assert b"bytes" not in answer.data
    assert read_job(engine, job_id) == before
    with engine.connect() as connection:
        assert connection.execute(select(breakers)).all() == []


def test_there_are_no_urls_to_edit_or_delete_rows(site: Flask) -> None:
    endpoints = {rule.endpoint.rpartition(".")[2] for rule in site.url_map.iter_rules()}

    assert endpoints == {
        *(
            "static",
            "login",
            "logout",
            "assets",
            "index",
            "index_view",
            "details_view",
            "action_view",
            "act",
            "attach",
            "matching",
        ),
        *("gallery", "file", "picture", "health"),
    }


@pytest.mark.parametrize("token", [None, "", "wrong", "another login's"])
def test_a_form_without_the_token_of_its_login_changes_nothing(
    token: str | None, site: Flask, operator: Operator, engine: Engine
) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection)
    if token == "another login's":
        token = Operator(site.test_client()).token
    form = {"action": "cancel", "rowid": job_id, "confirmed": "yes"} | ({} if token is None else {"token": token})

    answers = [
        operator.client.post(path, data=form)
        for path in ("/jobs/action/", "/jobs/matching/?status=pending", "/accounts/act/", "/logout")
    ]

    assert [answer.status_code for answer in answers] == [403] * 4
    assert read_job(engine, job_id).status == "pending"
    assert operator.client.get("/jobs/").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.test"},
        {"Origin": "null"},
        {"Origin": "http://localhost:81"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_form_of_another_site_is_refused_even_with_the_token(
    headers: dict[str, str], operator: Operator, engine: Engine
) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection)
    form = {"token": operator.token, "action": "cancel", "rowid": job_id, "confirmed": "yes"}

    refused = operator.client.post("/jobs/action/", data=form, headers=headers)
    logged_in = operator.client.post("/login", data={"password": PASSWORD}, headers=headers)

    assert (refused.status_code, logged_in.status_code) == (403, 403)
    assert read_job(engine, job_id).status == "pending"


def test_a_form_of_the_same_site_is_accepted(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection)
    form = {"token": operator.token, "action": "cancel", "rowid": job_id, "confirmed": "yes"}

    operator.client.post(
        "/jobs/action/", data=form, headers={"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    )

    assert read_job(engine, job_id).status == "cancelled"


def test_a_get_request_changes_nothing(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection)
    query = {"token": operator.token, "action": "cancel", "rowid": job_id, "confirmed": "yes"}

    answers = [operator.client.get(path, query_string=query) for path in ("/jobs/action/", "/accounts/act/", "/logout")]

    assert [answer.status_code for answer in answers] == [405, 405, 405]
    assert read_job(engine, job_id).status == "pending"


@pytest.mark.parametrize(
    ("address", "host", "accepted"),
    [
        ("127.0.0.1", "127.0.0.1:5556", True),
        ("127.0.0.1", "localhost:8000", True),  # through a tunnel with another port
        ("127.0.0.1", "[::1]:5556", True),
        ("127.0.0.1", "elsewhere.test:5556", False),
        ("127.0.0.1", "127.0.0.1.elsewhere.test", False),
        ("127.0.0.1", "10.0.0.5:5556", False),
        ("0.0.0.0", "10.0.0.5:5556", True),
        ("0.0.0.0", "elsewhere.test", False),
        ("admin.test", "admin.test:5556", True),
        ("10.0.0.5", "10.0.0.5:5556", True),
        ("10.0.0.5", "10.0.0.6:5556", False),
        ("127.0.0.1", "[", False),
        ("127.0.0.1", "", False),
    ],
)
def test_only_the_names_of_the_server_are_accepted(address: str, host: str, accepted: bool) -> None:
    assert AccessControl(PASSWORD, address).accepts_host(host) is accepted


def test_an_unknown_host_header_gets_no_page(guest: FlaskClient) -> None:
    assert guest.get("/login", headers={"Host": "elsewhere.test"}).status_code == 421


def test_wrong_passwords_are_refused_and_cause_a_wait(guest: FlaskClient, clock: Clock) -> None:
    first = guest.post("/login", data={"password": "wrong"})
    at_once = guest.post("/login", data={"password": PASSWORD})
    clock.now += 0.6
    second = guest.post("/login", data={"password": ""})
    clock.now += 0.6
    too_soon = guest.post("/login", data={"password": PASSWORD})
    clock.now += 0.6
    right = guest.post("/login", data={"password": PASSWORD, "then": "/plots/?span=day"})

    codes = [answer.status_code for answer in (first, at_once, second, too_soon, right)]
    assert codes == [401, 429, 401, 429, 302]
    assert int(too_soon.headers["Retry-After"]) >= 1
    assert right.headers["Location"] == "/plots/?span=day"
    assert guest.get("/jobs/").status_code == 200


def test_after_a_hundred_wrong_passwords_the_wait_is_half_a_minute() -> None:
    clock = Clock()
    access = AccessControl(PASSWORD, "127.0.0.1", clock)
    for _ in range(100):
        clock.now += access.seconds_to_wait("guest") + 0.001
        assert access.log_in("guest", "wrong") is None

    assert 29 < access.seconds_to_wait("guest") <= 30
    assert access.log_in("guest", PASSWORD) is None
    assert access.log_in("another guest", PASSWORD) is not None


@pytest.mark.parametrize("then", ["https://elsewhere.test/", "//elsewhere.test", "/\\elsewhere.test", "jobs"])
def test_the_login_does_not_redirect_to_another_server(then: str, guest: FlaskClient) -> None:
    assert guest.post("/login", data={"password": PASSWORD, "then": then}).headers["Location"] == "/"


def test_logging_out_ends_the_login_for_copies_of_its_cookie_too(site: Flask, operator: Operator) -> None:
    cookie = operator.client.get_cookie("fetch_worker_admin")
    assert cookie is not None
    thief = site.test_client()
    thief.set_cookie("fetch_worker_admin", cookie.value)
    in_time = thief.get("/jobs/").status_code

    operator.send("/logout")

    assert (in_time, thief.get("/jobs/").status_code, operator.client.get("/jobs/").status_code) == (200, 302, 302)


def test_a_login_lasts_half_a_day(operator: Operator, clock: Clock) -> None:
    clock.now += LOGIN_SECONDS - 1
    in_time = operator.client.get("/jobs/").status_code
    clock.now += 2

    assert (in_time, operator.client.get("/jobs/").status_code) == (200, 302)


def test_the_cookie_is_http_only_and_same_site(guest: FlaskClient) -> None:
    cookie = guest.post("/login", data={"password": PASSWORD}).headers["Set-Cookie"]

    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}


def test_every_page_has_the_security_headers(operator: Operator, tmp_path: Path) -> None:
    paths = ("/", "/jobs/", "/login", "/plots/picture/delay.svg", "/assets/site.css", "/nowhere")
    for path in paths:
        headers = operator.client.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "http" not in policy
        assert "script-src 'unsafe-inline'" not in policy
        assert (headers["X-Frame-Options"], headers["X-Content-Type-Options"]) == ("DENY", "nosniff")
        assert "no-store" in headers["Cache-Control"]


def test_no_page_loads_anything_from_another_server(operator: Operator, engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        job_id, _ = add_stored(connection, tmp_path / "out", b"bytes")
    paths = ("/", "/jobs/", f"/jobs/details/?id={job_id}", "/outputs/", "/outputs/gallery/", "/accounts/", "/plots/")

    for path in (*paths, "/login"):
        text = operator.client.get(path).text
        loaded = re.findall(r'<(?:script|link|img|video|audio|iframe|form)[^>]*?(?:src|href|action)="([^"]*)"', text)
        assert loaded
        assert [url for url in loaded if not url.startswith(("/", "data:,")) or url.startswith("//")] == []
        assert re.findall(r"<script(?![^>]*\bsrc=)|\son\w+=|style=", text) == []
