"""Settings of logs, Flower, the metrics and the admin pages."""

from typing import Annotated, Literal, TextIO

from pydantic import BeforeValidator, Field, SecretStr, ValidationInfo, field_validator

from worker.configuration.admin_url import AdminUrl, parse_admin_url
from worker.configuration.setting_types import Port, SettingsGroup, items, readable_by

ADMIN_PORT = 5556  # if ADMIN_PORT is not set


def _log_format(value: object) -> str:
    word = str(value).lower()
    return word if word in ("json", "text") else "auto"  # the web app may use the same variable for itself


def _logins(text: str) -> None:
    if not all(":" in item for item in items(text)):
        raise ValueError("must be user:password")


class MonitoringSettings(SettingsGroup):
    """Logs, Flower, metrics, and the admin pages."""

    log_format: Annotated[Literal["auto", "json", "text"], BeforeValidator(_log_format)] = "auto"
    flower_basic_auth: Annotated[SecretStr, readable_by(_logins)] | None = None
    flower_address: str = "127.0.0.1"
    flower_port: Port | None = None
    flower_jobs: Annotated[int, Field(ge=0, le=5_000)] = 1_000
    port: Port | None = None
    metrics_address: str = "127.0.0.1"
    metrics_port: Port = 9464
    admin_password: SecretStr | None = None
    admin_viewer_password: SecretStr | None = None
    admin_address: str = "127.0.0.1"
    admin_port: Port | None = None
    admin_url: Annotated[str, readable_by(parse_admin_url)] | None = None

    @field_validator("admin_viewer_password")
    @classmethod
    def _differs_from_admin_password(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is not None and value == info.data.get("admin_password"):
            raise ValueError("must differ from ADMIN_PASSWORD: a viewer may not act")
        return value

    @property
    def admin_page(self) -> AdminUrl | None:
        """The address of the admin page behind a proxy, or None."""
        return None if self.admin_url is None else parse_admin_url(self.admin_url)

    @property
    def page_url(self) -> str:
        """The address of the admin page, for people: ADMIN_URL, or where `admin` listens."""
        if self.admin_url is not None:
            return self.admin_url
        host = f"[{self.admin_address}]" if ":" in self.admin_address else self.admin_address
        return f"http://{host}:{ADMIN_PORT if self.admin_port is None else self.admin_port}/"

    def json_logs(self, stream: TextIO) -> bool:
        """Return whether logs on this stream are JSON. By default they are unless the stream is a terminal."""
        return self.log_format == "json" or (self.log_format == "auto" and not stream.isatty())
