"""The pages on each database: lists, jobs, actions, files and plots, and the secrets they must not show."""

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
from tests.rows import NOW, add_downloading, add_job, add_output, add_process, read_job, seconds
from worker.admin.access import AccessControl
from worker.admin.job_actions import apply_to_jobs
from worker.admin.outputs import MAX_PICTURE_BYTES, PICTURES, display_kind
from worker.admin.site import make_site
from worker.client import actions
from worker.client.job_actions import JOB_ACTIONS
from worker.core.answer_history import NOTE_SEPARATOR
from worker.core.media import signatures as core_media
from worker.core.media.signatures import Media
from worker.errors import Unavailable
from worker.settings import load
from worker.store.engine import database_now
from worker.store.schema import HELD_UNTIL, breakers, events, history, jobs

FAILED: dict[str, Any] = {"status": "failed", "due_at": None, "completed_at": NOW, "error_code": "api_failed"}


def test_jobs_are_listed_newest_first_in_pages(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        ids = [add_job(connection, f"r{number}") for number in range(120)]

    pages, path = [], "/jobs/"
    while path:
        pages.append(operator.ids(path))
        next_link = re.search(r'rel="next" href="([^"]+)"', operator.client.get(path).text)
        path = "" if next_link is None else next_link[1].replace("&amp;", "&")

    assert [len(page) for page in pages] == [50, 50, 20]
    assert [job_id for page in pages for job_id in page] == ids[::-1]


def test_the_overview_links_problems_and_their_jobs_show_what_to_do(operator: Operator, engine: Engine) -> None:
    """An old claim, a job past its deadline and an unreachable host: each is fixed with one action."""
    with engine.begin() as connection:
        now = database_now(connection)
        hours: dict[str, Any] = {"due_at": now + timedelta(hours=4), "asked_at": now - timedelta(minutes=20)}
        stuck = add_job(connection, "1", claim_token="t", claim_holder="0badc0de.7.7", **hours)
        overdue = add_job(connection, "2", deadline_at=now - timedelta(hours=2), **hours)
        trouble: dict[str, Any] = {"due_at": now + timedelta(minutes=9), "error_code": "unreachable"}
        lost = add_downloading(connection, "3")
        add_output(connection, lost, listed_at=now - timedelta(minutes=6), url="https://cdn.test:8443/a?b", **trouble)

    page = operator.client.get("/").text
    for job_id in (stuck, overdue, lost):
        assert f'href="/jobs/details/?id={job_id}"' in page
        assert f"fetch-worker resume {job_id}" in operator.client.get(f"/jobs/details/?id={job_id}").text
        operator.send("/jobs/action/", action="resume", rowid=str(job_id), confirmed="yes", url="/jobs/")
    assert "1 output from cdn.test:8443: unreachable" in operator.page("/")
    assert read_job(engine, stuck).claim_token is None
    assert read_job(engine, overdue).due_at <= now + timedelta(minutes=1)
    assert "1 output from cdn.test:8443: unreachable" in operator.page("/")  # it is tried again, but not stored yet


def test_every_filter_and_search_finds_its_jobs(operator: Operator, engine: Engine) -> None:
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


def test_a_mistyped_account_or_kind_is_reported_with_the_known_names(operator: Operator, engine: Engine) -> None:
    """A name that exists and matches no job is not."""
    with engine.begin() as connection:
        add_job(connection, "1", account="shop", kind="image")

    account, kind = operator.page("/jobs/?account=shpo"), operator.page("/jobs/?kind=%3Cb%3Eimgae")
    nothing = operator.page("/jobs/?account=shop&status=failed")

    assert "There is no account 'shpo'; the known accounts are default, shop." in account
    assert "No job is of the kind '<b>imgae'; the known kinds are image." in kind
    assert "<b>imgae" not in operator.client.get("/jobs/?kind=%3Cb%3Eimgae").text
    assert "known accounts" not in nothing


@pytest.mark.parametrize(
    "query",
    ["status=nonsense", "late=nonsense", "late=99999999999999999", "before=-1", f"before={2**64}", "page=x&sort=9",
     "search=%00", "search=" + "9" * 5_000, "search=%ff", "account=%27%3B--", "held=maybe", "kind=%ed%a0%80"],
)  # fmt: skip
def test_invalid_parameters_still_give_a_page(query: str, operator: Operator) -> None:
    for path in ("/jobs/", "/outputs/", "/outputs/gallery/", "/webhooks/", "/plots/"):
        assert operator.client.get(f"{path}?{query}").status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/jobs/details/", "/jobs/details/?id=x", "/jobs/details/?id=99", "/jobs/details/?id=" + "9" * 40,
     "/outputs/file/99", "/outputs/file/" + "9" * 40, "/assets/..%2fsite.py", "/plots/picture/no.svg"],
)  # fmt: skip
def test_unknown_urls_answer_404(path: str, operator: Operator) -> None:
    assert operator.client.get(path).status_code == 404


