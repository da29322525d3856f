"""The settings: what the environment and a `.env` file say, checked once, with one clear line for what is wrong."""

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
from worker.system.once import locked_property
from worker.vendor.fetch_url import VENDOR_HOSTS, AllowedApi, api_host
from worker.vendor.status_words import parse_status_words

DEFAULT_STORAGE = Path("var/outputs")
EMBEDDED_SOCKET = "redis.sock"
LONGEST = 10 * 365 * 86_400.0  # seconds; more would be a slip, and no date can hold much more
MOST_LOOKS, LONGEST_LOOK = 20, 30 * 86_400.0
LEAST_PRUNE_AGE = 3_600.0  # seconds; whoever waits for a job must find it
LONG_DEADLINES = (("training", 14_400.0), ("video", 7_200.0))
SHARED_NAMES = frozenset(
    {"DATABASE_URL", "REDIS_URL", "BROKER_URL", "PORT", "REQUESTS_CA_BUNDLE", "LOG_FORMAT"}
    | {"ADMIN_PASSWORD", "ADMIN_ADDRESS", "ADMIN_PORT", "STATE_DIRECTORY", "USER_AGENT"}
)  # apps have like names of their own
KEY_NAMES = ("SD_API_KEY", "SD_API_KEYS", "SD_API_KEYS_FILE", "WEBHOOK_SECRET")
DEFAULT_RPS = 10.0
MOST_RPS = 1_000_000.0
USER_AGENT = "fetch-worker/0.1.0"  # names the product: many hosts refuse the names of HTTP libraries
# Settings that one process alone has a use for: where they are wrong, the others go on.
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
DOTENV_SWITCH = "FETCH_WORKER_DOTENV"  # "off": `up` and `demo` hand their processes the whole environment themselves


