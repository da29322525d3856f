"""The README: its first two commands are right, and its examples run. The manual is tested in tests/docs."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from sqlalchemy.engine import make_url

from tests.django_site import configure_django
from tests.docs.manual import README, ROOT, blocks
from worker import get, order
from worker.store.engine import make_engine
from worker.store.migrate import migrate
from worker.testing import FetchApi, FetchWorker

SHELL = blocks("sh", README)
NAMES = {
    "json": json,
    "asdict": asdict,
    "get": get,
    "order": order,
    "Annotated": Annotated,
}


def test_the_first_two_commands_are_the_demo_and_the_tests() -> None:
    assert [block.strip() for block in SHELL[:2]] == [
        "python3 worker/bootstrap.py demo",
        "python3 worker/bootstrap.py test",
    ]


def test_ci_runs_the_readmes_test_line() -> None:
    assert SHELL[1].strip() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_first_example_runs_unchanged(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/readme.db"
    engine = make_engine(make_url(url))
    migrate(engine)
    engine.dispose()
    script = tmp_path / "app.py"
    script.write_text(blocks("python", README)[0], encoding="utf-8")

    environment = os.environ | {"DATABASE_URL": url}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)

    assert (result.returncode, result.stdout) == (0, "ordered\n"), result.stderr


def _example(title: str, **names: Any) -> dict[str, Any]:
    """Execute the example below this title, with the imports of the whole app."""
    block = blocks("python", README.split(f"{title}:\n\n", 1)[1])[0]
    namespace = NAMES | names
    exec(compile(block, title, "exec"), namespace)  # noqa: S102  # the README's own example
    return namespace


def test_the_fastapi_example_orders_a_picture(fetch_api: FetchApi, fetch_worker: FetchWorker) -> None:
    from fastapi import Body, FastAPI

    names = _example("FastAPI", app=FastAPI(), Body=Body)
    job_id = names["submit"]("a lake at dawn")["id"]
    assert names["picture"](job_id)["phase"] == "ordered"

    fetch_worker.run(job_id)

    assert names["picture"](job_id)["phase"] == "final"


def test_the_flask_example_orders_a_picture(fetch_api: FetchApi, fetch_worker: FetchWorker) -> None:
    from flask import Flask, request

    client = _example("Flask", app=Flask("shop"), request=request)["app"].test_client()
    job_id = client.post("/pictures", json={"prompt": "a lake at dawn"}).get_json()["id"]

    fetch_worker.run(job_id)

    assert client.get(f"/pictures/{job_id}").get_json()["phase"] == "final"


def test_the_django_example_orders_a_picture(fetch_api: FetchApi, fetch_worker: FetchWorker) -> None:
    from django.http import JsonResponse
    from django.test import RequestFactory
    from django.urls import path

    configure_django()
    names = _example("Django", JsonResponse=JsonResponse, path=path)
    body = json.dumps({"prompt": "a lake at dawn"})
    posted = names["submit"](RequestFactory().post("/pictures", body, content_type="application/json"))
    job_id = json.loads(posted.content)["id"]

    fetch_worker.run(job_id)

    assert json.loads(names["picture"](RequestFactory().get("/"), job_id).content)["phase"] == "final"
