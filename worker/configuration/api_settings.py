"""Settings of the hosted API: addresses, keys, rates, and how it is reached."""

import json
import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from worker.configuration.api_keys import ApiKeys, parse_keys
from worker.configuration.setting_types import SettingsGroup, items, readable_by
from worker.core.identity import ACCOUNT
from worker.core.learned_rate import RequestRates
from worker.core.slots import MAX_SLOTS
from worker.errors import NotTrackable
from worker.system.locked_cache import locked_property
from worker.vendor.fetch_url import VENDOR_HOSTS, AllowedApi, api_host
from worker.vendor.status_words import parse_status_words

DEFAULT_RPS = 10.0
MAX_RPS = 1_000_000.0
ORDER_TIMEOUTS = 5  # with the default, 100 s: the network in front of the API ends each request then
_HOST = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


def _base_url(value: str) -> str:
    if "@" in value:
        raise ValueError("contains a user name: it may have only scheme, host, port and path")
    try:
        api_host(value.rstrip("/"))
    except NotTrackable as error:
        raise ValueError(str(error)) from None
    return value.rstrip("/")


def _hosts(text: str) -> frozenset[str]:
    for item in items(text):
        if not _HOST.fullmatch(item):
            raise ValueError(f"must list hosts as host or host:port, not {item.rpartition('@')[2][:80]!r}")
    return frozenset(item.lower().removesuffix(":443") for item in items(text))


def _rates(value: object) -> RequestRates:
    """Accept one number for all accounts, or a JSON object of accounts and numbers. `*` means all others."""
    if isinstance(value, RequestRates):
        return value
    try:
        by_account = json.loads(value) if isinstance(value, str) and value.startswith("{") else {"*": value}
        rates = {str(account): _rate(rate) for account, rate in by_account.items()}
    except (ValueError, TypeError):
        raise ValueError('is wrong: it must be a number, or JSON such as {"shop": 3, "*": 10}') from None
    if not all(account == "*" or ACCOUNT.fullmatch(account) for account in rates):
        raise ValueError('has an invalid account name; for example {"shop": 3, "*": 10}')
    return RequestRates(rates.pop("*", DEFAULT_RPS), rates)


def _rate(value: object) -> float:
    rate = math.nan if isinstance(value, bool) else float(str(value))
    if not 0 < rate <= MAX_RPS:
        raise ValueError
    return rate


def _slots(text: str) -> Mapping[str, int]:
    """Return the number of slots by account; `*` means all others. Raises ValueError."""
    if not text:
        return {}
    try:
        by_account = json.loads(text) if text.startswith("{") else {"*": int(text)}
        slots = {str(account): number for account, number in by_account.items()}
    except (ValueError, AttributeError):
        raise ValueError('must be a whole number, or JSON such as {"shop": 15, "*": 5}') from None
    if not all(isinstance(number, int) and 0 < number <= MAX_SLOTS for number in slots.values()):
        raise ValueError(f"must have whole numbers from 1 to {MAX_SLOTS:,}")
    if not all(account == "*" or ACCOUNT.fullmatch(account) for account in slots):
        raise ValueError('has an invalid account name; for example {"shop": 15, "*": 5}')
    return slots


def _existing(path: str) -> None:
    if not Path(path).exists():
        raise ValueError("must be an existing file or folder of certificates")


def _proxy(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a proxy's URL, for example http://proxy.example:3128")


class ApiSettings(SettingsGroup):
    """The hosted API."""

    sd_api_url: Annotated[str, AfterValidator(_base_url)] = "https://stablediffusionapi.com/api/v3"
    sd_api_key: SecretStr | None = None
    sd_api_keys: Annotated[SecretStr, readable_by(parse_keys)] = SecretStr("{}")
    sd_api_keys_file: Path | None = None
    sd_api_hosts: Annotated[str, readable_by(_hosts)] = ""
    sd_api_rps: Annotated[RequestRates, BeforeValidator(_rates)] = RequestRates(DEFAULT_RPS)
    sd_api_timeout: float = Field(default=20.0, gt=0, le=3_600)
    sd_api_order_timeout: float | None = Field(default=None, gt=0, le=3_600)
    sd_api_slots: Annotated[str, readable_by(_slots)] = ""
    sd_api_status_words: Annotated[str, readable_by(parse_status_words)] = "{}"
    sd_api_ca_bundle: Annotated[str, readable_by(_existing)] | None = None
    sd_api_proxy: Annotated[SecretStr, readable_by(_proxy)] | None = None
    requests_ca_bundle: Annotated[str, readable_by(_existing)] | None = None

    @locked_property
    def keys(self) -> ApiKeys:
        """The current API keys by account."""
        from_file = self.sd_api_keys_file is not None
        fixed = {} if from_file else parse_keys(self.sd_api_keys.get_secret_value())
        if self.sd_api_key is not None:
            fixed["default"] = self.sd_api_key.get_secret_value()
        return ApiKeys({account: key for account, key in fixed.items() if key}, self.sd_api_keys_file)

    def rps(self, account: str) -> float:
        """Return the requests per second that the account may make, for all processes together."""
        return self.sd_api_rps.of(account)

    def slots(self, account: str) -> int | None:
        """Return how many orders of the account may wait at the API. None: start at the default and learn."""
        return self._slots_by_account.get(account, self._slots_by_account.get("*"))

    @cached_property
    def _slots_by_account(self) -> Mapping[str, int]:
        return _slots(self.sd_api_slots)

    @property
    def order_timeout(self) -> float:
        """The seconds for one whole order: an order may be answered only when its picture is ready."""
        return self.sd_api_timeout * ORDER_TIMEOUTS if self.sd_api_order_timeout is None else self.sd_api_order_timeout

    @cached_property
    def api(self) -> AllowedApi:
        """The base URL of the hosted API and the hosts that may receive the key."""
        hosts = _hosts(self.sd_api_hosts) or (VENDOR_HOSTS if self.api_host in VENDOR_HOSTS else frozenset())
        return AllowedApi(self.sd_api_url, hosts | {self.api_host})

    @property
    def api_host(self) -> str:
        """The host of `SD_API_URL`."""
        return api_host(self.sd_api_url)

    @cached_property
    def status_words(self) -> Mapping[str, str]:
        """Additional status words of the API, each with the standard word that it means."""
        return parse_status_words(self.sd_api_status_words)

    @property
    def ca_bundle(self) -> str | None:
        """The CA bundle for TLS connections to the API, or None for the public CAs."""
        return self.sd_api_ca_bundle or self.requests_ca_bundle

    @property
    def proxy(self) -> str | None:
        """The proxy for calls to the API. Only `SD_API_PROXY` counts; HTTP_PROXY and similar variables are not used."""
        return None if self.sd_api_proxy is None else self.sd_api_proxy.get_secret_value()
