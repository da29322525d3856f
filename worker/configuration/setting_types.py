"""The base class of all groups of settings, and the types that several groups use."""

import ipaddress
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.system.locked_cache import locked_property

MAX_SECONDS = 10 * 365 * 86_400.0  # a longer time must be a mistake, and dates cannot hold much more

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Port = Annotated[int, Field(ge=0, le=65_535)]


class SettingsGroup(BaseSettings):
    """Settings of one topic. `worker.settings.Settings` combines all groups."""

    model_config = SettingsConfigDict(
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        arbitrary_types_allowed=True,
        defer_build=True,  # the groups alone are never validated, so only `Settings` needs a validator
        ignored_types=(locked_property,),
    )


def readable_by(read: Callable[[str], object]) -> AfterValidator:
    """Return a validator that keeps a text which `read` accepts. `read` raises ValueError for any other."""

    def validate(value: str | SecretStr) -> str | SecretStr:
        read(value if isinstance(value, str) else value.get_secret_value())
        return value

    return AfterValidator(validate)


def items(text: str) -> list[str]:
    """Return the items of a list that is separated by commas, without blanks and empty items."""
    return [item.strip() for item in text.split(",") if item.strip()]


def networks(text: str) -> tuple[Network, ...]:
    """Return the networks of a list. Raises ValueError."""
    try:
        return tuple(ipaddress.ip_network(item) for item in items(text))
    except ValueError as error:
        raise ValueError(f"must be a list of networks in CIDR form: {error}") from None


Networks = Annotated[str, readable_by(networks)]
