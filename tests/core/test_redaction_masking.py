"""Masking: personal data are removed, and the description of a problem stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.redaction.masking import link_host, mask_personal_data

KEPT = [
    "processing",
    "HTTP 502",
    "too many requests, 10 per second",
    "unknown id 12202888",
    "it's the user's plan, don't ask",
    'no "fetch_result" in it',
    "no answer: ConnectTimeout",
    "at 12:34:56 on 2026-11-24T18:00:00.25Z",
]
MASKED = [
    ("write to Ann.Lee+x@mail.shop.example!", "write to [e-mail]!"),
    ("see http://ann:pw@cdn.test:8443/u/ann.png?sig=1#x", "see http://cdn.test:8443/…"),
    ("see s3://bucket/ann/1.png, or ftp://[::1/x", "see s3://bucket/… or ftp://?/…"),
    ("data:image/png;base64,iVBORw0KGgo= is no link", "data:… is no link"),
    ("from 192.168.0.17 and 2001:db8:0:1::7, fe80::1", "from [ip] and [ip], [ip]"),
    ('{"prompt": "Ann", "status": "error"}', '{"prompt": "[text]", "status": "error"}'),
    ("{'negative_prompt': 'a lake'}", "{'negative_prompt': \"[text]\"}"),
    ("prompt=my face, in a lake; seed 3", 'prompt="[text]"; seed 3'),
    ("refused: “a lake at dawn” and 'her face'", 'refused: "[text]" and "[text]"'),
    ('cut off in "a lake at', 'cut off in "[text]"'),
    ("card 4111-1111 1111 1111, call +49 170 1234567", "card [digits], call [digits]"),
    ("id 123456789012", "id [digits]"),
    ("not ready by its deadline 2026-11-24 20:17:38 UTC", "not ready by its deadline 2026-11-24 20:17:38 UTC"),
    ("key 8f14e45fceea167a5a36dedd4bea2543.", "key [key?]"),
    ("Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.s1g", "Bearer [key?]"),
]


@pytest.mark.parametrize("text", KEPT)
def test_texts_about_problems_are_not_masked(text: str) -> None:
    assert mask_personal_data(text) == text


@pytest.mark.parametrize(("text", "shown"), MASKED)
def test_personal_data_are_masked(text: str, shown: str) -> None:
    assert mask_personal_data(text) == shown


@given(st.text(max_size=600) | st.text(alphabet="ab1:/.@\"'“”«» {}[]=prompt-", max_size=60))
def test_any_text_can_be_masked_and_masking_again_changes_nothing(text: str) -> None:
    once = mask_personal_data(text)

    assert mask_personal_data(once) == once


@given(
    st.text(alphabet="ab c", max_size=20),
    st.sampled_from(["ann@shop.example", "https://cdn.test/ann/1.png", "10.1.2.3", "4111111111111111"]),
    st.text(alphabet="ab c", max_size=20),
)
def test_personal_data_are_masked_anywhere_in_a_text(before: str, personal: str, after: str) -> None:
    assert personal not in mask_personal_data(f"{before} {personal} {after}")


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://CDN.test:443/a?b=c", "cdn.test:443"),
        ("http://[2001:db8::7]:80/x", "[2001:db8::7]:80"),
        ("data:image/png;sha256=00", "(in the answer)"),
        ("http://[::1/x", "?"),
        ("", "?"),
    ],
)
def test_only_the_host_of_a_link_is_returned(url: str, host: str) -> None:
    assert link_host(url) == host
