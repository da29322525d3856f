"""The comparison of an order with the answer about a job that may be the one it created."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.vendor.order_match import differing_field

ORDER = {"prompt": "A lake at dawn", "width": "512", "height": 768, "samples": 2, "seed": 7}


def difference(order: dict[str, Any], **meta: object) -> str | None:
    """Compare an order with an answer that repeats these fields."""
    return differing_field(json.dumps(order), {"status": "success", "id": 1, "meta": meta})


@pytest.mark.parametrize(
    "meta",
    [
        {"prompt": "A lake at dawn"},
        {"prompt": "  a LAKE at\n dawn "},
        {"prompt": "masterpiece, a lake at dawn, hyperrealistic, 8k"},
        {"text": "a lake at dawn"},
        {"seed": "7"},
        {"prompt": "a lake at dawn", "W": 512, "H": 768.0, "n_samples": "2", "seed": 7},
        {"prompt": "a lake at dawn", "W": 504, "H": 800},
    ],
)
def test_given_repeated_fields_of_the_order_then_nothing_differs(meta: dict[str, Any]) -> None:
    """The API adds words to prompts and rounds sizes."""
    assert difference(ORDER, **meta) is None


@pytest.mark.parametrize(
    ("meta", "field"),
    [
        ({"prompt": "a harbour"}, "prompt"),
        ({"prompt": "a lake"}, "prompt"),
        ({"prompt": "a lake at dawn", "seed": 8}, "seed"),
        ({"W": 1024}, "width"),
        ({"H": 512}, "height"),
        ({"n_samples": 1}, "samples"),
    ],
)
def test_given_a_field_that_differs_then_it_is_named(meta: dict[str, Any], field: str) -> None:
    assert difference(ORDER, **meta) == field


@pytest.mark.parametrize(
    ("order", "meta"),
    [
        (ORDER, {}),
        (ORDER, {"prompt": None, "W": "", "seed": []}),
        (ORDER, {"prompt": ["a harbour"], "W": "wide", "seed": True}),
        (ORDER, {"W": 512}),
        ({"prompt": "a lake", "enhance_prompt": "yes"}, {"prompt": "an oil painting of water"}),
        ({"prompt": "ein See", "multi_lingual": "yes"}, {"prompt": "a lake"}),
        ({"prompt": "a lake", "width": 512, "upscale": True}, {"prompt": "a lake", "W": 2_048}),
        ({"prompt": "Tom & Jerry"}, {"prompt": "Tom &amp;amp; Jerry"}),
        ({"prompt": " "}, {"prompt": "a lake"}),
        ({"prompt": "a lake", "seed": None}, {"seed": 3_166_507_472}),
        ({"prompt": "a lake", "seed": -1}, {"seed": 3_166_507_472}),
        ({"init_image": "https://h/a.png"}, {"prompt": "a harbour"}),
    ],
)
def test_given_nothing_to_compare_then_nothing_differs(order: dict[str, Any], meta: dict[str, Any]) -> None:
    assert difference(order, **meta) is None


@pytest.mark.parametrize("fields", [None, {}, {"meta": None}, {"meta": "a lake"}, {"meta": []}])
def test_given_an_answer_that_repeats_nothing_then_nothing_differs(fields: dict[str, Any] | None) -> None:
    assert differing_field(json.dumps(ORDER), fields) is None


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
_FIELDS = st.dictionaries(
    st.sampled_from(["prompt", "text", "seed", "W", "width", "samples", "enhance_prompt"]), _VALUES
)


@given(order=_FIELDS, meta=_FIELDS)
def test_no_fields_raise(order: dict[str, Any], meta: dict[str, Any]) -> None:
    differing_field(json.dumps(order), {"meta": meta})


@pytest.mark.parametrize("payload", ["", "[]", "null", '{"prompt"', "[" * 100_000])
def test_no_payload_raises(payload: str) -> None:
    assert differing_field(payload, {"meta": {"prompt": "a lake"}}) is None
