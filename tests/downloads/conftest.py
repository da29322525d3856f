"""Fixtures of the download tests: a network that ends at loopback."""

from collections.abc import Iterator

import pytest

from tests.networks import Net


@pytest.fixture(autouse=True)
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    """Refuse all connections and name lookups outside of loopback, even if the address guard allowed them."""
    net = Net(loopback=True).install(monkeypatch)
    net.answers = {"localhost": ["127.0.0.1"]}.get
    yield net
    assert net.external == []
