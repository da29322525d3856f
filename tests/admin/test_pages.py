"""The pages on each database: what they list, what they say of a job, what can be done, and what they never show."""

import json
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import Engine, insert, update

from tests.admin_pages import PASSWORD, Operator, add_stored
from tests.rows import NOW, add_downloading, add_job, add_output, read_job, seconds
from worker.admin.acts import ACTS, act_on
from worker.admin.door import Door
from worker.admin.outputs import PICTURE_BYTES_MOST, PICTURES, as_what
from worker.admin.site import make_site
from worker.client import tracking
from worker.core.answer_history import NOTE_SEPARATOR
from worker.core.media import signatures as core_media
from worker.core.media.signatures import Media
from worker.errors import Unavailable
from worker.settings import load
from worker.store.engine import database_now
from worker.store.schema import HELD_UNTIL, breakers, events, history, jobs

FAILED: dict[str, Any] = {"status": "failed", "due_at": None, "completed_at": NOW, "error_code": "api_failed"}


def test_jobs_are_listed_newest_first_page_by_page(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        ids = [add_job(connection, f"r{number}") for number in range(120)]

    pages, path = [], "/jobs/"
    while path:
        pages.append(operator.ids(path))
        following = re.search(r'rel="next" href="([^"]+)"', operator.client.get(path).text)
        path = "" if following is None else following[1].replace("&amp;", "&")

    assert [len(page) for page in pages] == [50, 50, 20]
    assert [job_id for page in pages for job_id in page] == ids[::-1]


def test_the_overview_names_what_is_in_trouble_and_its_job_says_what_to_do(operator: Operator, engine: Engine) -> None:
    """A claim without end, a job past its deadline, a host that is away: each a click from what mends it."""
    with engine.begin() as connection:
        now = database_now(connection)
        hours: dict[str, Any] = {"due_at": now + timedelta(hours=4), "asked_at": now - timedelta(minutes=20)}
        stuck = add_job(connection, "1", claim_token="t", claim_holder="0badc0de.7.7", **hours)
        forgotten = add_job(connection, "2", deadline_at=now - timedelta(hours=2), **hours)
        trouble: dict[str, Any] = {"due_at": now + timedelta(minutes=9), "error_code": "unreachable"}
        lost = add_downloading(connection, "3")
        add_output(connection, lost, listed_at=now - timedelta(minutes=6), url="https://cdn.test:8443/a?b", **trouble)

    page = operator.client.get("/").text
    for job_id in (stuck, forgotten, lost):
        assert f'href="/jobs/details/?id={job_id}"' in page
        assert f"fetch-worker resume {job_id}" in operator.client.get(f"/jobs/details/?id={job_id}").text
        operator.send("/jobs/action/", action="resume", rowid=str(job_id), confirmed="yes", url="/jobs/")
    assert "unreachable from cdn.test:8443" in page
    assert read_job(engine, stuck).claim_token is None
    assert read_job(engine, forgotten).due_at <= now + timedelta(minutes=1)
    assert "unreachable from" in operator.client.get("/").text  # it is tried, and still has to come


def test_each_filter_and_each_kind_of_search_finds_its_jobs(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        now = database_now(connection)
        waiting = {"due_at": now + timedelta(hours=1)}
        failed = add_job(connection, "777", **FAILED, account="shop", kind="video")
        late = add_job(connection, "late", due_at=now - timedelta(minutes=3))
        held = add_job(connection, "held", due_at=HELD_UNTIL, held_at=now)
        named = add_job(connection, str(failed), reference="order & <b>12</b>", **waiting)
        plain = add_job(connection, "plain", **waiting)

    assert operator.ids("/jobs/?status=failed") == [failed]
    assert operator.ids("/jobs/?status=pending") == [plain, named, held, late]
    assert operator.ids("/jobs/?account=shop") == [failed]
    assert operator.ids("/jobs/?kind=video") == [failed]
    assert operator.ids("/jobs/?code=api_failed") == [failed]
    assert operator.ids("/jobs/?late=60") == [late]
    assert operator.ids("/jobs/?late=600") == []
    assert operator.ids("/jobs/?held=yes") == [held]
    assert operator.ids("/jobs/?account=shop&status=pending") == []
    assert operator.ids("/jobs/?search=777") == [failed]
    assert operator.ids(f"/jobs/?search={failed}") == [named, failed]  # a remote id, and an id
    assert operator.ids("/jobs/?search=order+%26+%3Cb%3E12%3C/b%3E") == [named]
    assert operator.ids("/jobs/?search=order") == []


@pytest.mark.parametrize(
    "query",
    ["status=nonsense", "late=nonsense", "late=99999999999999999", "before=-1", f"before={2**64}", "page=x&sort=9",
     "search=%00", "search=" + "9" * 5_000, "search=%ff", "account=%27%3B--", "held=maybe", "kind=%ed%a0%80"],
)  # fmt: skip
def test_an_address_of_nonsense_is_a_page_all_the_same(query: str, operator: Operator) -> None:
    for path in ("/jobs/", "/outputs/", "/outputs/gallery/", "/plots/"):
        assert operator.client.get(f"{path}?{query}").status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/jobs/details/", "/jobs/details/?id=x", "/jobs/details/?id=99", "/jobs/details/?id=" + "9" * 40,
     "/outputs/file/99", "/outputs/file/" + "9" * 40, "/assets/..%2fsite.py", "/plots/picture/no.svg"],
)  # fmt: skip
def test_what_is_not_there_is_said_to_be_missing(path: str, operator: Operator) -> None:
    assert operator.client.get(path).status_code == 404


