"""Settings from the environment and the `.env` file. They are validated once; each error is one line."""

import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from worker.configuration.api_settings import ApiSettings
from worker.configuration.environment import clean, read_environment, trimmed
from worker.configuration.job_settings import NotifySettings, PollingSettings, RetentionSettings
from worker.configuration.monitoring_settings import MonitoringSettings
from worker.configuration.output_settings import OutputSettings
from worker.configuration.server_settings import ServerSettings
from worker.errors import SettingsError

SHARED_NAMES = frozenset(
    {"DATABASE_URL", "REDIS_URL", "BROKER_URL", "PORT", "REQUESTS_CA_BUNDLE", "LOG_FORMAT"}
    | {"ADMIN_PASSWORD", "ADMIN_ADDRESS", "ADMIN_PORT", "ADMIN_URL", "STATE_DIRECTORY", "USER_AGENT"}
)  # apps may use similar names for settings of their own
KEY_NAMES = ("SD_API_KEY", "SD_API_KEYS", "SD_API_KEYS_FILE", "WEBHOOK_SECRET")
# Settings that only one process uses. A wrong value stops that process only.
PROCESS_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "flower": ("flower_", "port"),
    "admin": ("admin_",),
    "metrics": ("metrics_",),
    "downloads": ("output_", "downloads_per_host", "user_agent"),
}
_LISTS = frozenset(
    {"sd_api_hosts", "output_allowed_networks", "on_done_tasks", "prune_states", "webhook_secret"}
    | {"webhook_allowed_networks", "flower_basic_auth", "late_looks"}
)
# Line breaks are no error in these: JSON may have several lines, and LOG_FORMAT may be meant for the web app.
_ANY_TEXT = frozenset({"sd_api_keys", "sd_api_rps", "sd_api_slots", "sd_api_status_words", "log_format"})
DOTENV_SWITCH = "FETCH_WORKER_DOTENV"  # "off" under `up` and `demo`, which pass the whole environment to each process


class Settings(
    MonitoringSettings,
    RetentionSettings,
    NotifySettings,
    PollingSettings,
    OutputSettings,
    ApiSettings,
    ServerSettings,
):
    """All settings, named like their environment variables in lower case. Units are seconds and bytes unless stated."""

    _errors: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the environment and, unless switched off, the `.env` file in our own way, all values together."""
        variables = read_environment(os.environ, dotenv_file())
        values = {name.lower(): value for name, value in variables.items()}
        known = {name: values[name] for name in settings_cls.model_fields if name in values}
        return init_settings, InitSettingsSource(settings_cls, known)

    @field_validator("*", mode="before")
    @classmethod
    def _without_invisible_characters(cls, value: object, info: ValidationInfo) -> object:
        """Strip invisible characters around a value. Refuse them inside it."""
        if not isinstance(value, str):
            return value
        if info.field_name in _ANY_TEXT:
            return trimmed(value)
        if info.field_name in _LISTS:
            return ",".join(clean(item) for item in trimmed(value).split(","))
        return clean(value)

    def check(self, process: str) -> None:
        """Raise SettingsError if a setting that only this process uses is wrong."""
        lines = [line for name, line in self._errors.items() if name.startswith(PROCESS_SETTINGS[process])]
        if lines:
            raise SettingsError("; ".join(lines))

    @property
    def process_errors(self) -> tuple[str, ...]:
        """Errors in settings that only one process uses, one line each."""
        return tuple(self._errors.values())

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Return the fields for `repr` and `str`. URLs are shown without user, password and query."""
        return [(name, _without_secrets(value)) for name, value in super().__repr_args__()]

    @property
    def secret_texts(self) -> tuple[str, ...]:
        """All texts that must never be shown: API keys, including replaced ones, and webhook secrets."""
        return (*self.keys.texts(), *self.webhook_secret_texts)


def dotenv_file() -> Path | None:
    """Return the path of the `.env` file, which need not exist. None if reading it is switched off."""
    return None if os.environ.get(DOTENV_SWITCH) == "off" else Path(".env")


def load(*processes: str, database_url: str | None = None) -> Settings:
    """Return the settings of this process. Raises SettingsError with one line that names the variables and the fix.

    A wrong setting that only another process uses gets its default value. `processes` lists the roles of this process.
    `database_url` is used instead of DATABASE_URL.
    """
    given: dict[str, Any] = {} if database_url is None else {"database_url": database_url}
    variables = read_environment(os.environ, dotenv_file())
    _refuse_unknown(variables)
    errors: dict[str, str] = {}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        for detail in error.errors():
            errors.setdefault(str(detail["loc"][0]) if detail["loc"] else "", _reason(detail))
        if not all(_process_of(name) for name in errors):
            raise SettingsError("; ".join(errors.values())) from None
        settings = Settings(**given, **{name: Settings.model_fields[name].default for name in errors})
    settings._errors.update(errors)
    _clean_aws(variables, needed=settings.bucket is not None)
    for process in processes:
        settings.check(process)
    return settings


def _process_of(name: str) -> str | None:
    return next((process for process, prefixes in PROCESS_SETTINGS.items() if name.startswith(prefixes)), None)


def _reason(error: Any) -> str:
    """Return one line for a pydantic error, with the variable's name and without its value."""
    variable = str(error["loc"][0]).upper() if error["loc"] else "the settings"
    message = str(error["msg"]).removeprefix("Value error, ")
    reason = message if error["type"] == "value_error" else f"is wrong: {message[:1].lower()}{message[1:]}"
    return f"{variable} {reason}"


def _refuse_unknown(variables: Collection[str]) -> None:
    """Refuse an unknown variable that resembles one of ours. An ignored typing error is hard to find."""
    known_names = {name.upper() for name in Settings.model_fields}
    for name in sorted({name.upper() for name in variables} - known_names):
        similar = difflib.get_close_matches(name, known_names - SHARED_NAMES, n=1, cutoff=0.9)
        if similar or name.startswith(("SD_API_", "POLL_")):
            hint = similar or difflib.get_close_matches(name, known_names, n=1)
            raise SettingsError(f"{name} is not a setting" + (f"; did you mean {hint[0]}?" if hint else ""))


def _clean_aws(variables: Mapping[str, str], *, needed: bool) -> None:
    """Put the cleaned AWS_* variables into the environment, where every S3 client reads them."""
    for name, value in variables.items():
        if name.startswith("AWS_"):
            try:
                os.environ[name] = clean(value)
            except ValueError as error:
                if needed:
                    raise SettingsError(f"{name} {error}") from None


def _without_secrets(value: object) -> object:
    """Return the value as it may be shown: of a URL only scheme, host and path."""
    if not isinstance(value, str) or not {"@", "?", "#"} & set(value):
        return value
    scheme, separator, remainder = value.partition("://")
    if not separator:
        return "***"
    _, at, host = remainder.rpartition("@")  # the last one, because a password may contain any character
    bare = re.split("[?#;]", host, maxsplit=1)[0]
    return f"{scheme}://{'***@' if at else ''}{bare}{'?***' if bare != host else ''}"