class Settings(BaseSettings):
    """Every setting, under its environment variable's name in lower case. Seconds and bytes where a unit is missing."""

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
    output_deadline: float = Field(default=86_400.0, gt=0, le=LONGEST)
    output_allowed_networks: str = ""
    storage_address: str = ""
    state_directory: str = str(state_directory.DEFAULT)
    user_agent: str = Field(default=USER_AGENT, max_length=256)
    downloads_per_host: int = Field(default=12, ge=1, le=1_000)
    poll_price: float = Field(default=0.5, gt=0, le=3_600)
    poll_min: float = Field(default=3.0, ge=0, le=3_600)
    poll_policy: Policy = "learned"
    job_deadline: float | None = Field(default=None, gt=0, le=LONGEST)
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

    _wrong: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment and the `.env` file are read by `worker.configuration.environment`; nothing else is read."""
        return init_settings, _EnvironmentSource(settings_cls)

    @field_validator("*", mode="before")
    @classmethod
    def _visible(cls, value: object, info: ValidationInfo) -> object:
        """Take off what nobody sees around a value, and refuse it inside."""
        if not isinstance(value, str):
            return value
        if info.field_name in ("sd_api_keys", "sd_api_rps", "sd_api_status_words"):  # JSON, in lines as one likes
            return trimmed(value)
        if info.field_name in _LISTS:
            return ",".join(clean(item) for item in trimmed(value).split(","))
        return clean(value)

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        database_url(value)
        return value

    @field_validator("redis_url")
    @classmethod
    def _known_redis(cls, value: str | None) -> str | None:
        return None if value is None else redis_url(value)

    @field_validator("broker_url")
    @classmethod
    def _known_broker(cls, value: str | None) -> str | None:
        return None if value is None else broker_url(value)

    @field_validator("sd_api_url")
    @classmethod
    def _plain_api_url(cls, value: str) -> str:
        if "@" in value:
            raise ValueError("carries a user name: only scheme, host, port and path may be in it")
        try:
            api_host(value.rstrip("/"))
        except NotTrackable as wrong:
            raise ValueError(str(wrong)) from None
        return value.rstrip("/")

    @field_validator("sd_api_keys")
    @classmethod
    def _keys_by_account(cls, value: SecretStr) -> SecretStr:
        parse_keys(value.get_secret_value())
        return value

    @field_validator("sd_api_rps", mode="before")
    @classmethod
    def _rates(cls, value: object) -> RequestRates:
        """A number for every account, or a JSON object of accounts and numbers; `*` stands for all others."""
        if isinstance(value, RequestRates):
            return value
        try:
            text = trimmed(value) if isinstance(value, str) else value
            given = json.loads(text) if isinstance(text, str) and text.startswith("{") else {"*": text}
            rates = {str(account): _rate(rate) for account, rate in given.items()}
        except (ValueError, TypeError):
            raise ValueError('is wrong: it must be a number, or JSON such as {"shop": 3, "*": 10}') from None
        if not all(account == "*" or ACCOUNT.fullmatch(account) for account in rates):
            raise ValueError('has an account name that can\'t be one; for example {"shop": 3, "*": 10}')
        return RequestRates(rates.pop("*", DEFAULT_RPS), rates)

    @field_validator("sd_api_status_words")
    @classmethod
    def _taught(cls, value: str) -> str:
        parse_status_words(value or "{}")
        return value or "{}"

    @field_validator("late_looks")
    @classmethod
    def _late_spans(cls, value: str) -> str:
        _spans(value)
        return value

    @field_validator("storage_url")
    @classmethod
    def _absolute_storage(cls, value: str) -> str:
        if not value or re.fullmatch(r"file:(//)?/(?!/)[^\x00]*", value) or _S3.fullmatch(value):
            return value
        if value.startswith("s3:"):
            raise ValueError("must name a bucket, and may name a prefix, for example s3://pictures/app")
        raise ValueError("must be file: and an absolute path, for example file:/srv/outputs, or s3://bucket/prefix")

    @field_validator("storage_address")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment):
            raise ValueError("must be the address that a web server shows STORAGE_URL at, such as https://host/outputs")
        return value

    @field_validator("sd_api_ca_bundle", "requests_ca_bundle")
    @classmethod
    def _readable_bundle(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).exists():
            raise ValueError("must be a file or folder of certificates that exists")
        return value

    @field_validator("sd_api_proxy")
    @classmethod
    def _plain_proxy(cls, value: SecretStr | None) -> SecretStr | None:
        parts = urlsplit("" if value is None else value.get_secret_value())
        if value is not None and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("must be a proxy's URL, for example http://proxy.example:3128")
        return value

    @field_validator("sd_api_hosts")
    @classmethod
    def _plain_hosts(cls, value: str) -> str:
        wrong = next((item for item in _items(value) if not _HOST.fullmatch(item)), None)
        if wrong is not None:
            raise ValueError(f"lists hosts as host or host:port, not {wrong.rpartition('@')[2][:80]!r}")
        return value

    @field_validator("log_format", mode="before")
    @classmethod
    def _some_format(cls, value: object) -> object:
        word = trimmed(str(value)).lower()
        return word if word in ("json", "text") else "auto"  # an app may have a setting of this name for itself

    @field_validator("flower_basic_auth")
    @classmethod
    def _user_and_password(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not all(":" in item for item in _items(value.get_secret_value())):
            raise ValueError("must be user:password")
        return value

    @field_validator("user_agent")
    @classmethod
    def _plain_ascii(cls, value: str) -> str:
        if not (value.isascii() and value.isprintable()):
            raise ValueError("must be one line of ASCII text, for example shop/2.1 (+https://shop.example)")
        return value

    @field_validator("prune_after")
    @classmethod
    def _some_age(cls, value: str) -> str:
        if value and not LEAST_PRUNE_AGE <= parse_duration(value) <= LONGEST:
            raise ValueError("must be from 1h to ten years")
        return value

    @field_validator("prune_states")
    @classmethod
    def _final_states(cls, value: str) -> str:
        named = _items(value)
        if not named or not FINAL_STATES.issuperset(named):
            raise ValueError(f"must list final states: {', '.join(sorted(FINAL_STATES))}")
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _signing_secrets(cls, value: SecretStr | None) -> SecretStr | None:
        for item in _items("" if value is None else value.get_secret_value()):
            try:
                secret_bytes(item)
            except ValueError as wrong:
                raise ValueError(f"{wrong}; several are separated by commas, the first is the current one") from None
        return value

    @field_validator("output_allowed_networks", "webhook_allowed_networks")
    @classmethod
    def _networks(cls, value: str) -> str:
        for item in _items(value):
            try:
                ipaddress.ip_network(item)
            except ValueError as wrong:
                raise ValueError(f"has no network in CIDR form: {wrong}") from None
        return value

    def check(self, process: str) -> None:
        """Raise SettingsError where a setting that this process alone uses is wrong."""
        lines = [line for name, line in self._wrong.items() if name.startswith(PROCESS_SETTINGS[process])]
        if lines:
            raise SettingsError("; ".join(lines))

    @property
    def wrong(self) -> tuple[str, ...]:
        """What is wrong with settings of single processes, one line each."""
        return tuple(self._wrong.values())

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Return what `repr` and `str` show: URLs without user, password and query, which may all be secret."""
        return [(name, _without_secrets(value)) for name, value in super().__repr_args__()]

    @locked_property
    def database(self) -> URL:
        """The database's URL with the driver that is used for it. Raises SettingsError where its folder is missing."""
        url = database_url(self.database_url)
        if url.get_backend_name() == "sqlite" and url.database and not url.database.startswith((":memory:", "file:")):
            self._make_folder(Path(url.database).absolute().parent)
        return url

    def _make_folder(self, folder: Path) -> None:
        """Make the folder of an SQLite file where it is one for state; any other that is missing is a slip."""
        if folder.is_dir():
            return
        if folder not in (state_directory.DEFAULT.absolute(), state_directory.chosen(self.state_directory)):
            raise SettingsError(f"DATABASE_URL names a file in {folder}, which is no directory: make it, or correct it")
        try:
            folder.mkdir(mode=state_directory.PRIVATE, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"DATABASE_URL: can't make the directory {folder} ({error.strerror})") from None

    @locked_property
    def state(self) -> Path:
        """A directory for state that can be written to. Raises SettingsError where there is none."""
        return state_directory.writable(state_directory.chosen(self.state_directory))

    @locked_property
    def redis(self) -> str:
        """Where Redis is: as set, else the embedded server of this directory if it answers, else the standard place."""
        if self.redis_url:
            return self.redis_url
        folder = state_directory.chosen(self.state_directory)
        places = [folder]
        with suppress(SettingsError):  # a machine may have no directory for temporary files
            places.append(state_directory.substitute(folder))
        for place in places:
            if _answers(place / EMBEDDED_SOCKET):
                return f"redis+socket://{place / EMBEDDED_SOCKET}"
        return "redis://localhost:6379/0"

    @property
    def broker(self) -> str:
        """The Celery broker's URL."""
        return self.broker_url or self.redis

    @locked_property
    def keys(self) -> ApiKeys:
        """The API keys by account, as they are now."""
        from_file = self.sd_api_keys_file is not None
        fixed = {} if from_file else parse_keys(self.sd_api_keys.get_secret_value())
        if self.sd_api_key is not None:
            fixed["default"] = self.sd_api_key.get_secret_value()
        return ApiKeys({account: key for account, key in fixed.items() if key}, self.sd_api_keys_file)

    def rps(self, account: str) -> float:
        """Requests per second that the account may make, all processes together."""
        return self.sd_api_rps.of(account)

    @cached_property
    def api(self) -> AllowedApi:
        """The hosted API's base address and the hosts that the key may be sent to."""
        own = api_host(self.sd_api_url)
        hosts = {item.lower().removesuffix(":443") for item in _items(self.sd_api_hosts)}
        if not hosts:
            hosts = set(VENDOR_HOSTS) if own in VENDOR_HOSTS else {own}
        return AllowedApi(self.sd_api_url, frozenset(hosts | {own}))

    @cached_property
    def status_words(self) -> Mapping[str, str]:
        """Status words that the rules don't have, each with the one that it stands for."""
        return parse_status_words(self.sd_api_status_words)

    @cached_property
    def late_look_seconds(self) -> tuple[float, ...]:
        """How long after its deadline an expired job is asked about again; none where that is switched off."""
        return _spans(self.late_looks)

    @property
    def ca_bundle(self) -> str | None:
        """Whom TLS connections to the API trust, where it is not the public authorities."""
        return self.sd_api_ca_bundle or self.requests_ca_bundle

    @property
    def proxy(self) -> str | None:
        """The proxy that calls to the API go through. Only one that was asked for: the environment's is not used."""
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
        """What webhooks are signed with, the current secret first."""
        return tuple(secret_bytes(item) for item in self._secret_texts)

    @property
    def _secret_texts(self) -> list[str]:
        return _items("" if self.webhook_secret is None else self.webhook_secret.get_secret_value())

    @property
    def secret_texts(self) -> tuple[str, ...]:
        """All that must never be shown: API keys, those that were replaced too, and the secrets of webhooks."""
        return (*self.keys.texts(), *self._secret_texts)

    @cached_property
    def storage_path(self) -> Path | None:
        """The directory that outputs are stored in; None where that is a bucket."""
        if not self.storage_url:
            return DEFAULT_STORAGE.absolute()
        if self.storage_url.startswith("s3:"):
            return None
        return Path(re.sub(r"^file:(//)?", "", self.storage_url))

    @cached_property
    def bucket(self) -> tuple[str, str] | None:
        """The bucket that outputs are stored in, and the prefix of their names; None where that is a directory."""
        found = _S3.fullmatch(self.storage_url)
        return None if found is None else (found["bucket"], (found["prefix"] or "").strip("/"))

    @property
    def partial_path(self) -> Path:
        """Where outputs are received that go to a bucket then. Raises SettingsError where nothing can be written."""
        return self.state / "partial"

    @cached_property
    def allowed_tasks(self) -> frozenset[str] | None:
        """The task names that `on_done` may name; None allows any."""
        return frozenset(_items(self.on_done_tasks)) or None

    def json_logs(self, stream: TextIO) -> bool:
        """Whether logs that go to this stream are JSON: where it is no terminal, if nothing else is said."""
        return self.log_format == "json" or (self.log_format == "auto" and not stream.isatty())

    @cached_property
    def prune_seconds(self) -> float | None:
        """How long ago a job must have ended to be pruned; None where none is."""
        return parse_duration(self.prune_after) if self.prune_after else None

    @cached_property
    def states_to_prune(self) -> tuple[str, ...]:
        """The final states whose jobs are pruned."""
        return tuple(dict.fromkeys(_items(self.prune_states)))

    @cached_property
    def pace(self) -> Pace:
        """How polls are paced."""
        return Pace(self.poll_policy, self.poll_price, self.poll_min)

    def deadline_for(self, kind: str) -> float:
        """Seconds from submission after which a job of `kind` may expire."""
        if self.job_deadline is not None:
            return self.job_deadline
        return next((seconds for word, seconds in LONG_DEADLINES if word in kind), 3_600.0)


