"""Settings: the defaults of the contract, their sources, and one clear line for each error."""

import base64
import ipaddress
import json
import os
from pathlib import Path

import pytest

from worker.errors import SettingsError
from worker.settings import DOTENV_SWITCH, PROCESS_SETTINGS, load
from worker.vendor.fetch_url import VENDOR_HOSTS

SECRET = "hidden-word"


def _error_for(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """Return the error message for this environment."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as raised:
        load(*PROCESS_SETTINGS)
    return str(raised.value)


def test_without_any_variable_the_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    """There is one line per row of the contract's table."""
    settings = load()
    assert settings.database.render_as_string() == "sqlite:///var/worker.db"
    assert settings.redis == "redis://localhost:6379/0"
    assert settings.broker == settings.redis
    assert settings.sd_api_url == "https://stablediffusionapi.com/api/v3"
    assert dict(settings.keys) == {}
    assert settings.api.hosts == VENDOR_HOSTS
    assert (settings.rps("default"), settings.sd_api_timeout) == (10, 20)
    assert settings.storage_path == tmp_path / "var" / "outputs"
    assert settings.output_max_pixels == 150_000_000
    assert (settings.output_max_bytes, settings.output_timeout, settings.output_deadline) == (209_715_200, 300, 86_400)
    assert settings.allowed_networks == ()
    assert (settings.pace.price, settings.pace.min_wait, settings.pace.policy) == (0.5, 3, "learned")
    assert settings.recovery_seconds == 30
    assert settings.allowed_tasks is None
    assert (settings.prune_seconds, settings.states_to_prune, settings.prune_files) == (
        None,
        ("completed", "cancelled"),
        "keep",
    )
    assert (settings.flower_basic_auth, settings.flower_address) == (None, "127.0.0.1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "not a url"),
        ("DATABASE_URL", "oracle://host/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host:port/name"),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "http://localhost"),
        ("BROKER_URL", "localhost"),
        ("SD_API_URL", "http://api.example.com/api/v3"),
        ("SD_API_URL", "ftp://api.example.com"),
        ("SD_API_URL", "api.example.com"),
        ("SD_API_URL", f"https://user:{SECRET}@api.example.com/api/v3"),
        ("SD_API_URL", "https://api.example.com/api/v3?x=1"),
        ("SD_API_URL", "https://api.example.com:99999/api"),
        ("SD_API_KEYS", SECRET),
        ("SD_API_KEYS", f'["{SECRET}"]'),
        ("SD_API_KEYS", f'{{"shop": ["{SECRET}"]}}'),
        ("SD_API_KEYS", f'{{"shop": 5, "x": "{SECRET}"}}'),
        ("SD_API_KEYS", f'{{"my {SECRET}": "shop"}}'),
        ("SD_API_HOSTS", "https://api.example.com"),
        ("SD_API_HOSTS", "api.example.com/path"),
        ("SD_API_HOSTS", "user@api.example.com"),
        ("SD_API_HOSTS", "api.example.com:port"),
        ("SD_API_RPS", "0"),
        ("SD_API_RPS", "-1"),
        ("SD_API_RPS", "many"),
        ("SD_API_RPS", "nan"),
        ("SD_API_RPS", "inf"),
        ("SD_API_TIMEOUT", "0"),
        ("SD_API_TIMEOUT", "nan"),
        ("SD_API_CA_BUNDLE", "/nowhere/bundle.pem"),
        ("REQUESTS_CA_BUNDLE", "/nowhere/bundle.pem"),
        ("SD_API_PROXY", f"user:{SECRET}@proxy.example:3128"),
        ("SD_API_PROXY", f"socks5://user:{SECRET}@proxy.example"),
        ("SD_API_PROXY", "http://"),
        ("STORAGE_URL", "outputs"),
        ("STORAGE_URL", "file:outputs"),
        ("STORAGE_URL", "file://outputs"),
        ("STORAGE_URL", "file://host/outputs"),
        ("STORAGE_URL", "ftp://host/outputs"),
        ("STORAGE_URL", "s3:/bucket"),
        ("STORAGE_URL", "s3://"),
        ("STORAGE_URL", "s3://Bucket/prefix"),
        ("STORAGE_URL", "s3://bucket:9000/prefix"),
        ("STORAGE_ADDRESS", "host/outputs"),
        ("STORAGE_ADDRESS", "https://host/outputs?page=1"),
        ("DOWNLOADS_PER_HOST", "0"),
        ("OUTPUT_MAX_BYTES", "0"),
        ("OUTPUT_MAX_BYTES", "10MB"),
        ("OUTPUT_MAX_PIXELS", "0"),
        ("OUTPUT_MAX_PIXELS", "133 M"),
        ("OUTPUT_TIMEOUT", "0"),
        ("OUTPUT_TIMEOUT", "inf"),
        ("OUTPUT_DEADLINE", "-1"),
        ("OUTPUT_DEADLINE", "inf"),
        ("OUTPUT_DEADLINE", "1e300"),
        ("OUTPUT_ALLOWED_NETWORKS", "localhost"),
        ("OUTPUT_ALLOWED_NETWORKS", "10.0.0.1/8"),
        ("OUTPUT_ALLOWED_NETWORKS", "10.0.0.0/8,10.0.0.0/33"),
        ("POLL_PRICE", "0"),
        ("POLL_PRICE", "cheap"),
        ("POLL_MIN", "-1"),
        ("POLL_MIN", "nan"),
        ("POLL_POLICY", "eager"),
        ("JOB_DEADLINE", "0"),
        ("JOB_DEADLINE", "1 h"),
        ("JOB_DEADLINE", "1e300"),
        ("RECOVERY_SECONDS", "4"),
        ("RECOVERY_SECONDS", "nan"),
        ("PRUNE_AFTER", "soon"),
        ("PRUNE_AFTER", "0"),
        ("PRUNE_AFTER", "59m"),
        ("PRUNE_AFTER", "-1d"),
        ("PRUNE_AFTER", "nan"),
        ("PRUNE_AFTER", "1e300"),
        ("PRUNE_STATES", "pending"),
        ("PRUNE_STATES", "completed,done"),
        ("PRUNE_STATES", ","),
        ("PRUNE_FILES", "delete"),
        ("FLOWER_BASIC_AUTH", SECRET),
        ("FLOWER_PORT", "65536"),
        ("FLOWER_JOBS", "5001"),
        ("FLOWER_PORT", "flower"),
        ("PORT", "-1"),
    ],
)
def test_an_invalid_setting_gives_one_line_with_its_name_and_without_secrets(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value comes from the environment."""
    message = _error_for(monkeypatch, **{name: value})
    assert message.startswith(f"{name} ")
    assert "\n" not in message
    assert SECRET not in message
    assert len(message) < 300


def test_all_errors_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user need not correct one setting after the other."""
    message = _error_for(monkeypatch, SD_API_RPS="x", POLL_MIN="y")
    assert "SD_API_RPS" in message
    assert "POLL_MIN" in message


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("SD_API_KEYSS", "SD_API_KEYS"),
        ("SD_API_TIMOUT", "SD_API_TIMEOUT"),
        ("POLL_PRIZE", "POLL_PRICE"),
        ("POLL_MINIMUM", "POLL_MIN"),
        ("OUTPUT_MAX_BYTE", "OUTPUT_MAX_BYTES"),
        ("RECOVERY_SECOND", "RECOVERY_SECONDS"),
    ],
)
@pytest.mark.parametrize("source", ["environment", "file"])
def test_an_unknown_setting_that_resembles_ours_is_refused_with_a_suggestion(
    name: str, suggestion: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silently ignored typing errors are hard to find."""
    if source == "environment":
        message = _error_for(monkeypatch, **{name: SECRET})
    else:
        (tmp_path / ".env").write_text(f"{name}={SECRET}\n")
        message = _error_for(monkeypatch)
    assert message == f"{name} is not a setting; did you mean {suggestion}?"


@pytest.mark.parametrize("name", ["DATABASE_URLS", "REDIS_URI", "OUTPUT_DIR", "POLLUTION", "APP_PORT", "STORAGE"])
def test_variables_of_other_programs_are_ignored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is shared with the app."""
    monkeypatch.setenv(name, "x")
    load()


def test_a_dotenv_file_in_the_working_directory_is_read_and_the_environment_takes_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may have quotes, comments, `export` and blanks."""
    (tmp_path / ".env").write_text(
        "# mine\nexport SD_API_KEY='from file'\nSD_API_RPS=5\nPOLL_MIN = 7\nOTHER=1\nSD_API_TIMEOUT=\n"
    )
    monkeypatch.setenv("POLL_MIN", "9")
    settings = load()
    assert settings.keys["default"].get_secret_value() == "from file"
    assert (settings.rps("default"), settings.poll_min, settings.sd_api_timeout) == (5, 9, 20)

    monkeypatch.setenv(DOTENV_SWITCH, "off")
    assert load().rps("default") == 10


def test_a_dotenv_file_that_is_not_utf_8_gives_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor may have saved it in another encoding."""
    (tmp_path / ".env").write_bytes(b"SD_API_RPS=\xff\xfe5\n")
    assert ".env" in _error_for(monkeypatch)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compose file passes unset variables on as empty ones."""
    for name in ("DATABASE_URL", "REDIS_URL", "SD_API_KEY", "SD_API_KEYS", "SD_API_RPS", "STORAGE_URL", "JOB_DEADLINE"):
        monkeypatch.setenv(name, "")
    settings = load()
    assert dict(settings.keys) == {}
    assert settings.rps("default") == 10


def test_lists_may_have_blanks_and_empty_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blanks around items and empty items are ignored."""
    monkeypatch.setenv("OUTPUT_ALLOWED_NETWORKS", " 10.0.0.0/8, ,::1/128 ,")
    monkeypatch.setenv("ON_DONE_TASKS", " a.b , ,c.d")
    monkeypatch.setenv("SD_API_HOSTS", " One.example , two.example:8443,,three.example:443 ")
    monkeypatch.setenv("SD_API_URL", "https://base.example/api/v3/")
    settings = load()
    assert settings.allowed_networks == (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128"))
    assert settings.allowed_tasks == frozenset({"a.b", "c.d"})
    assert settings.api.hosts == {"one.example", "two.example:8443", "three.example", "base.example"}
    assert settings.sd_api_url == "https://base.example/api/v3"


def test_aws_variables_may_be_in_the_dotenv_file_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment takes precedence, as for all variables."""
    Path(".env").write_text("AWS_ENDPOINT_URL=http://one:8333\nAWS_ACCESS_KEY_ID=of-the-file\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other:8333")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    load()
    assert (os.environ["AWS_ENDPOINT_URL"], os.environ["AWS_ACCESS_KEY_ID"]) == ("http://other:8333", "of-the-file")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")


def test_representations_of_the_settings_show_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debuggers and tracebacks with local variables use `repr` and `str`."""
    secret = "Pa55-of-an-app"
    values = {
        "DATABASE_URL": f"postgresql://app:{secret}@db.example/app?password={secret}",
        "REDIS_URL": f"redis://:{secret}@redis.example/0",
        "BROKER_URL": f"amqp://app:{secret}@broker.example//",
        "SD_API_PROXY": f"http://app:{secret}@proxy.example:3128",
        "SD_API_KEY": secret,
        "SD_API_KEYS": json.dumps({"shop": secret}),
        "WEBHOOK_SECRET": "whsec_" + base64.b64encode(secret.encode() * 2).decode(),
        "FLOWER_BASIC_AUTH": f"admin:{secret}",
        "ADMIN_PASSWORD": secret,
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)

    settings = load()

    for text in (repr(settings), str(settings), f"{settings}", repr([settings])):
        assert secret not in text
        assert values["WEBHOOK_SECRET"] not in text
        assert "db.example" in text
