"""Which webhook addresses belong to the same receiver."""

import pytest

from worker.notify.receivers import Receivers, receiver_name

SPELLINGS = {
    "app.example:443": [
        "https://app.example/x",
        "https://APP.example:443?a",
        "https://app.example.",
        "https://app.Example#",
    ],
    "xn--bcher-kva.example:443": [
        "https://bücher.example/",
        "https://BÜCHER.example:443",
        "https://xn--bcher-kva.example",
    ],
    "127.0.0.1:8000": [
        "http://127.0.0.1:8000/",
        "http://127.1:8000",
        "http://[::1]:8000",
        "http://[::ffff:7f00:1]:8000",
    ],
    "2001:db8::1:443": ["https://[2001:db8::1]/", "https://[2001:0DB8:0:0:0:0:0:1]:443/x"],
}


@pytest.mark.parametrize(("name", "urls"), SPELLINGS.items(), ids=SPELLINGS)
def test_all_spellings_of_an_address_are_one_receiver(name: str, urls: list[str]) -> None:
    assert {receiver_name(url) for url in urls} == {name}


def test_other_ports_are_other_receivers() -> None:
    assert receiver_name("https://a.example:8443") != receiver_name("https://a.example")


def test_a_name_is_the_receiver_at_its_address_once_resolved() -> None:
    receivers = Receivers()
    assert receivers.cached("http://localhost:8000/x") == "localhost:8000"
    assert receivers.look_up("http://localhost:8000/x", 5.0) == "127.0.0.1:8000"
    assert receivers.cached("http://LOCALHOST.:8000/y") == receivers.cached("http://127.0.0.1:8000") == "127.0.0.1:8000"


def test_a_dns_answer_is_cached_for_a_minute() -> None:
    now = 0.0
    receivers = Receivers(clock=lambda: now)
    receivers.look_up("http://localhost:8000", 5.0)
    now = 61.0
    assert receivers.cached("http://localhost:8000") == "localhost:8000"


def test_a_name_that_does_not_resolve_is_its_own_receiver() -> None:
    assert Receivers().look_up("https://nowhere.invalid/x", 2.0) == "nowhere.invalid:443"
