"""The API of all families that acceptance runs against: strict about addresses and methods, its files whole."""

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.acceptance.families import Api
from tests.acceptance.families_api import ENDINGS, FAMILIES, SECONDS, content
from tests.acceptance.main_job import KEY
from worker.core.media.signatures import is_complete, sniff


@pytest.fixture(scope="module")
def ordered() -> Iterator[Api]:
    """The API after one order of each family, all of them ready."""
    with Api() as api:
        for family in FAMILIES:
            api.order(family)
        time.sleep(SECONDS + 0.1)
        yield api


def ask(api: Api, method: str, path: str, **body: object) -> tuple[int, dict[str, object]]:
    with closing(http.client.HTTPConnection("127.0.0.1", api.port, timeout=5)) as connection:
        connection.request(method, path, json.dumps({"key": KEY, **body}))
        response = connection.getresponse()
        return response.status, json.loads(response.read())


@pytest.mark.parametrize("place", range(len(FAMILIES)), ids=[family.order for family in FAMILIES])
def test_a_job_is_found_at_its_own_address_by_its_own_method_alone(ordered: Api, place: int) -> None:
    family, order = FAMILIES[place], ordered.orders()[place]
    path = f"/api/{family.fetch.replace('{id}', order.remote_id)}"
    named = {family.id_field: order.remote_id} if family.id_field else {}

    found = ask(ordered, family.method, path, **named)
    by_other_method = ask(ordered, "POST" if family.method == "GET" else "GET", path, **named)
    elsewhere = ask(ordered, "POST", f"/api/v33/fetch/{order.remote_id}")

    assert (found[0], found[1]["status"]) == (200, "success")
    assert by_other_method[0] == elsewhere[0] == 404
    assert "status" not in elsewhere[1]


@pytest.mark.parametrize("media_type", ENDINGS)
def test_a_file_is_whole_and_another_one_for_every_word(media_type: str) -> None:
    data = content(media_type, "one")
    media = sniff(data)

    assert data != content(media_type, "two")
    if not media_type.startswith(("text/", "application/")):
        assert media is not None
        assert media.type == media_type
        assert is_complete(media, data, data, len(data))


def test_a_wrong_key_and_an_id_of_another_family_are_answered_as_the_documents_say(ordered: Api) -> None:
    interior = next(order for order in ordered.orders() if FAMILIES[order.family].order == "v6/interior/make")

    refused = ask(ordered, "POST", f"/api/v6/interior/fetch/{interior.remote_id}", key="wrong")[1]
    unknown = ask(ordered, "POST", "/api/v6/interior/fetch/1")[1]

    assert refused["message"] == "Invalid Api Key"
    assert (unknown["status"], unknown["message"]) == ("failed", "Request not found")