class _EnvironmentSource(PydanticBaseSettingsSource):
    """Settings from the environment and, unless it is switched off, the `.env` file in the working directory."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not used: all values are read at once."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Return the values that are set, by field."""
        values = {name.lower(): value for name, value in read_environment(os.environ, dotenv_file()).items()}
        return {name: values[name] for name in self.settings_cls.model_fields if name in values}


def dotenv_file() -> Path | None:
    """The `.env` file that is read, whether or not it is there; None where that is switched off."""
    return None if os.environ.get(DOTENV_SWITCH) == "off" else Path(".env")


def load(*processes: str) -> Settings:
    """Return the settings of this process. Raises SettingsError with one line that names variables and what to do.

    A wrong setting that only another process uses keeps its default; `processes` are those that this one is.
    """
    variables = read_environment(os.environ, dotenv_file())
    _refuse_unknown(variables)
    wrong: dict[str, str] = {}
    try:
        settings = Settings()
    except ValidationError as error:
        for detail in error.errors():
            wrong.setdefault(str(detail["loc"][0]) if detail["loc"] else "", _reason(detail))
        if not all(_process_of(name) for name in wrong):
            raise SettingsError("; ".join(wrong.values())) from None
        settings = Settings(**{name: Settings.model_fields[name].default for name in wrong})
    settings._wrong.update(wrong)
    _clean_aws(variables, needed=settings.bucket is not None)
    for process in processes:
        settings.check(process)
    return settings