def test_one_job_is_shown_with_why_its_outputs_its_events_and_its_last_answers(
    operator: Operator, engine: Engine
) -> None:
    with engine.begin() as connection:
        now = database_now(connection)
        job_id = add_downloading(connection, "r1", last_answer=f"12.5 s: success{NOTE_SEPARATOR}4.0 s: processing")
        add_output(connection, job_id, error_code="unreachable", error_message="no route", due_at=now + seconds(60))
        add_output(connection, job_id, 1)
        connection.execute(
            insert(events).values(
                event_id="msg_1", job_id=job_id, type="job.completed", url="https://hook.test/path?t=canary-token",
                body="{}", status="pending", created_at=now, due_at=now, http_status=500, error_message="it said 500",
            )
        )  # fmt: skip

    text = operator.page(f"/jobs/details/?id={job_id}")

    for said in ("0 of 2 outputs are stored", "unreachable: no route", "cdn.test", "at 12 s: success",
                 "at 4 s: processing", "msg_1", "hook.test", "it said 500"):  # fmt: skip
        assert said in " ".join(text.split())


def test_what_is_done_to_several_jobs_is_said_plainly(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        waiting = [add_job(connection, f"w{number}") for number in range(3)]
        failed = add_job(connection, "failed", **FAILED)

    assert operator.act("hold", [*waiting, failed]) == "3 jobs held, 1 was not pending, or held already."
    assert [read_job(engine, job_id).held_at is not None for job_id in waiting] == [True] * 3
    assert operator.act("resume", waiting[:1]) == "1 job resumed."
    assert operator.act("cancel", [*waiting, failed, 4_711]) == (
        "3 jobs cancelled, 1 was final already, 1 is not there."
    )
    assert operator.act("retry", [failed]) == "1 job taken up again."
    assert read_job(engine, failed).status == "pending"
    assert operator.act("retry", waiting) == "0 jobs taken up again, 3 were neither failed nor expired."


def test_a_database_that_goes_away_between_two_jobs_leaves_a_true_account(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        ids = [add_job(connection, f"w{number}") for number in range(4)]
    left = iter([True, True])

    def cancel_two(job_id: int) -> bool:
        if next(left, None) is None:
            raise Unavailable("the database does not answer")
        return tracking.cancel(job_id)

    said = act_on(replace(ACTS["cancel"], work=cancel_two), ids)

    assert said == "2 jobs cancelled, 2 left as they were: the database does not answer."
    assert [read_job(engine, job_id).status for job_id in ids] == ["cancelled", "cancelled", "pending", "pending"]


def test_nothing_is_done_before_it_is_confirmed(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection)

    asked = operator.send("/jobs/action/", action="cancel", rowid=job_id)
    nobody = operator.send("/jobs/action/", action="cancel")
    unknown = operator.send("/jobs/action/", action="delete", rowid=job_id, confirmed="yes")
    breaker = operator.send("/accounts/act/", action="hold", scope="account", name="default")

    assert "Cancel this job?" in asked.text
    assert "Hold the account default?" in breaker.text
    assert (nobody.status_code, unknown.status_code) == (302, 302)
    assert read_job(engine, job_id).status == "pending"


def test_accounts_and_hosts_are_held_and_resumed(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        add_job(connection)
        connection.execute(insert(breakers).values(scope="host", name="api.test", proven=True))
    form = {"action": "hold", "confirmed": "yes"}

    operator.send("/accounts/act/", **form, scope="account", name="default")
    operator.send("/accounts/act/", **form, scope="host", name="api.test")
    held = " ".join(operator.page("/accounts/").split())
    operator.send("/accounts/act/", action="resume", confirmed="yes", scope="account", name="default")
    after = " ".join(operator.page("/accounts/").split())
    unknown = operator.send("/accounts/act/", **form, scope="account", name="nobody")

    assert "The account default is held. The host api.test is held." in held
    assert held.count("held by an operator") == 2
    assert unknown.status_code == 404
    assert "The account default is resumed: it is tried at once." in after
    assert after.count("held by an operator") == 1


def test_a_process_without_keys_does_not_say_that_an_account_has_none(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection)

    assert "no key" not in operator.page("/") + operator.page(f"/jobs/details/?id={job_id}")


def test_texts_from_outside_are_text_and_nothing_else(operator: Operator, engine: Engine) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>'\""
    with engine.begin() as connection:
        job_id = add_job(connection, **FAILED, reference=evil, error_message=evil, last_answer=evil)
        add_output(connection, job_id, status="failed", due_at=None, error_code="gone", error_message=evil)
        connection.execute(insert(breakers).values(scope="account", name="x", reason=evil, since=NOW))

    for path in ("/", "/jobs/", f"/jobs/details/?id={job_id}", "/outputs/", "/accounts/", "/jobs/?search=%3Cscript%3E"):
        text = operator.client.get(path).text
        assert "<script>" not in text
        assert "<img src=x" not in text


def test_no_page_shows_a_key_a_secret_a_password_or_a_signed_link(
    engine: Engine, operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_API_KEY", "canary-api-key")
    monkeypatch.setenv("SD_API_KEYS", '{"shop": "canary-shop-key"}')
    monkeypatch.setenv("WEBHOOK_SECRET", "whsec_" + "canary00" * 5)
    hook = "https://hook.test/path?t=canary-token"
    link = "https://cdn.test/b.png?Signature=canary-signature"
    with engine.begin() as connection:
        job_id, output_id = add_stored(connection, tmp_path / "out", b"bytes")
        connection.execute(update(jobs).values(webhook_url=hook, last_answer=f"3.0 s: error: see {link}"))
        add_output(connection, job_id, 1, status="failed", due_at=None, error_code="gone", error_message=f"404 {link}")
        add_job(connection, "2", **FAILED, error_message=f"look at {link}", webhook_url=hook)
        connection.execute(
            insert(events).values(
                event_id="msg_1", job_id=job_id, type="job.completed", url=hook, body=hook, status="failed",
                created_at=NOW, ended_at=NOW, error_message=f"{hook} said 500",
            )
        )  # fmt: skip
    keyed = Operator(make_site(load(), Door(PASSWORD, "127.0.0.1")).test_client())
    paths = ("/", "/jobs/", f"/jobs/details/?id={job_id}", f"/jobs/details/?id={job_id + 1}", "/outputs/",
             "/outputs/gallery/", "/accounts/", "/plots/", "/plots/picture/delay.svg", "/nowhere", "/login",
             f"/outputs/file/{output_id}")  # fmt: skip

    for path in paths:
        answer = keyed.file(path)
        for shown in (answer.text, str(answer.headers)):
            assert "canary" not in shown, path
            assert PASSWORD not in shown


def test_a_database_that_is_away_is_one_line_without_its_password(
    site: Flask, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://operator:canary-password@127.0.0.1:9/none")
    client = make_site(load(), Door(PASSWORD, "127.0.0.1")).test_client()
    client.post("/login", data={"password": PASSWORD})

    answer = client.get("/jobs/")

    assert answer.status_code == 503
    assert "does not answer" in answer.text
    assert "canary" not in answer.text


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stored_file_is_served_whole_or_in_part_in_a_sandbox(
    operator: Operator, engine: Engine, tmp_path: Path
) -> None:
    body = bytes(range(256)) * 1_000
    with engine.begin() as connection:
        job_id, output_id = add_stored(connection, tmp_path / "out", body, media_type="video/mp4")
    path = f"/outputs/file/{output_id}"

    whole = operator.file(path)
    part = operator.file(path, headers={"Range": "bytes=1000-1009"})
    end = operator.file(path, headers={"Range": "bytes=-5"})
    beyond = operator.file(path, headers={"Range": "bytes=999999999-"})
    offered = operator.file(f"{path}?download=yes")

    assert (whole.data, whole.mimetype) == (body, "video/mp4")
    assert whole.headers["Content-Disposition"] == f'inline; filename="job-{job_id}-0.mp4"'
    assert "sandbox" in whole.headers["Content-Security-Policy"]
    assert (part.status_code, part.data) == (206, body[1000:1010])
    assert (end.status_code, end.data) == (206, body[-5:])
    assert beyond.status_code == 416
    assert (offered.mimetype, offered.data) == ("application/octet-stream", body)
    assert offered.headers["Content-Disposition"].startswith("attachment")


@pytest.mark.parametrize(
    "media_type", ["text/html", "image/svg+xml", "application/pdf", "image/heic", "video/x-msvideo"]
)
def test_what_a_browser_might_run_or_can_not_show_is_only_offered(
    media_type: str, operator: Operator, engine: Engine, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        _, output_id = add_stored(connection, tmp_path / "out", b"<script>alert(1)</script>", media_type=media_type)

    answer = operator.file(f"/outputs/file/{output_id}")

    assert answer.mimetype == "application/octet-stream"
    assert answer.headers["Content-Disposition"].startswith("attachment")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("media_type", ["text/plain", "application/json", "text/vtt", "application/x-subrip"])
def test_given_a_stored_text_when_it_is_looked_at_then_it_is_shown_as_plain_text_whatever_is_in_it(
    media_type: str, operator: Operator, engine: Engine, tmp_path: Path
) -> None:
    body = b"WEBVTT\n\n<script>alert(1)</script>"
    with engine.begin() as connection:
        _, output_id = add_stored(connection, tmp_path / "out", body, media_type=media_type)

    answer = operator.file(f"/outputs/file/{output_id}")
    offered = operator.file(f"/outputs/file/{output_id}?download=yes")

    assert (answer.data, answer.headers["Content-Type"]) == (body, "text/plain; charset=utf-8")
    assert answer.headers["Content-Disposition"].startswith("inline")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in answer.headers["Content-Security-Policy"]
    assert offered.mimetype == "application/octet-stream"


def test_a_stored_file_that_is_gone_is_said_to_be(operator: Operator, engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        _, output_id = add_stored(connection, tmp_path / "out", b"bytes")
    (tmp_path / "out" / "1.png").unlink()

    answer = operator.file(f"/outputs/file/{output_id}")

    assert answer.status_code == 404
    assert "fetch-worker verify" in answer.text


def test_the_gallery_shows_what_is_stored_newest_first_of_all_jobs_or_of_one(
    operator: Operator, engine: Engine, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        added = [add_stored(connection, tmp_path / "out", b"bytes", remote_id=str(number)) for number in range(30)]
        add_output(connection, added[0][0], 1)
        film = add_stored(connection, tmp_path / "out", b"film", remote_id="f", media_type="video/mp4")

    text = operator.client.get("/outputs/gallery/").text
    one = operator.client.get(f"/outputs/gallery/?job={added[3][0]}").text

    pictures = [int(found) for found in re.findall(r'<img loading="lazy" src="/outputs/file/(\d+)"', text)]
    assert pictures == [output_id for _, output_id in added[::-1]][:23]
    assert f'<video controls preload="none" src="/outputs/file/{film[1]}">' in text
    assert re.findall(r'<img loading="lazy" src="/outputs/file/(\d+)"', one) == [str(added[3][1])]


def test_outputs_are_found_by_status_code_host_and_job(operator: Operator, engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        job_id, stored = add_stored(connection, tmp_path / "out", b"bytes")
        other = add_downloading(connection, "2")
        waiting = add_output(connection, other, error_code="unreachable", url="https://other.test/a.png")
        gone = add_output(connection, other, 1, status="failed", due_at=None, error_code="gone")

    def found(query: str) -> list[int]:
        text = operator.client.get(f"/outputs/?{query}").text
        rows = re.findall(r"<tr><td>(?:<a [^>]*>)?(\d+)", text)
        return [int(row) for row in rows]

    assert found("") == [gone, waiting, stored]
    assert found("status=stored") == [stored]
    assert found("status=pending") == [waiting]
    assert found("status=failed") == [gone]
    assert found("code=unreachable") == [waiting]
    assert found("code=gone") == [gone]
    assert found("host=other.test") == [waiting]
    assert found("host=cdn.test") == [gone, stored]
    assert found("host=cdn%25") == []
    assert found(f"job={job_id}") == [stored]


def test_pictures_of_any_size_and_kind_have_their_place() -> None:
    kept = {value.type for value in vars(core_media).values() if isinstance(value, Media)}
    kept |= {"image/png", "image/jpeg", "image/gif", "image/webp"}

    shown = {kind: as_what(kind, 10) for kind in kept}

    assert {kind for kind, how in shown.items() if how == "picture"} == PICTURES
    assert {how for kind, how in shown.items() if kind in ("image/heic", "video/x-matroska")} == {"file"}
    assert as_what("image/png", PICTURE_BYTES_MOST + 1) == "file"
    assert as_what(None, None) == "file"


# ── plots ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.every_python
def test_plots_are_pictures_of_what_was_written_down(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        minute = database_now(connection).replace(second=0, microsecond=0)
        for back in range(60):
            body = {
                "jobs": {"pending": back}, "oldest_due": 0.5, "delay": {"1": 6_000 - 100 * back},
                "accounts": {"a<b": {"rps": 10, "held": False, "answers": 6_000 - 100 * back}},
                "finished": {"completed": 6_000 - 100 * back},
            }  # fmt: skip
            connection.execute(insert(history).values(minute=minute - timedelta(minutes=back), body=json.dumps(body)))

    drawn = {
        name: operator.client.get(f"/plots/picture/{name}.svg").text
        for name in ("delay", "requests", "waiting", "ended", "late")
    }

    assert all(text.startswith("<svg") and "<path" in text for text in drawn.values())
    assert all("script" not in text for text in drawn.values())
    assert "a&lt;b, allowed" in drawn["requests"]
    assert "95 % within" in drawn["delay"]


def test_plots_without_any_history_say_so(operator: Operator) -> None:
    assert "nothing was written down" in operator.client.get("/plots/picture/delay.svg?span=week").text


def test_the_rate_in_force_is_as_the_workers_wrote_it_down(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        add_job(connection)
        minute = database_now(connection).replace(second=0, microsecond=0)
        body = {"accounts": {"default": {"rps": 2.5, "held": False, "answers": 0}}}
        connection.execute(insert(history).values(minute=minute, body=json.dumps(body)))

    assert "2.5" in operator.page("/accounts/")