def test_the_page_of_a_job_shows_reason_outputs_events_and_answers(operator: Operator, engine: Engine) -> None:
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

    for expected in ("0 of 2 outputs are stored", "unreachable: no route", "cdn.test", "at 12 s: success",
                 "at 4.0 s: processing", "msg_1", "hook.test", "it said 500"):  # fmt: skip
        assert expected in " ".join(text.split())


def test_actions_on_several_jobs_report_their_result(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        waiting = [add_job(connection, f"w{number}") for number in range(3)]
        failed = add_job(connection, "failed", **FAILED)

    assert operator.act("hold", [*waiting, failed]) == "3 jobs held, 1 was not pending or already held."
    assert [read_job(engine, job_id).held_at is not None for job_id in waiting] == [True] * 3
    assert operator.act("resume", waiting[:1]) == "1 job resumed."
    assert operator.act("cancel", [*waiting, failed, 4_711]) == (
        "3 jobs cancelled, 1 was already final, 1 does not exist."
    )
    assert operator.act("retry", [failed]) == "1 job retried."
    assert read_job(engine, failed).status == "pending"
    assert operator.act("retry", waiting) == "0 jobs retried, 3 were neither failed, expired nor uncertain."


def test_a_database_error_between_two_jobs_is_reported_correctly(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        ids = [add_job(connection, f"w{number}") for number in range(4)]
    successes = iter([True, True])

    def cancel_two(job_id: int) -> bool:
        if next(successes, None) is None:
            raise Unavailable("the database does not answer")
        return actions.cancel(job_id)

    result = apply_to_jobs(replace(JOB_ACTIONS["cancel"], work=cancel_two), ids, who="admin")

    assert result == "2 jobs cancelled, 2 not changed: the database does not answer."
    assert [read_job(engine, job_id).status for job_id in ids] == ["cancelled", "cancelled", "pending", "pending"]


def test_nothing_is_changed_before_the_confirmation(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection)

    question = operator.send("/jobs/action/", action="cancel", rowid=job_id)
    no_job = operator.send("/jobs/action/", action="cancel")
    unknown = operator.send("/jobs/action/", action="delete", rowid=job_id, confirmed="yes")
    breaker = operator.send("/accounts/act/", action="hold", scope="account", name="default")

    assert "Cancel this job?" in question.text
    assert "Hold the account default?" in breaker.text
    assert (no_job.status_code, unknown.status_code) == (302, 302)
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
    unknown = operator.send("/accounts/act/", **form, scope="account", name="unknown")

    assert "The account default is held. The host api.test is held." in held
    assert held.count("held by an operator") == 2
    assert unknown.status_code == 404
    assert "The account default is resumed: it is tried at once." in after
    assert after.count("held by an operator") == 1


def test_without_keys_the_page_does_not_claim_that_an_account_has_none(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        job_id = add_job(connection)
        add_process(connection)

    assert "no key" not in operator.page("/") + operator.page(f"/jobs/details/?id={job_id}")


def test_texts_from_outside_are_escaped(operator: Operator, engine: Engine) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>'\""
    with engine.begin() as connection:
        job_id = add_job(connection, **FAILED, reference=evil, error_message=evil, last_answer=evil)
        add_output(connection, job_id, status="failed", due_at=None, error_code="gone", error_message=evil)
        connection.execute(insert(breakers).values(scope="account", name="x", reason=evil, since=NOW))

    for path in ("/", "/jobs/", f"/jobs/details/?id={job_id}", "/outputs/", "/accounts/", "/jobs/?search=%3Cscript%3E"):
        text = operator.client.get(path).text
        assert "<script>" not in text
        assert "<img src=x" not in text


def test_no_page_contains_a_key_a_secret_a_password_or_a_signed_link(
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
        add_job(connection, "2", **FAILED, error_message=f"see {link}", webhook_url=hook)
        connection.execute(
            insert(events).values(
                event_id="msg_1", job_id=job_id, type="job.completed", url=hook, body=hook, status="failed",
                created_at=NOW, ended_at=NOW, error_message=f"{hook} said 500",
            )
        )  # fmt: skip
    keyed = Operator(make_site(load(), AccessControl(PASSWORD, "127.0.0.1")).test_client())
    paths = ("/", "/jobs/", f"/jobs/details/?id={job_id}", f"/jobs/details/?id={job_id + 1}", "/outputs/",
             "/outputs/gallery/", "/webhooks/", "/accounts/", "/plots/", "/plots/picture/delay.svg", "/nowhere",
             "/login", f"/outputs/file/{output_id}")  # fmt: skip

    for path in paths:
        answer = keyed.file(path)
        for content in (answer.text, str(answer.headers)):
            assert "canary" not in content, path
            assert PASSWORD not in content


def test_an_unreachable_database_is_reported_without_its_password(
    site: Flask, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://operator:canary-password@127.0.0.1:9/none")
    client = make_site(load(), AccessControl(PASSWORD, "127.0.0.1")).test_client()
    client.post("/login", data={"password": PASSWORD})

    answer = client.get("/jobs/")

    assert answer.status_code == 503
    assert "does not answer" in answer.text
    assert "canary" not in answer.text


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stored_file_is_sent_whole_or_in_ranges_in_a_sandbox(
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
    download = operator.file(f"{path}?download=yes")

    assert (whole.data, whole.mimetype) == (body, "video/mp4")
    assert whole.headers["Content-Disposition"] == f'inline; filename="job-{job_id}-0.mp4"'
    assert "sandbox" in whole.headers["Content-Security-Policy"]
    assert (part.status_code, part.data) == (206, body[1000:1010])
    assert (end.status_code, end.data) == (206, body[-5:])
    assert beyond.status_code == 416
    assert (download.mimetype, download.data) == ("application/octet-stream", body)
    assert download.headers["Content-Disposition"].startswith("attachment")


@pytest.mark.parametrize(
    "media_type", ["text/html", "image/svg+xml", "application/pdf", "image/heic", "video/x-msvideo"]
)
def test_unsafe_media_types_are_only_downloads(
    media_type: str, operator: Operator, engine: Engine, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        _, output_id = add_stored(connection, tmp_path / "out", b"<script>alert(1)</script>", media_type=media_type)

    answer = operator.file(f"/outputs/file/{output_id}")

    assert answer.mimetype == "application/octet-stream"
    assert answer.headers["Content-Disposition"].startswith("attachment")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("media_type", ["text/plain", "application/json", "text/vtt", "application/x-subrip"])
def test_given_a_stored_text_when_it_is_opened_then_it_is_sent_as_plain_text(
    media_type: str, operator: Operator, engine: Engine, tmp_path: Path
) -> None:
    body = b"WEBVTT\n\n<script>alert(1)</script>"
    with engine.begin() as connection:
        _, output_id = add_stored(connection, tmp_path / "out", body, media_type=media_type)

    answer = operator.file(f"/outputs/file/{output_id}")
    download = operator.file(f"/outputs/file/{output_id}?download=yes")

    assert (answer.data, answer.headers["Content-Type"]) == (body, "text/plain; charset=utf-8")
    assert answer.headers["Content-Disposition"].startswith("inline")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in answer.headers["Content-Security-Policy"]
    assert download.mimetype == "application/octet-stream"


def test_a_missing_file_answers_404_with_advice(operator: Operator, engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        _, output_id = add_stored(connection, tmp_path / "out", b"bytes")
    (tmp_path / "out" / "1.png").unlink()

    answer = operator.file(f"/outputs/file/{output_id}")

    assert answer.status_code == 404
    assert "fetch-worker verify" in answer.text


def test_the_gallery_shows_stored_outputs_of_all_jobs_or_of_one(
    operator: Operator, engine: Engine, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        added = [add_stored(connection, tmp_path / "out", b"bytes", remote_id=str(number)) for number in range(30)]
        add_output(connection, added[0][0], 1)
        film = add_stored(connection, tmp_path / "out", b"film", remote_id="f", media_type="video/mp4")

    text = operator.client.get("/outputs/gallery/").text
    of_one_job = operator.client.get(f"/outputs/gallery/?job={added[3][0]}").text

    pictures = [int(output_id) for output_id in re.findall(r'<img loading="lazy" src="/outputs/file/(\d+)"', text)]
    assert pictures == [output_id for _, output_id in added[::-1]][:23]
    assert f'<video controls preload="none" src="/outputs/file/{film[1]}">' in text
    assert re.findall(r'<img loading="lazy" src="/outputs/file/(\d+)"', of_one_job) == [str(added[3][1])]


def test_outputs_are_found_by_status_code_host_and_job(operator: Operator, engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        job_id, stored = add_stored(connection, tmp_path / "out", b"bytes")
        other = add_downloading(connection, "2")
        waiting = add_output(connection, other, error_code="unreachable", url="https://other.test/a.png")
        gone_id = add_output(connection, other, 1, status="failed", due_at=None, error_code="gone")

    def find(query: str) -> list[int]:
        text = operator.client.get(f"/outputs/?{query}").text
        rows = re.findall(r"<tr><td>(?:<a [^>]*>)?(\d+)", text)
        return [int(row) for row in rows]

    assert find("") == [gone_id, waiting, stored]
    assert find("status=stored") == [stored]
    assert find("status=pending") == [waiting]
    assert find("status=failed") == [gone_id]
    assert find("code=unreachable") == [waiting]
    assert find("code=gone") == [gone_id]
    assert find("host=other.test") == [waiting]
    assert find("host=cdn.test") == [gone_id, stored]
    assert find("host=cdn%25") == []
    assert find(f"job={job_id}") == [stored]


def test_every_media_type_has_a_display_kind() -> None:
    media_types = {value.type for value in vars(core_media).values() if isinstance(value, Media)}
    media_types |= {"image/png", "image/jpeg", "image/gif", "image/webp"}

    kinds = {media_type: display_kind(media_type, 10) for media_type in media_types}

    assert {media_type for media_type, kind in kinds.items() if kind == "picture"} == PICTURES
    assert {kind for media_type, kind in kinds.items() if media_type in ("image/heic", "video/x-matroska")} == {"file"}
    assert display_kind("image/png", MAX_PICTURE_BYTES + 1) == "file"
    assert display_kind(None, None) == "file"


# ── plots ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.every_python
def test_plots_show_the_recorded_history(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        minute = database_now(connection).replace(second=0, microsecond=0)
        for back in range(60):
            body = {
                "jobs": {"pending": back}, "oldest_due": 0.5, "delay": {"1": 6_000 - 100 * back},
                "accounts": {"a<b": {"rps": 10, "held": False, "answers": 6_000 - 100 * back}},
                "finished": {"completed": 6_000 - 100 * back},
            }  # fmt: skip
            connection.execute(insert(history).values(minute=minute - timedelta(minutes=back), body=json.dumps(body)))

    plots = {
        name: operator.client.get(f"/plots/picture/{name}.svg").text
        for name in ("delay", "requests", "waiting", "ended", "late")
    }

    assert all(text.startswith("<svg") and "<polyline" in text for text in plots.values())
    assert all("script" not in text for text in plots.values())
    assert "a&lt;b, allowed" in plots["requests"]
    assert "95 % within" in plots["delay"]


def test_plots_without_history_say_so(operator: Operator) -> None:
    assert "nothing was recorded" in operator.client.get("/plots/picture/delay.svg?span=week").text


def test_the_current_rate_is_the_one_that_the_workers_recorded(operator: Operator, engine: Engine) -> None:
    with engine.begin() as connection:
        add_job(connection)
        add_process(connection, accounts={"default": 2.5})

    assert "2.5" in operator.page("/accounts/")