def _process_of(name: str) -> str | None:
    return next((process for process, prefixes in PROCESS_SETTINGS.items() if name.startswith(prefixes)), None)


def _reason(error: Any) -> str:
    """One line for an error of pydantic, with the variable's name and without its value."""
    variable = str(error["loc"][0]).upper() if error["loc"] else "the settings"
    message = str(error["msg"]).removeprefix("Value error, ")
    said = message if error["type"] == "value_error" else f"is wrong: {message[:1].lower()}{message[1:]}"
    return f"{variable} {said}"


def _refuse_unknown(variables: Collection[str]) -> None:
    """Refuse a variable that is none of ours but nearly: a slip that is ignored in silence costs an afternoon."""
    known = {name.upper() for name in Settings.model_fields}
    for name in sorted({name.upper() for name in variables} - known):
        near = difflib.get_close_matches(name, known - SHARED_NAMES, n=1, cutoff=0.9)
        if near or name.startswith(("SD_API_", "POLL_")):
            hint = near or difflib.get_close_matches(name, known, n=1)
            raise SettingsError(f"{name} is no setting" + (f"; did you mean {hint[0]}?" if hint else ""))


def _clean_aws(variables: Mapping[str, str], *, needed: bool) -> None:
    """Put the AWS_* variables, cleaned, where every S3 client looks for them."""
    for name, value in variables.items():
        if name.startswith("AWS_"):
            try:
                os.environ[name] = clean(value)
            except ValueError as wrong:
                if needed:
                    raise SettingsError(f"{name} {wrong}") from None


