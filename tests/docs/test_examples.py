"""The examples of the manual run, or at least compile and import what is there."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from tests.django_site import configure_django
from tests.docs.manual import PAGES, TEXTS, block_with, blocks
from tests.servers import celery_worker
from worker.client import tracking
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.testing import FetchApi, FetchWorker

EXAMPLES = [(name, block) for name, text in TEXTS.items() for block in blocks("python", text)]
WEB_APPS = PAGES["web-apps"]


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Migrated tables that DATABASE_URL names."""
    url = f"sqlite:///{tmp_path}/manual.db"
    engine = make_engine(make_url(url))
    migrate(engine)
    engine.dispose()
    monkeypatch.setenv("DATABASE_URL", url)
    return url


def run(block: str, **names: Any) -> dict[str, Any]:
    """Execute an example; the names that it defines."""
    exec(compile(block, "example", "exec"), names)  # noqa: S102  # the manual's own example
    return names


@pytest.mark.parametrize(
    ("name", "block"), EXAMPLES, ids=[f"{name}-{place}" for place, (name, _) in enumerate(EXAMPLES)]
)
def test_an_example_compiles_and_its_imports_exist(name: str, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.endswith("django"):
                continue  # it needs Django's settings, and runs below
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{name}: {node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


@pytest.mark.parametrize("name", TEXTS)
def test_the_shell_examples_are_valid_and_the_json_can_be_read(name: str) -> None:
    for block in blocks("sh", TEXTS[name]):
        process = subprocess.run(["sh", "-n"], input=block, text=True, capture_output=True, check=False)
        assert process.returncode == 0, process.stderr
    for block in blocks("json", TEXTS[name]):
        json.loads(block)


def test_the_first_example_runs_as_it_stands(database: str, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(blocks("python", WEB_APPS)[0], encoding="utf-8")

    process = subprocess.run(
        [sys.executable, script], env=dict(os.environ), capture_output=True, text=True, check=False
    )

    assert process.returncode == 0, process.stderr


def test_the_fastapi_app_takes_a_prompt_to_a_picture(fetch_api: FetchApi, fetch_worker: FetchWorker) -> None:
    names = run(block_with("FastAPI()\n\n\n@app.post", WEB_APPS))
    job_id = names["submit"]("a lake at dawn")["id"]
    assert names["picture"](job_id)["phase"] == "ordered"

    fetch_worker.run(job_id)

    shown = names["picture"](job_id)
    assert (shown["phase"], shown["fraction"], len(shown["stored"])) == ("final", 1.0, 1)
    assert names["output"](shown["stored"][0]).body.startswith(b"\x89PNG")


def test_the_flask_app_takes_a_prompt_to_a_picture(fetch_api: FetchApi, fetch_worker: FetchWorker) -> None:
    client = run(block_with("abort, request, send_file", WEB_APPS), __name__="shop")["app"].test_client()
    job_id = client.post("/pictures", json={"prompt": "a lake at dawn"}).get_json()["id"]

    fetch_worker.run(job_id)

    shown = client.get(f"/pictures/{job_id}").get_json()
    assert shown["status"] == "completed"
    with client.get(f"/outputs/{shown['stored'][0]}") as picture:
        assert picture.data.startswith(b"\x89PNG")
    assert client.get("/pictures/4711").status_code == 404


def test_the_django_views_take_a_prompt_to_a_picture(
    fetch_api: FetchApi, fetch_worker: FetchWorker, django_requests: Any
) -> None:
    names = run(block_with("urlpatterns", WEB_APPS))
    prompt = json.dumps({"prompt": "a lake at dawn"})
    posted = names["submit"](django_requests.post("/pictures", prompt, content_type="application/json"))
    job_id = json.loads(posted.content)["id"]

    fetch_worker.run(job_id)

    shown = json.loads(names["picture"](django_requests.get("/"), job_id).content)
    assert shown["status"] == "completed"
    with closing(names["output"](django_requests.get("/"), shown["stored"][0])) as picture:
        assert b"".join(picture).startswith(b"\x89PNG")


@pytest.fixture
def django_requests() -> Any:
    """A factory of Django's requests."""
    from django.test import RequestFactory

    configure_django()
    return RequestFactory()


def test_the_celery_example_runs_as_it_stands(
    database: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    with celery_worker(tmp_path, "--queues", "fetch-worker"):
        names = run(block_with("Celery(", WEB_APPS), REDIS_URL=redis_url)

    assert isinstance(names["order_id"], int)
    assert names["order_id"] != names["job_id"]


def test_stored_outputs_are_read_as_the_manual_says(fetch_api: FetchApi, fetch_worker: FetchWorker) -> None:
    job_id = tracking.track(fetch_api.submit("a lake at dawn"))
    fetch_worker.run(job_id)

    names = run(block_with("output_url", PAGES["outputs"]), job_id=job_id)

    assert names["picture"].startswith(b"\x89PNG")
    assert names["address"].startswith("file:///")


def test_the_hooks_are_mounted_as_the_manual_says(fetch_api: FetchApi, django_requests: Any) -> None:
    """`hook_url` needs WEBHOOK_SECRET, which the test kit sets."""
    page = PAGES["callbacks"]
    names = run(block_with("hook_url", page))
    assert names["payload"]["webhook"].startswith("https://shop.example/api-hook/order-77/")

    assert run(block_with("app.mount", page))["app"].routes
    flask = run(block_with("register_blueprint", page), __name__="shop")["app"]
    assert any(rule.rule.startswith("/api-hook/") for rule in flask.url_map.iter_rules())
    assert len(run(block_with("include(", page))["urlpatterns"]) == 1


def test_the_tests_of_the_test_kit_run_as_they_stand(tmp_path: Path) -> None:
    _pytest(tmp_path, block_with("fetch_worker.told", PAGES["test-kit"]), "4 passed")
    _pytest(tmp_path, block_with("def test_a_video", PAGES["test-kit"]), "1 passed")


def test_the_kit_works_without_pytest(tmp_path: Path) -> None:
    script = tmp_path / "kit.py"
    script.write_text(block_with("worker.testing.kit", PAGES["test-kit"]), encoding="utf-8")

    process = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert process.returncode == 0, process.stderr


def test_every_name_of_the_test_kit_exists(fetch_api: FetchApi, fetch_worker: FetchWorker) -> None:
    page = PAGES["test-kit"]
    for title, fixture in (("`fetch_worker`", fetch_worker), ("`fetch_api`", fetch_api)):
        part = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
        for name in re.findall(r"^\| `(\w+)", part, re.MULTILINE):
            assert name in dir(fixture), f"{title} {name}"


def test_the_test_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    _pytest(tmp_path, block_with("def test_", TEXTS["README"]), "1 passed")


def _pytest(folder: Path, text: str, result: str) -> None:
    (folder / "test_app.py").write_text(text, encoding="utf-8")
    options = ["-p", "worker.testing.plugin", "-p", "no:cacheprovider", "-q", "--rootdir", str(folder)]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=folder,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result in process.stdout, process.stdout + process.stderr
