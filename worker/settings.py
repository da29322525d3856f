"""Settings from the environment and the `.env` file. They are validated once; each error is one line."""

import difflib
import ipaddress
import json
import math
import os
import re
import socket
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TextIO
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy.engine import URL

from worker.configuration import state_directory
from worker.configuration.api_keys import ApiKeys, parse_keys
from worker.configuration.environment import clean, read_environment, trimmed
from worker.configuration.server_urls import broker_url, database_url, redis_url
from worker.core.durations import parse_duration
from worker.core.identity import ACCOUNT
from worker.core.lifecycle import FINAL_STATES
from worker.core.pacing.policy import Pace, Policy
from worker.core.rate import RequestRates
from worker.core.webhook import secret_bytes
from worker.errors import NotTrackable, SettingsError
from worker.system.locked_cache import locked_property
from worker.vendor.fetch_url import VENDOR_HOSTS, AllowedApi, api_host
from worker.vendor.status_words import parse_status_words

DEFAULT_STORAGE = Path("var/outputs")
EMBEDDED_SOCKET = "redis.sock"
MAX_SECONDS = 10 * 365 * 86_400.0  # a longer time must be a mistake, and dates cannot hold much more
MAX_LATE_LOOKS, MAX_LATE_LOOK_SECONDS = 20, 30 * 86_400.0
MIN_PRUNE_SECONDS = 3_600.0  # a process that waits for a job must still find it
LONG_DEADLINES = (("training", 14_400.0), ("video", 7_200.0))
SHARED_NAMES = frozenset(
    {"DATABASE_URL", "REDIS_URL", "BROKER_URL", "PORT", "REQUESTS_CA_BUNDLE", "LOG_FORMAT"}
    | {"ADMIN_PASSWORD", "ADMIN_ADDRESS", "ADMIN_PORT", "STATE_DIRECTORY", "USER_AGENT"}
)  # apps may use similar names for settings of their own
KEY_NAMES = ("SD_API_KEY", "SD_API_KEYS", "SD_API_KEYS_FILE", "WEBHOOK_SECRET")
DEFAULT_RPS = 10.0
MAX_RPS = 1_000_000.0
USER_AGENT = "fetch-worker/0.1.0"  # our own name, because many hosts refuse the names of HTTP libraries
# Settings that only one process uses. A wrong value stops that process only.
PROCESS_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "flower": ("flower_", "port"),
    "admin": ("admin_",),
    "metrics": ("metrics_",),
    "downloads": ("output_", "downloads_per_host", "user_agent"),
}
_HOST = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_S3 = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>[^\x00-\x1f]*))?")
_LISTS = frozenset(
    {"sd_api_hosts", "output_allowed_networks", "on_done_tasks", "prune_states", "webhook_secret"}
    | {"webhook_allowed_networks", "flower_basic_auth", "late_looks"}
)
DOTENV_SWITCH = "FETCH_WORKER_DOTENV"  # "off" under `up` and `demo`, which pass the whole environment to each process


