"""What several groups of settings use."""

from typing import Annotated

import pytest
from pydantic import SecretStr, TypeAdapter, ValidationError

from worker.configuration.setting_types import items, networks, readable_by


def test_a_text_is_kept_as_it_is_written_if_it_can_be_read() -> None:
    text: TypeAdapter[str] = TypeAdapter(Annotated[str, readable_by(int)])
    assert text.validate_python("007") == "007"
    with pytest.raises(ValidationError, match="invalid literal"):
        text.validate_python("bond")


def test_a_secret_text_is_read_too_and_stays_secret() -> None:
    secret: TypeAdapter[SecretStr] = TypeAdapter(Annotated[SecretStr, readable_by(int)])
    assert str(secret.validate_python("007")) == "**********"
    with pytest.raises(ValidationError, match="invalid literal"):
        secret.validate_python("bond")


def test_lists_have_commas_and_maybe_blanks() -> None:
    assert items(" a, ,b c,") == ["a", "b c"]
    assert [str(network) for network in networks("10.0.0.0/8, ::1")] == ["10.0.0.0/8", "::1/128"]
    with pytest.raises(ValueError, match="CIDR"):
        networks("10.0.0.1/8")
