"""The example apps in a real browser, with a real server, a worker and the stand-in of the API."""

import base64
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from sqlalchemy import select
from sqlalchemy.engine import make_url

from tests.servers import celery_worker, free_port, missing
from tests.waiting import wait_until
from worker.client import hooks
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs, outputs

HERE = Path(__file__).parent
FETCH_WORKER = re.compile(
    r"(?<![.\w])(order|get|get_output|open_output|output_url|job\.progress)\(|^from worker import"
)
ALL_QUEUES = "fetch-worker,fetch-worker.polls,fetch-worker.downloads"
SERVERS = {
    "fastapi": ("-m", "uvicorn", "--app-dir", str(HERE), "fastapi_app:app", "--port", "{port}"),
    "flask": ("-m", "flask", "--app", str(HERE / "flask_app.py"), "run", "--port", "{port}"),
    "django": (str(HERE / "django_app.py"), "runserver", "--noreload", "127.0.0.1:{port}"),
}


@contextmanager
def served(name: str, port: int, folder: Path) -> Iterator[str]:
    """Run an example in a server process. Yields its URL."""
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        arguments = [argument.format(port=port) for argument in SERVERS[name]]
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
        process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=out, stderr=out, env=environment)
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """A headless Chromium that can reach only this machine."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        missing("chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = str(program)
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=900,1100"),
        *("--disable-background-networking", "--no-first-run", "--disable-component-update"),
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield chrome
    chrome.quit()


@pytest.mark.server
@pytest.mark.parametrize("name", SERVERS)
def test_a_prompt_becomes_a_picture_in_the_page(
    name: str, browser: webdriver.Chrome, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/app.db"))
    migrate(engine)
    with Sandbox(SandboxOptions(key="k", min_seconds=3.0, max_seconds=3.0, size=320)) as api:
        environment: dict[str, str] = {
            "DATABASE_URL": f"sqlite:///{tmp_path}/app.db",
            "REDIS_URL": redis_url,
            "SD_API_URL": api.url,
            "SD_API_KEY": "k",
            "POLL_MIN": "0.5",
            "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8",
            "PUBLIC_URL": f"http://127.0.0.1:{port}",
            "WEBHOOK_SECRET": "whsec_" + base64.b64encode(b"w" * 32).decode(),
        }
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        hooks._keys.cache_clear()
        with celery_worker(tmp_path, "--queues", ALL_QUEUES), served(name, port, tmp_path) as address:
            browser.get(address)
            browser.find_element(By.NAME, "prompt").send_keys("mountain lake at dawn")
            browser.find_element(By.TAG_NAME, "button").click()
            messages, bars = watch(browser, tmp_path)
            browser.save_screenshot(str(tmp_path / "stored.png"))
            width, source = browser.execute_script(
                "const image = document.images[0]; return [image.naturalWidth, image.src]"
            )
            with engine.connect() as connection:
                job_id, reference = connection.execute(select(jobs.c.id, jobs.c.reference)).one()
                sha256 = connection.execute(select(outputs.c.sha256)).scalar_one()
            hook = hooks.hook_url(f"{address}/api-hook", reference)
            statuses = [requests.post(url, timeout=10).status_code for url in (hook, hook[:-1] + "z")]
            cookies = {cookie["name"]: cookie["value"] for cookie in browser.get_cookies()}
            picture = requests.get(source, cookies=cookies, timeout=10)
            own_pages = {f"{address}/pictures/{job_id}": 200, source: 200}
            unknown = {f"{address}/pictures/4711": 404, f"{address}/outputs/4711": 404}
            own_statuses = {
                url: requests.get(url, cookies=cookies, timeout=10).status_code for url in own_pages | unknown
            }
            foreign_statuses = {requests.get(url, timeout=10).status_code for url in own_pages | unknown}
    hooks._keys.cache_clear()
    engine.dispose()

    assert width == 320
    assert hashlib.sha256(picture.content).hexdigest() == sha256
    assert (picture.headers["Content-Type"], picture.headers["X-Content-Type-Options"]) == ("image/png", "nosniff")
    assert own_statuses == own_pages | unknown
    assert foreign_statuses == {404}
    assert re.fullmatch(r"Half of such jobs: within \d+ s\. 90 %: within \d+ s\.", messages[0]), messages
    assert messages[-1] == "completed"
    assert bars == sorted(bars)
    assert 0.0 <= bars[0] < 0.9
    assert bars[-1] == 1.0
    assert statuses == [204, 404]


@pytest.mark.server
@pytest.mark.parametrize("name", SERVERS)
def test_an_order_that_fails_is_never_a_500(
    name: str, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by the API, too large, incomplete, and no tables."""
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/app.db"))
    migrate(engine)
    environment: dict[str, str] = {
        "SD_API_KEY": "k",
        "REDIS_URL": redis_url,
        "WEBHOOK_SECRET": "whsec_" + base64.b64encode(b"w" * 32).decode(),
    }
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)

    with Sandbox(SandboxOptions(key="k", scenarios=("refused-order",))) as api, requests.Session() as visitor:
        monkeypatch.setenv("SD_API_URL", api.url)
        monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/app.db")
        job: dict[str, Any] = {}
        with celery_worker(tmp_path, "--queues", ALL_QUEUES), served(name, free_port(), tmp_path) as address:
            visitor.get(address, timeout=30)  # for its cookie
            posted = f"{address}/pictures"
            job_id = visitor.post(posted, json={"prompt": "a lake"}, timeout=30).json()["id"]

            def is_final() -> bool:
                job.update(visitor.get(f"{posted}/{job_id}", timeout=30).json())
                return bool(job["phase"] == "final")

            wait_until(is_final, "the order is refused", seen=lambda: job)
            too_large = visitor.post(posted, json={"prompt": "x" * 9_000_000}, timeout=30)
            malformed = visitor.post(posted, json={}, timeout=30)
        monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/without-tables.db")
        with served(name, free_port(), tmp_path) as address:
            without_tables = visitor.post(f"{address}/pictures", json={"prompt": "a lake"}, timeout=30)
    engine.dispose()

    assert (job["status"], bool(job["error"])) == ("failed", True)
    assert malformed.status_code in (400, 422)
    assert too_large.status_code in (400, 413, 422)  # Django refuses such a body itself
    assert (without_tables.status_code, without_tables.json()["error"]) == (
        503,
        "Pictures can't be ordered now. Try again.",
    )
    assert api.charges.charged == 0


def watch(browser: webdriver.Chrome, folder: Path) -> tuple[list[str], list[float]]:
    """Watch the page until the job is completed. Return its messages and the values of its progress bar."""
    messages, bars = list[str](), list[float]()

    def is_completed(page: Any) -> bool:
        text, bar, loaded = page.execute_script(
            "return [document.querySelector('p').textContent, document.querySelector('progress').value,"
            " document.images.length > 0 && document.images[0].complete]"
        )
        if text and text != "Sent.":
            if not messages:
                page.save_screenshot(str(folder / "waiting.png"))
            messages.append(text)
            bars.append(bar)
        return bool(text == "completed" and loaded)

    WebDriverWait(browser, 30, poll_frequency=0.1).until(is_completed)
    return messages, bars


def test_the_fastapi_app_needs_six_lines_of_fetch_worker() -> None:
    lines = (HERE / "fastapi_app.py").read_text(encoding="utf-8").partition("PAGE =")[0].splitlines()

    own_lines = [line.strip() for line in lines if FETCH_WORKER.search(line) and "@app" not in line]

    assert 5 <= len(own_lines) <= 6, own_lines