class Settings(BaseSettings):
    """All settings, named like their environment variables in lower case. Units are seconds and bytes unless stated."""

    model_config = SettingsConfigDict(
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        arbitrary_types_allowed=True,
        ignored_types=(locked_property,),
    )

    database_url: str = "sqlite:///var/worker.db"
    redis_url: str | None = None
    broker_url: str | None = None
    sd_api_url: str = "https://stablediffusionapi.com/api/v3"
    sd_api_key: SecretStr | None = None
    sd_api_keys: SecretStr = SecretStr("{}")
    sd_api_keys_file: Path | None = None
    sd_api_hosts: str = ""
    sd_api_rps: RequestRates = RequestRates(DEFAULT_RPS)
    sd_api_timeout: float = Field(default=20.0, gt=0, le=3_600)
    sd_api_status_words: str = "{}"
    sd_api_ca_bundle: str | None = None
    sd_api_proxy: SecretStr | None = None
    requests_ca_bundle: str | None = None
    storage_url: str = ""
    output_max_bytes: int = Field(default=209_715_200, gt=0)
    output_max_pixels: int = Field(default=150_000_000, gt=0)
    output_timeout: float = Field(default=300.0, gt=0, le=86_400)
    output_deadline: float = Field(default=86_400.0, gt=0, le=MAX_SECONDS)
    output_allowed_networks: str = ""
    storage_address: str = ""
    state_directory: str = str(state_directory.DEFAULT)
    user_agent: str = Field(default=USER_AGENT, max_length=256)
    downloads_per_host: int = Field(default=12, ge=1, le=1_000)
    poll_price: float = Field(default=0.5, gt=0, le=3_600)
    poll_min: float = Field(default=3.0, ge=0, le=3_600)
    poll_policy: Policy = "learned"
    job_deadline: float | None = Field(default=None, gt=0, le=MAX_SECONDS)
    late_looks: str = "1h,3h,10h,24h"
    recovery_seconds: float = Field(default=30.0, ge=5, le=3_600)
    on_done_tasks: str = ""
    prune_after: str = ""
    prune_states: str = "completed,cancelled"
    prune_files: Literal["keep", "remove"] = "keep"
    webhook_secret: SecretStr | None = None
    webhook_allowed_networks: str = ""
    log_format: Literal["auto", "json", "text"] = "auto"
    flower_basic_auth: SecretStr | None = None
    flower_address: str = "127.0.0.1"
    flower_port: int | None = Field(default=None, ge=0, le=65_535)
    flower_jobs: int = Field(default=1_000, ge=0, le=5_000)
    port: int | None = Field(default=None, ge=0, le=65_535)
    metrics_address: str = "127.0.0.1"
    metrics_port: int = Field(default=9464, ge=0, le=65_535)
    admin_password: SecretStr | None = None
    admin_address: str = "127.0.0.1"
    admin_port: int | None = Field(default=None, ge=0, le=65_535)

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
        """Read settings only from `_EnvironmentSource`, which covers the environment and the `.env` file."""
        return init_settings, _EnvironmentSource(settings_cls)

    @field_validator("*", mode="before")
    @classmethod
    def _without_invisible_characters(cls, value: object, info: ValidationInfo) -> object:
        """Strip invisible characters around a value. Refuse them inside it."""
        if not isinstance(value, str):
            return value
        if info.field_name in ("sd_api_keys", "sd_api_rps", "sd_api_status_words"):  # JSON may span several lines
            return trimmed(value)
        if info.field_name in _LISTS:
            return ",".join(clean(item) for item in trimmed(value).split(","))
        return clean(value)

    @field_validator("database_url")
    @classmethod
    def _valid_database_url(cls, value: str) -> str:
        database_url(value)
        return value

    @field_validator("redis_url")
    @classmethod
    def _valid_redis_url(cls, value: str | None) -> str | None:
        return None if value is None else redis_url(value)

    @field_validator("broker_url")
    @classmethod
    def _valid_broker_url(cls, value: str | None) -> str | None:
        return None if value is None else broker_url(value)

    @field_validator("sd_api_url")
    @classmethod
    def _valid_api_url(cls, value: str) -> str:
        if "@" in value:
            raise ValueError("contains a user name: it may have only scheme, host, port and path")
        try:
            api_host(value.rstrip("/"))
        except NotTrackable as error:
            raise ValueError(str(error)) from None
        return value.rstrip("/")

    @field_validator("sd_api_keys")
    @classmethod
    def _valid_keys(cls, value: SecretStr) -> SecretStr:
        parse_keys(value.get_secret_value())
        return value

    @field_validator("sd_api_rps", mode="before")
    @classmethod
    def _parse_rates(cls, value: object) -> RequestRates:
        """Accept one number for all accounts, or a JSON object of accounts and numbers. `*` means all others."""
        if isinstance(value, RequestRates):
            return value
        try:
            text = trimmed(value) if isinstance(value, str) else value
            by_account = json.loads(text) if isinstance(text, str) and text.startswith("{") else {"*": text}
            rates = {str(account): _rate(rate) for account, rate in by_account.items()}
        except (ValueError, TypeError):
            raise ValueError('is wrong: it must be a number, or JSON such as {"shop": 3, "*": 10}') from None
        if not all(account == "*" or ACCOUNT.fullmatch(account) for account in rates):
            raise ValueError('has an invalid account name; for example {"shop": 3, "*": 10}')
        return RequestRates(rates.pop("*", DEFAULT_RPS), rates)

    @field_validator("sd_api_status_words")
    @classmethod
    def _valid_status_words(cls, value: str) -> str:
        parse_status_words(value or "{}")
        return value or "{}"

    @field_validator("late_looks")
    @classmethod
    def _valid_late_looks(cls, value: str) -> str:
        _durations(value)
        return value

    @field_validator("storage_url")
    @classmethod
    def _valid_storage_url(cls, value: str) -> str:
        if not value or re.fullmatch(r"file:(//)?/(?!/)[^\x00]*", value) or _S3.fullmatch(value):
            return value
        if value.startswith("s3:"):
            raise ValueError("must have a bucket, and may have a prefix, for example s3://pictures/app")
        raise ValueError("must be file: and an absolute path, for example file:/srv/outputs, or s3://bucket/prefix")

    @field_validator("storage_address")
    @classmethod
    def _valid_storage_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment):
            raise ValueError("must be the URL at which a web server serves STORAGE_URL, such as https://host/outputs")
        return value

    @field_validator("sd_api_ca_bundle", "requests_ca_bundle")
    @classmethod
    def _existing_ca_bundle(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).exists():
            raise ValueError("must be an existing file or folder of certificates")
        return value

    @field_validator("sd_api_proxy")
    @classmethod
    def _valid_proxy(cls, value: SecretStr | None) -> SecretStr | None:
        parts = urlsplit("" if value is None else value.get_secret_value())
        if value is not None and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("must be a proxy's URL, for example http://proxy.example:3128")
        return value

    @field_validator("sd_api_hosts")
    @classmethod
    def _valid_hosts(cls, value: str) -> str:
        invalid = next((item for item in _items(value) if not _HOST.fullmatch(item)), None)
        if invalid is not None:
            raise ValueError(f"must list hosts as host or host:port, not {invalid.rpartition('@')[2][:80]!r}")
        return value

    @field_validator("log_format", mode="before")
    @classmethod
    def _valid_log_format(cls, value: object) -> object:
        word = trimmed(str(value)).lower()
        return word if word in ("json", "text") else "auto"  # the web app may use the same variable for itself

    @field_validator("flower_basic_auth")
    @classmethod
    def _valid_basic_auth(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not all(":" in item for item in _items(value.get_secret_value())):
            raise ValueError("must be user:password")
        return value

    @field_validator("user_agent")
    @classmethod
    def _valid_user_agent(cls, value: str) -> str:
        if not (value.isascii() and value.isprintable()):
            raise ValueError("must be one line of ASCII text, for example shop/2.1 (+https://shop.example)")
        return value

    @field_validator("prune_after")
    @classmethod
    def _valid_prune_age(cls, value: str) -> str:
        if value and not MIN_PRUNE_SECONDS <= parse_duration(value) <= MAX_SECONDS:
            raise ValueError("must be from 1h to ten years")
        return value

    @field_validator("prune_states")
    @classmethod
    def _valid_prune_states(cls, value: str) -> str:
        states = _items(value)
        if not states or not FINAL_STATES.issuperset(states):
            raise ValueError(f"must list final states: {', '.join(sorted(FINAL_STATES))}")
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _valid_webhook_secrets(cls, value: SecretStr | None) -> SecretStr | None:
        for item in _items("" if value is None else value.get_secret_value()):
            try:
                secret_bytes(item)
            except ValueError as error:
                raise ValueError(f"{error}; several are separated by commas, the first is the current one") from None
        return value

    @field_validator("output_allowed_networks", "webhook_allowed_networks")
    @classmethod
    def _valid_networks(cls, value: str) -> str:
        for item in _items(value):
            try:
                ipaddress.ip_network(item)
            except ValueError as error:
                raise ValueError(f"must be a list of networks in CIDR form: {error}") from None
        return value

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

    @locked_property
    def database(self) -> URL:
        """The database URL with its SQLAlchemy driver. Raises SettingsError if its folder is missing."""
        url = database_url(self.database_url)
        if url.get_backend_name() == "sqlite" and url.database and not url.database.startswith((":memory:", "file:")):
            self._make_folder(Path(url.database).absolute().parent)
        return url

    def _make_folder(self, folder: Path) -> None:
        """Create the folder of an SQLite file if it is the state directory. Any other must exist."""
        if folder.is_dir():
            return
        if folder not in (state_directory.DEFAULT.absolute(), state_directory.configured(self.state_directory)):
            raise SettingsError(
                f"DATABASE_URL names a file in {folder}, which is not a directory: create it, or correct it"
            )
        try:
            folder.mkdir(mode=state_directory.PRIVATE, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"DATABASE_URL: cannot create the directory {folder} ({error.strerror})") from None

    @locked_property
    def state(self) -> Path:
        """A writable directory for state. Raises SettingsError if there is none."""
        return state_directory.writable(state_directory.configured(self.state_directory))

    @locked_property
    def redis(self) -> str:
        """The Redis URL: the setting, or else the embedded server if it answers, or else the default URL."""
        if self.redis_url:
            return self.redis_url
        folder = state_directory.configured(self.state_directory)
        folders = [folder]
        with suppress(SettingsError):  # raised if the machine has no directory for temporary files
            folders.append(state_directory.fallback(folder))
        for candidate in folders:
            if _answers(candidate / EMBEDDED_SOCKET):
                return f"redis+socket://{candidate / EMBEDDED_SOCKET}"
        return "redis://localhost:6379/0"

    @property
    def broker(self) -> str:
        """The URL of the Celery broker."""
        return self.broker_url or self.redis

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

    @cached_property
    def api(self) -> AllowedApi:
        """The base URL of the hosted API and the hosts that may receive the key."""
        own = api_host(self.sd_api_url)
        hosts = {item.lower().removesuffix(":443") for item in _items(self.sd_api_hosts)}
        if not hosts:
            hosts = set(VENDOR_HOSTS) if own in VENDOR_HOSTS else {own}
        return AllowedApi(self.sd_api_url, frozenset(hosts | {own}))

    @cached_property
    def status_words(self) -> Mapping[str, str]:
        """Additional status words of the API, each with the standard word that it means."""
        return parse_status_words(self.sd_api_status_words)

    @cached_property
    def late_look_seconds(self) -> tuple[float, ...]:
        """Seconds after its deadline at which an expired job is polled again. Empty if switched off."""
        return _durations(self.late_looks)

    @property
    def ca_bundle(self) -> str | None:
        """The CA bundle for TLS connections to the API, or None for the public CAs."""
        return self.sd_api_ca_bundle or self.requests_ca_bundle

    @property
    def proxy(self) -> str | None:
        """The proxy for calls to the API. Only `SD_API_PROXY` counts; HTTP_PROXY and similar variables are not used."""
        return None if self.sd_api_proxy is None else self.sd_api_proxy.get_secret_value()

    @property
    def api_host(self) -> str:
        """The host of `SD_API_URL`."""
        return api_host(self.sd_api_url)

    @cached_property
    def allowed_networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """Non-public networks that downloads may reach."""
        return tuple(ipaddress.ip_network(item) for item in _items(self.output_allowed_networks))

    @cached_property
    def webhook_networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """Non-public networks that webhooks may be sent to."""
        return tuple(ipaddress.ip_network(item) for item in _items(self.webhook_allowed_networks))

    @cached_property
    def webhook_secrets(self) -> tuple[bytes, ...]:
        """The secrets that sign webhooks, the current one first."""
        return tuple(secret_bytes(item) for item in self._secret_texts)

    @property
    def _secret_texts(self) -> list[str]:
        return _items("" if self.webhook_secret is None else self.webhook_secret.get_secret_value())

    @property
    def secret_texts(self) -> tuple[str, ...]:
        """All texts that must never be shown: API keys, including replaced ones, and webhook secrets."""
        return (*self.keys.texts(), *self._secret_texts)

    @cached_property
    def storage_path(self) -> Path | None:
        """The directory for outputs, or None if they are stored in a bucket."""
        if not self.storage_url:
            return DEFAULT_STORAGE.absolute()
        if self.storage_url.startswith("s3:"):
            return None
        return Path(re.sub(r"^file:(//)?", "", self.storage_url))

    @cached_property
    def bucket(self) -> tuple[str, str] | None:
        """The bucket for outputs and the prefix of object names, or None if they are stored in a directory."""
        match = _S3.fullmatch(self.storage_url)
        return None if match is None else (match["bucket"], (match["prefix"] or "").strip("/"))

    @property
    def partial_path(self) -> Path:
        """The directory for partial downloads of outputs that go to a bucket. Raises SettingsError if not writable."""
        return self.state / "partial"

    @cached_property
    def allowed_tasks(self) -> frozenset[str] | None:
        """The task names that `on_done` may use, or None if any is allowed."""
        return frozenset(_items(self.on_done_tasks)) or None

    def json_logs(self, stream: TextIO) -> bool:
        """Return whether logs on this stream are JSON. By default they are unless the stream is a terminal."""
        return self.log_format == "json" or (self.log_format == "auto" and not stream.isatty())

    @cached_property
    def prune_seconds(self) -> float | None:
        """The age in seconds, since its end, at which a job is pruned. None means never."""
        return parse_duration(self.prune_after) if self.prune_after else None

    @cached_property
    def states_to_prune(self) -> tuple[str, ...]:
        """The final states whose jobs are pruned."""
        return tuple(dict.fromkeys(_items(self.prune_states)))

    @cached_property
    def pace(self) -> Pace:
        """The pacing of polls."""
        return Pace(self.poll_policy, self.poll_price, self.poll_min)

    def deadline_for(self, kind: str) -> float:
        """Return the seconds from submission after which a job of `kind` may expire."""
        if self.job_deadline is not None:
            return self.job_deadline
        return next((seconds for word, seconds in LONG_DEADLINES if word in kind), 3_600.0)


class _EnvironmentSource(PydanticBaseSettingsSource):
    """Settings from the environment and, unless switched off, the `.env` file in the working directory."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not used: all values are read together."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Return the values that are set, by field name."""
        values = {name.lower(): value for name, value in read_environment(os.environ, dotenv_file()).items()}
        return {name: values[name] for name in self.settings_cls.model_fields if name in values}


def dotenv_file() -> Path | None:
    """Return the path of the `.env` file, which need not exist. None if reading it is switched off."""
    return None if os.environ.get(DOTENV_SWITCH) == "off" else Path(".env")


def load(*processes: str) -> Settings:
    """Return the settings of this process. Raises SettingsError with one line that names the variables and the fix.

    A wrong setting that only another process uses gets its default value. `processes` lists the roles of this process.
    """
    variables = read_environment(os.environ, dotenv_file())
    _refuse_unknown(variables)
    errors: dict[str, str] = {}
    try:
        settings = Settings()
    except ValidationError as error:
        for detail in error.errors():
            errors.setdefault(str(detail["loc"][0]) if detail["loc"] else "", _reason(detail))
        if not all(_process_of(name) for name in errors):
            raise SettingsError("; ".join(errors.values())) from None
        settings = Settings(**{name: Settings.model_fields[name].default for name in errors})
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


def _rate(value: object) -> float:
    rate = math.nan if isinstance(value, bool) else float(str(value))
    if not 0 < rate <= MAX_RPS:
        raise ValueError
    return rate


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


def _durations(text: str) -> tuple[float, ...]:
    """Return the durations of LATE_LOOKS in ascending order. Raises ValueError."""
    items = _items(text.lower())
    if items in ([], ["off"], ["none"], ["no"], ["false"], ["0"]):
        return ()
    if items in (["on"], ["yes"], ["true"]):
        return _durations(str(Settings.model_fields["late_looks"].default))
    try:
        spans = sorted({parse_duration(item) for item in items})
    except ValueError:
        raise ValueError("must be off, or a list of durations after the deadline, such as 1h,3h,10h,24h") from None
    if len(spans) > MAX_LATE_LOOKS or not 0 < spans[0] <= spans[-1] <= MAX_LATE_LOOK_SECONDS:
        raise ValueError(f"must have at most {MAX_LATE_LOOKS} durations, from 1 s to 30d")
    return tuple(spans)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _answers(path: Path) -> bool:
    """Return whether a server on this socket accepts connections from this user."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
