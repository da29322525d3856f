"""The viewer: a login that sees every page and may change nothing."""

import re
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, insert, select

from tests.admin_pages import PASSWORD, VIEWER_PASSWORD, Clock, Operator, add_stored
from tests.rows import NOW, add_job, read_job
from worker.admin.access import CHANGES, MAX_LOGINS, AccessControl
from worker.errors import SettingsError
from worker.settings import load
from worker.store.schema import actions, breakers

OWN_FORMS = {"login", "logout"}  # they change only the viewer's own login


@pytest.fixture
def engine(sqlite_engine: Engine) -> Engine:
    """SQLite only: access control does not depend on the database."""
    return sqlite_engine


def test_given_a_viewer_when_it_sends_any_form_then_it_is_refused(
    site: Flask, viewer: Operator, operator: Operator, engine: Engine
) -> None:
    """Every URL that takes forms is tried, so that later ones are covered too."""
    with engine.begin() as connection:
        job_id = add_job(connection)
        connection.execute(insert(breakers).values(scope="account", name="default", proven=True))
    before = read_job(engine, job_id)
    form = {"rowid": job_id, "confirmed": "yes", "scope": "account", "name": "default", "id": job_id}
    rules = [rule for rule in site.url_map.iter_rules() if rule.methods and rule.methods & CHANGES]
    changing = [rule.rule for rule in rules if rule.endpoint not in OWN_FORMS]

    answers = {
        (path, method, action): viewer.client.open(
            re.sub(r"<[^>]+>", "1", path), method=method, data={"token": viewer.token, "action": action, **form}
        ).status_code
        for path in changing
        for method in sorted(CHANGES)
        for action in ("cancel", "hold", "resume", "retry", "notify")
    }

    assert {"/jobs/action/", "/jobs/matching/", "/accounts/act/"} <= set(changing)
    assert set(answers.values()) == {403}, answers
    assert read_job(engine, job_id) == before
    with engine.connect() as connection:
        assert connection.execute(select(actions)).all() == []
        assert connection.execute(select(breakers.c.paused_at)).scalars().all() == [None]
    assert operator.act("cancel", [job_id]) == "1 job cancelled."


def test_given_a_viewer_then_it_sees_every_page_and_no_button(
    viewer: Operator, operator: Operator, engine: Engine, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        job_id, output_id = add_stored(connection, tmp_path / "out", b"bytes")
        waiting = add_job(connection, "waits")
        connection.execute(insert(breakers).values(scope="account", name="default", paused_at=NOW))
    pages = ("/", "/jobs/", f"/jobs/details/?id={job_id}", f"/jobs/details/?id={waiting}", "/outputs/",
             "/outputs/gallery/", "/webhooks/", "/accounts/", "/actions/", "/plots/")  # fmt: skip

    def buttons(text: str) -> list[str]:
        forms = re.findall(r'<form[^>]*method="post".*?</form>', text, re.DOTALL)
        return [label for form in forms for label in re.findall(r"<button[^>]*>([^<]+)</button>", form)]

    for page in pages:
        answer = viewer.client.get(page)
        assert answer.status_code == 200
        assert buttons(answer.text) == ["Log out"], page
        assert "viewer" in answer.text
    for page in ("/jobs/", f"/jobs/details/?id={waiting}", "/accounts/"):
        assert len(buttons(operator.client.get(page).text)) > 1, page
    assert viewer.file(f"/outputs/file/{output_id}").data == b"bytes"
    assert f"id={waiting}" in viewer.client.get("/jobs/").text


def test_a_viewer_logs_out(viewer: Operator) -> None:
    assert viewer.send("/logout").status_code == 302
    assert viewer.client.get("/jobs/").status_code == 302


def test_without_a_viewer_password_only_the_admin_logs_in() -> None:
    access = AccessControl(PASSWORD, "127.0.0.1", Clock())

    assert access.log_in("1.1.1.1", "") is None
    assert access.log_in("2.2.2.2", VIEWER_PASSWORD) is None
    login = access.login(access.log_in("3.3.3.3", PASSWORD))
    assert login is not None
    assert login.may_act


def test_many_logins_of_viewers_end_none_of_an_admin() -> None:
    access = AccessControl(PASSWORD, "127.0.0.1", Clock(), viewer_password=VIEWER_PASSWORD)
    admin = access.log_in("1.1.1.1", PASSWORD)
    viewers = [access.log_in("2.2.2.2", VIEWER_PASSWORD) for _ in range(MAX_LOGINS + 5)]

    assert access.login(admin) is not None
    assert [access.login(login_id) is not None for login_id in viewers] == [False] * 5 + [True] * MAX_LOGINS


def test_wrong_passwords_for_the_viewer_cause_a_wait_too(guest: FlaskClient, clock: Clock) -> None:
    assert guest.post("/login", data={"password": "wrong"}).status_code == 401
    assert guest.post("/login", data={"password": VIEWER_PASSWORD}).status_code == 429
    clock.now += 1
    assert guest.post("/login", data={"password": VIEWER_PASSWORD}).status_code == 302


@pytest.mark.parametrize("same", [PASSWORD, f" {PASSWORD}\n", f'"{PASSWORD}"'])
def test_the_same_password_for_both_logins_is_refused(same: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes do not care."""
    monkeypatch.setenv("ADMIN_PASSWORD", PASSWORD)
    monkeypatch.setenv("ADMIN_VIEWER_PASSWORD", same)

    with pytest.raises(SettingsError) as refused:
        load("admin")

    assert str(refused.value) == "ADMIN_VIEWER_PASSWORD must differ from ADMIN_PASSWORD: a viewer may not act"
    assert load().admin_viewer_password is None


def test_an_invisible_character_in_either_password_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADMIN_PASSWORD", "ADMIN_VIEWER_PASSWORD"):
        monkeypatch.setenv(name, "a\u200bb")
        with pytest.raises(SettingsError, match=f"{name} has an invisible character"):
            load("admin")
        monkeypatch.delenv(name)
