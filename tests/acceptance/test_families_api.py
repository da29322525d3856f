"""Tests of the fake API with all families that the acceptance programs use."""

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.acceptance.families import FamiliesApi
from tests.acceptance.families_api import ENDINGS, FAMILIES, SECONDS, content
from tests.acceptance.main_job import KEY
from worker.core.media.signatures import is_complete, sniff


@pytest.fixture(scope="module")
def ordered() -> Iterator[FamiliesApi]:
    """Start the API and order one job of each family. All jobs are ready."""
    with FamiliesApi() as api:
        for family in FAMILIES:
            api.order(family)
        time.sleep(SECONDS + 0.1)
        yield api


def ask(api: FamiliesApi, method: str, path: str, **body: object) -> tuple[int, dict[str, object]]:
    with closing(http.client.HTTPConnection("127.0.0.1", api.port, timeout=5)) as connection:
        connection.request(method, path, json.dumps({"key": KEY, **body}))
        response = connection.getresponse()
        return response.status, json.loads(response.read())


@pytest.mark.parametrize("index", range(len(FAMILIES)), ids=[family.order for family in FAMILIES])
def test_a_job_is_found_only_at_its_own_url_and_with_its_own_method(ordered: FamiliesApi, index: int) -> None:
    family, order = FAMILIES[index], ordered.orders()[index]
    path = f"/api/{family.fetch.replace('{id}', order.remote_id)}"
    parameters = {family.id_field: order.remote_id} if family.id_field else {}

    answer = ask(ordered, family.method, path, **parameters)
    by_other_method = ask(ordered, "POST" if family.method == "GET" else "GET", path, **parameters)
    at_wrong_path = ask(ordered, "POST", f"/api/v33/fetch/{order.remote_id}")

    assert (answer[0], answer[1]["status"]) == (200, "success")
    assert by_other_method[0] == at_wrong_path[0] == 404
    assert "status" not in at_wrong_path[1]


@pytest.mark.parametrize("media_type", ENDINGS)
def test_a_file_is_complete_and_depends_on_the_text(media_type: str) -> None:
    data = content(media_type, "one")
    media = sniff(data)

    assert data != content(media_type, "two")
    if not media_type.startswith(("text/", "application/")):
        assert media is not None
        assert media.type == media_type
        assert is_complete(media, data, data, len(data))


def test_a_wrong_key_and_an_unknown_id_are_answered_as_documented(ordered: FamiliesApi) -> None:
    interior = next(order for order in ordered.orders() if FAMILIES[order.family].order == "v6/interior/make")

    refused = ask(ordered, "POST", f"/api/v6/interior/fetch/{interior.remote_id}", key="wrong")[1]
    unknown = ask(ordered, "POST", "/api/v6/interior/fetch/1")[1]

    assert refused["message"] == "Invalid Api Key"
    assert (unknown["status"], unknown["message"]) == ("failed", "Request not found")
