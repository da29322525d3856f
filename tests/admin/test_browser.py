"""The admin page in a real browser, served by the command on a real port."""

import json
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from selenium import webdriver
from sqlalchemy import Engine, insert

from tests import browsers
from tests.admin_pages import add_stored
from tests.admin_server import served
from tests.browsers import Reader
from tests.rows import NOW, add_job, add_process, read_job
from tests.waiting import wait_until
from worker.sandbox.pictures import draw
from worker.store.engine import database_now
from worker.store.schema import breakers, history

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("interruptible")]

PASSWORD = "a password for the browser"
RIGHT_EDGES = """
return [...document.querySelectorAll(".rows .state, main button")].map((part) => part.getBoundingClientRect().right)
"""


@pytest.fixture
def engine(sqlite_engine: Engine) -> Engine:
    """The database of the command."""
    return sqlite_engine


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A headless Chromium that can reach only this machine."""
    with browsers.chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_an_operator_logs_in_finds_and_changes_jobs_views_pictures_and_logs_out(
    chromium: webdriver.Chrome, engine: Engine, redis_url: str, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        now = database_now(connection)
        failed = {"status": "failed", "due_at": None, "completed_at": NOW, "error_code": "api_failed"}
        waiting = [add_job(connection, f"w{number}", due_at=now + timedelta(hours=1)) for number in range(3)]
        dead = add_job(connection, "dead", **failed, error_message="<b>gave up</b>", reference="order-12")
        ended, _ = add_stored(connection, tmp_path / "out", draw("a lake", "1", 0, 128), remote_id="done")
    with served(tmp_path, redis_url, ADMIN_PASSWORD=PASSWORD) as (address, log):
        reader = Reader(chromium, address)
        reader.open("/jobs/?status=failed")
        login_url = chromium.current_url
        reader.log_in("wrong")
        refused = reader.first("[role=alert]").text
        time.sleep(0.6)  # the server's own clock makes the next guess wait
        reader.log_in(PASSWORD)
        first = reader.jobs()

        reader.open("/jobs/")
        reader.first("input[name=search]").send_keys("order-12")
        reader.press(".filters button")
        search_result = reader.jobs()
        reader.press(f"a[href='/jobs/details/?id={dead}']")
        why = reader.first(".why").text
        reader.press("button[value=retry]")
        question = reader.first("h1").text
        reader.press("#confirm")
        retried = (reader.message(), read_job(engine, dead).status)

        reader.open("/jobs/?status=pending")
        reader.first("[data-chooses]").click()
        reader.press("button[value=cancel]")
        reader.press("main a.button")  # back
        unharmed = read_job(engine, waiting[0]).status
        reader.first("[data-chooses]").click()
        reader.press("button[value=cancel]")
        reader.press("#confirm")
        cancelled = (reader.message(), [read_job(engine, job_id).status for job_id in (*waiting, dead)])

        reader.open("/outputs/gallery/")
        pictures = reader.widths("figure img")
        reader.press("figcaption a")
        of_job = (reader.first("h1").text, reader.widths("figure img"))
        errors = reader.errors()
        reader.press("#logout")
        reader.open("/outputs/gallery/")
        outside = chromium.current_url
    assert login_url.endswith("/login?then=/jobs/?status%3Dfailed")
    assert refused == "The password is wrong."
    assert first == [str(dead)]
    assert search_result == [str(dead)]
    assert why == "api_failed: <b>gave up</b>"
    assert question == "Retry this job?"
    assert retried == ("1 job retried.", "pending")
    assert unharmed == "pending"
    assert cancelled == ("4 jobs cancelled.", ["cancelled"] * 4)
    assert pictures == [128]
    assert of_job == (f"Job {ended} completed", [128])
    assert errors == []
    assert "/login" in outside
    log_text = log.read_text()
    assert f"retry by an operator jobs={dead} changed=1" in log_text
    assert "wrong password from=127.0.0.1" in log_text
    assert PASSWORD not in log_text


def test_plots_are_drawn_and_pages_fit_a_phone_screen(
    chromium: webdriver.Chrome, engine: Engine, redis_url: str, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        minute = database_now(connection).replace(second=0, microsecond=0)
        for back in range(30):
            body = {"jobs": {"pending": back}, "oldest_due": 0.5, "delay": {"1": 6_000 - 100 * back},
                    "accounts": {"default": {"rps": 10, "held": False, "answers": 6_000 - 100 * back}},
                    "finished": {"completed": 6_000 - 100 * back}}  # fmt: skip
            connection.execute(insert(history).values(minute=minute - timedelta(minutes=back), body=json.dumps(body)))
        job_id, _ = add_stored(connection, tmp_path / "out", draw("a lake", "1", 0, 128), remote_id="done")
        add_job(connection, "a" * 128, reference="b" * 255, kind="c" * 64)
        connection.execute(
            insert(breakers).values(scope="account", name="default", reason="key rejected: no", since=NOW)
        )
    with served(tmp_path, redis_url, ADMIN_PASSWORD=PASSWORD) as (address, _):
        reader = Reader(chromium, address)
        reader.open("/plots/")
        reader.log_in(PASSWORD)
        plots = reader.widths("img.plot")
        too_wide, hidden, narrow_plots = {}, {}, []
        for width in (1280, 400):
            size = {"width": width, "height": 860, "deviceScaleFactor": 1, "mobile": width < 800}
            chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            for path in ("/", "/jobs/", f"/jobs/details/?id={job_id}", f"/jobs/details/?id={job_id + 1}", "/outputs/",
                         "/outputs/gallery/", "/webhooks/", "/accounts/", "/plots/"):  # fmt: skip
                reader.open(path)
                needed = int(chromium.execute_script("return document.documentElement.scrollWidth"))
                if needed > width:
                    too_wide[path, width] = needed
                right = max(chromium.execute_script(RIGHT_EDGES), default=0)
                if right > width:
                    hidden[path, width] = right
                if path == "/plots/":
                    narrow_plots = reader.widths("img.plot")
        chromium.get("about:blank")  # the plots would be loaded again for the wide screen
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        errors = reader.errors()

    assert plots == [640] * 5
    assert narrow_plots == [370] * 5
    assert too_wide == {}
    assert hidden == {}, "states and buttons are visible without scrolling"
    assert errors == []


def test_without_a_configured_password_a_new_one_is_printed(engine: Engine, redis_url: str, tmp_path: Path) -> None:
    with served(tmp_path, redis_url) as (address, log):
        output = log.read_text()

    assert address.startswith("http://127.0.0.1:")
    assert re.fullmatch(r"Admin: log in with [\w-]{16} \(set ADMIN_PASSWORD to choose\)\nAdmin: http://\S+/\n", output)


def test_the_overview_refreshes_by_itself_and_shows_local_times_in_light_and_dark(
    chromium: webdriver.Chrome, engine: Engine, redis_url: str, tmp_path: Path
) -> None:
    chromium.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "Asia/Tokyo"})
    with served(tmp_path, redis_url, ADMIN_PASSWORD=PASSWORD) as (address, _):
        reader = Reader(chromium, address)
        reader.open("/")
        reader.log_in(PASSWORD)
        quiet = reader.first("main").text
        with engine.begin() as connection:
            add_process(connection, name="worker@here", started_at=NOW)
            add_job(connection, due_at=database_now(connection) - timedelta(minutes=5))
        wait_until(lambda: "worker@here" in reader.first("main").text, "the page shows the new process")
        refreshed = reader.first("main").text
        started = reader.first(".rows time")
        times = (started.text, started.get_attribute("title"))
        grounds = {}
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            grounds[scheme] = reader.first("body").value_of_css_property("background-color")
            for width in (1280, 400):
                size = {"width": width, "height": 860, "deviceScaleFactor": 1, "mobile": width < 800}
                chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                chromium.save_screenshot(str(tmp_path / f"overview-{scheme}-{width}.png"))
        errors = reader.errors()

    assert "No trouble" in quiet
    assert "No worker process has recorded itself" in quiet
    assert "1 job due, the oldest for 5 min: a worker process runs, but made no request" in refreshed
    assert "fetch-worker doctor" in refreshed
    assert times == ("2026-03-01 21:00:00", "2026-03-01 12:00:00 UTC")
    assert grounds["light"] != grounds["dark"]
    assert errors == []