def _rate(value: object) -> float:
    rate = math.nan if isinstance(value, bool) else float(str(value))
    if not 0 < rate <= MOST_RPS:
        raise ValueError
    return rate


def _without_secrets(value: object) -> object:
    """A setting as it may be shown: of a URL its scheme, host and path."""
    if not isinstance(value, str) or not {"@", "?", "#"} & set(value):
        return value
    scheme, separator, rest = value.partition("://")
    if not separator:
        return "***"
    _, at, host = rest.rpartition("@")  # a password may have any character, so the last one counts
    bare = re.split("[?#;]", host, maxsplit=1)[0]
    return f"{scheme}://{'***@' if at else ''}{bare}{'?***' if bare != host else ''}"


def _spans(text: str) -> tuple[float, ...]:
    """The spans of time of LATE_LOOKS, in order. Raises ValueError."""
    items = _items(text.lower())
    if items in ([], ["off"], ["none"], ["no"], ["false"], ["0"]):
        return ()
    if items in (["on"], ["yes"], ["true"]):
        return _spans(str(Settings.model_fields["late_looks"].default))
    try:
        spans = sorted({parse_duration(item) for item in items})
    except ValueError:
        raise ValueError("must be off, or spans of time after the deadline such as 1h,3h,10h,24h") from None
    if len(spans) > MOST_LOOKS or not 0 < spans[0] <= spans[-1] <= LONGEST_LOOK:
        raise ValueError(f"must have at most {MOST_LOOKS} spans of time, from 1 s to 30d")
    return tuple(spans)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _answers(path: Path) -> bool:
    """Whether a server answers on this socket, and this user may talk to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
