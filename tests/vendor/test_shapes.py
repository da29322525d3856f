"""The shape of an answer: equal for answers of the same form, and without any data."""

import json

import pytest

from worker.vendor.shapes import MAX_SHAPE, shape_of


def _shape(answer: object, http_status: int = 200) -> str:
    return shape_of(http_status, json.dumps(answer).encode())


@pytest.mark.parametrize(
    ("answer", "shape"),
    [
        (
            {"status": "done", "assets": ["https://h/a.png"], "id": 7},
            "status=done; assets: [text]; id: number",
        ),
        ({"id": "7", "assets": [], "status": " DONE "}, "status=done; assets: []; id: text"),
        ({"status": "done", "files": [{"url": "u", "w": 1.5}]}, "status=done; files: [{url: text, w: number}]"),
        ({"status": "done", "files": ["u", 1, None]}, "status=done; files: [null, number, text]"),
        ({"a": {"b": {"c": 1}}, "ok": True}, "a: {b: object}; ok: boolean"),
        ({"a": [[["deep"]]]}, "a: [[list]]"),
        ({"status": "done", "meta": {"prompt": "a cat", "seed": 4}}, "status=done; meta: object"),
        ({"status": 200, "id": None}, "id: null; status: number"),
        ({"status": "", "id": None}, "status=empty; id: null"),
        (
            {"status": "success", "execution": {"status": "Paused", "id": 4}},
            "status=success; execution status=paused; execution: {id: number}",
        ),
        ({}, "empty object"),
    ],
)
def test_a_shape_has_the_status_word_and_the_field_types(answer: object, shape: str) -> None:
    assert _shape(answer) == shape


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (b"", "no JSON object: nothing"),
        (b" \r\n", "no JSON object: nothing"),
        (b"<html>busy</html>", "no JSON object: page"),
        (b"OK", "no JSON object: plain text"),
        (b"\xff\xfe\x00", "no JSON object: plain text"),
        (b'{"status": "done"', "no JSON object: broken JSON"),
        (b"[" * 100_000, "no JSON object: broken JSON"),
        (b'["https://h/a.png"]', "no JSON object: [text]"),
        (b"17", "no JSON object: number"),
        (b"null", "no JSON object: null"),
        (b"[" + b"1," * 200_000 + b"1]", "no JSON object: too many values"),
    ],
    ids=["nothing", "blank", "page", "word", "bytes", "cut off", "deep", "list", "number", "null", "very many"],
)
def test_the_shape_of_other_bodies_names_their_content(body: bytes, shape: str) -> None:
    assert shape_of(200, body) == shape
    assert shape_of(418, body) == f"HTTP 418; {shape}"


def test_values_do_not_change_the_shape() -> None:
    """Ids, links, counts and numbers in a status are not part of the shape."""
    answers = [
        {"status": f"step {step} of 10", "id": step, "files": {f"9f86d081884c7d65{step}": "u"}, "seed": step / 2}
        for step in range(1, 10)
    ]
    assert {_shape(answer) for answer in answers} == {"status=step # of #; files: {*: text}; id: number; seed: number"}


@pytest.mark.parametrize("secret", ["https://h/a?key=sk-1", "sk-canary-7f3a-9d2e", "12202888", "7f3a9d2e-1111-4a2b"])
def test_a_shape_contains_no_data(secret: str) -> None:
    answer = {"id": secret, "list": [secret], "inner": {"x": secret, secret: 1}, secret: {"y": secret}}
    assert secret not in _shape(answer)


def test_an_unusual_status_is_shortened_and_cleaned() -> None:
    shape = _shape({"status": "see https://h/a?b=c; or\nask " + "x" * 200})
    assert shape.startswith("status=see https?h?a?b?c? or ask xx")
    assert len(shape) < 60


def test_every_shape_fits_its_column_and_is_one_line() -> None:
    answer = {f"field_{letter}{second}": {"a": [1], "b": {}} for letter in "abcdefghij" for second in "abcdefghij"}
    shape = _shape(answer, 500)
    assert len(shape) == MAX_SHAPE
    assert shape.endswith("…")
    assert shape.isprintable()
