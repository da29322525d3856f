"""Settings of the hosted API: hosts, keys, certificates and proxy."""

from pathlib import Path

import pytest

from worker.settings import load
from worker.vendor.fetch_url import VENDOR_HOSTS

SECRET = "hidden-word"


def test_both_vendor_hosts_are_allowed_if_the_base_url_is_on_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another base URL only its own host is allowed."""
    monkeypatch.setenv("SD_API_URL", "https://modelslab.com/api/v6")
    assert load().api.hosts == VENDOR_HOSTS
    monkeypatch.setenv("SD_API_URL", "http://127.0.0.1:8010/api/v3")
    assert load().api.hosts == {"127.0.0.1:8010"}


def test_sd_api_key_takes_precedence_over_the_default_in_sd_api_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No representation of the settings shows a key."""
    monkeypatch.setenv("SD_API_KEYS", f'{{"default": "other", "shop": "{SECRET}", "empty": ""}}')
    monkeypatch.setenv("SD_API_KEY", SECRET + "2")
    settings = load()
    assert {name: key.get_secret_value() for name, key in settings.keys.items()} == {
        "default": SECRET + "2",
        "shop": SECRET,
    }
    assert SECRET not in repr(settings) + str(settings) + repr(settings.keys) + str(settings.model_dump())


def test_the_apis_own_ca_bundle_takes_precedence_and_only_a_configured_proxy_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """REQUESTS_CA_BUNDLE is used if there is no other; HTTPS_PROXY is ignored."""
    common_bundle, own_bundle = tmp_path / "common.pem", tmp_path / "own.pem"
    for path in (common_bundle, own_bundle):
        path.write_text("")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy-of-the-host.example:3128")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(common_bundle))
    assert (load().ca_bundle, load().proxy) == (str(common_bundle), None)
    monkeypatch.setenv("SD_API_CA_BUNDLE", str(own_bundle))
    monkeypatch.setenv("SD_API_PROXY", f"http://user:{SECRET}@proxy.example:3128")
    settings = load()
    assert (settings.ca_bundle, settings.proxy) == (str(own_bundle), f"http://user:{SECRET}@proxy.example:3128")
    assert SECRET not in repr(settings) + str(settings.model_dump())
