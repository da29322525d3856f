"""The examples in a real browser: from the form to the picture, with a real server, worker and stand-in of the API."""

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
from worker.client import hooks
from worker.sandbox import Sandbox, SandboxOptions
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.store.schema import jobs, outputs

HERE = Path(__file__).parent
FETCH_WORKER = re.compile(r"(?<![.\w])(track|get|open_output|output_url|job\.progress)\(|^from worker import")
ALL_QUEUES = "fetch-worker,fetch-worker.polls,fetch-worker.downloads"
SERVERS = {
    "fastapi": ("-m", "uvicorn", "--app-dir", str(HERE), "fastapi_app:app", "--port", "{port}"),
    "flask": ("-m", "flask", "--app", str(HERE / "flask_app.py"), "run", "--port", "{port}"),
    "django": (str(HERE / "django_app.py"), "runserver", "--noreload", "127.0.0.1:{port}"),
}


@contextmanager
def served(name: str, port: int, folder: Path) -> Iterator[str]:
    """An example in a server process of its own; its address."""
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        words = [word.format(port=port) for word in SERVERS[name]]
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
        process = subprocess.Popen([sys.executable, *words], cwd=folder, stdout=out, stderr=out, env=environment)
    try:
        until = time.monotonic() + 30
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
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
    """A headless Chromium that reaches this machine alone."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        missing("chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = str(program)
    for word in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=900,1100"),
        *("--disable-background-networking", "--no-first-run", "--disable-component-update"),
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(word)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield made
    made.quit()


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
            said, bars = watched(browser, tmp_path)
            browser.save_screenshot(str(tmp_path / "stored.png"))
            width, source = browser.execute_script(
                "const image = document.images[0]; return [image.naturalWidth, image.src]"
            )
            with engine.connect() as connection:
                reference = connection.execute(select(jobs.c.reference)).scalar_one()
                sha256 = connection.execute(select(outputs.c.sha256)).scalar_one()
            hook = hooks.hook_url(f"{address}/api-hook", reference)
            called = [requests.post(url, timeout=10).status_code for url in (hook, hook[:-1] + "z")]
            shown = requests.get(source, timeout=10).content
            absent = requests.get(f"{address}/pictures/4711", timeout=10).status_code
    hooks._keys.cache_clear()
    engine.dispose()

    assert width == 320
    assert hashlib.sha256(shown).hexdigest() == sha256
    assert re.fullmatch(r"Even chances: within \d+ s\. Nine of ten: within \d+ s\.", said[0]), said
    assert said[-1] == "completed"
    assert bars == sorted(bars)
    assert 0.0 < bars[0] < 0.9
    assert bars[-1] == 1.0
    assert called == [204, 404]
    assert absent == 404


def watched(browser: webdriver.Chrome, folder: Path) -> tuple[list[str], list[float]]:
    """What the page said until it was over, and how far its bar was each time."""
    said, bars = list[str](), list[float]()

    def over(page: Any) -> bool:
        text, bar, loaded = page.execute_script(
            "return [document.querySelector('p').textContent, document.querySelector('progress').value,"
            " document.images.length > 0 && document.images[0].complete]"
        )
        if text and text != "Sent.":
            if not said:
                page.save_screenshot(str(folder / "waiting.png"))
            said.append(text)
            bars.append(bar)
        return bool(text == "completed" and loaded)

    WebDriverWait(browser, 30, poll_frequency=0.1).until(over)
    return said, bars


def test_five_lines_of_the_fastapi_app_are_about_tracking() -> None:
    lines = (HERE / "fastapi_app.py").read_text(encoding="utf-8").partition("PAGE =")[0].splitlines()

    own = [line.strip() for line in lines if FETCH_WORKER.search(line) and "@app" not in line]

    assert 4 <= len(own) <= 5, own
