"""Environment variables: invisible characters are trimmed, and variables that describe other services are ignored."""

import os
from pathlib import Path

import pytest

from worker.configuration.environment import clean, is_service_link, read_environment
from worker.errors import SettingsError
from worker.settings import PROCESS_SETTINGS, load

KEY = "Kq3vZ8mT1xRw5yLb7nPd0cGh"
SERVICE_LINKS = {
    "FLOWER_PORT": "tcp://10.0.0.5:5555",
    "FLOWER_PORT_5555_TCP": "tcp://10.0.0.5:5555",
    "FLOWER_PORT_5555_TCP_ADDR": "10.0.0.5",
    "FLOWER_PORT_5555_TCP_PORT": "5555",
    "FLOWER_PORT_5555_TCP_PROTO": "tcp",
    "FLOWER_SERVICE_HOST": "10.0.0.5",
    "FLOWER_SERVICE_PORT": "5555",
    "FLOWER_SERVICE_PORT_HTTP": "5555",
    "METRICS_PORT": "tcp://10.0.0.5:80",
    "ADMIN_PORT": "udp://10.0.0.5:80",
    "PORT": "tcp://10.0.0.5:80",
    "SD_API_SERVICE_HOST": "10.0.0.9",
    "SD_API_SERVICE_PORT": "443",
    "SD_API_PORT": "tcp://10.0.0.9:443",
    "SD_API_PORT_80_TCP_ADDR": "10.0.0.9",
    "SD_API_NAME": "/web/sd-api",
    "SD_API_ENV_DEBUG": "1",
    "SD_API_KEYS_SERVICE_HOST": "10.0.0.9",
    "POLL_WORKER_SERVICE_PORT": "80",
    "POLL_PORT": "sctp://10.0.0.9:80",
    "REDIS_PORT": "tcp://10.0.0.9:6379",
}


@pytest.mark.parametrize(
    "decorated",
    ["{}\n", "{}\r\n", " {}\t", "\ufeff{}", "\u200b{}\u200d", "\u00a0{}", '"{}"', "'{}'\n", "\u201c{}\u201d"],
)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SD_API_KEY", KEY),
        ("SD_API_KEYS", f'{{"default": "{KEY}"}}'),
        ("SD_API_URL", "https://api.example.com/api/v3"),
        ("SD_API_RPS", "5"),
        ("SD_API_RPS", '{"default": 5}'),
        ("DATABASE_URL", "postgresql://u:p@h/d"),
        ("REDIS_URL", "redis://:p@r:6379/1"),
        ("BROKER_URL", "amqp://u:p@r:5672/v"),
        ("STORAGE_URL", "file:/srv/outputs"),
        ("FLOWER_BASIC_AUTH", "ops:secret"),
        ("FLOWER_PORT", "5556"),
        ("POLL_POLICY", "eta"),
        ("LOG_FORMAT", "json"),
    ],
)
def test_invisible_characters_and_quotes_around_a_value_are_removed(
    name: str, value: str, decorated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    plain = load(*PROCESS_SETTINGS)
    monkeypatch.setenv(name, decorated.format(value))

    settings = load(*PROCESS_SETTINGS)

    assert settings.model_dump() == plain.model_dump()
    assert dict(settings.keys) == dict(plain.keys)


@pytest.mark.parametrize("character", ["\n", "\r", "\u200b", "\ufeff", "\u00a0", "\u2028", "\x00", "\u00ad", "\u202e"])
def test_an_invisible_character_inside_a_value_is_refused_without_showing_the_value(character: str) -> None:
    with pytest.raises(ValueError, match="as character 5: remove it") as raised:
        clean(f"abcd{character}{KEY}")

    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SD_API_KEY", "Kq3v\n{}"),
        ("SD_API_KEYS", '{{"shop": "Kq3v\\n{}"}}'),
        ("DATABASE_URL", "postgresql://u:{}\n@h/d"),
        ("REDIS_URL", "redis://:\u200b{}@r"),
        ("FLOWER_BASIC_AUTH", "ops:{}\u200b1"),
        ("WEBHOOK_SECRET", "whsec_\u00a0{}"),
        ("USER_AGENT", "shop\r\nX-Key: {}"),
    ],
)
def test_an_error_names_the_variable_and_not_its_value(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value.format(KEY))

    with pytest.raises(SettingsError, match=f"^{name} has .* remove it$") as raised:
        load(*PROCESS_SETTINGS)

    assert KEY not in str(raised.value)


def test_json_and_lists_may_have_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_API_KEYS", f'{{\r\n  "shop":\u00a0"{KEY}\\n"\n}}\n')
    monkeypatch.setenv("SD_API_HOSTS", "a.example,\n  b.example\n")

    settings = load()

    assert settings.keys["shop"].get_secret_value() == KEY
    assert {"a.example", "b.example"} <= set(settings.api.hosts)


def test_service_links_are_ignored_by_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load(*PROCESS_SETTINGS).model_dump()
    for name, value in SERVICE_LINKS.items():
        assert is_service_link(name, value), name
        monkeypatch.setenv(name, value)

    assert load(*PROCESS_SETTINGS).model_dump() == plain


def test_a_service_link_does_not_hide_a_variable_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("FLOWER_PORT=5556\n")
    monkeypatch.setenv("FLOWER_PORT", "tcp://10.0.0.5:5555")

    assert load("flower").flower_port == 5_556


@pytest.mark.parametrize(
    ("name", "value", "process"),
    [
        ("FLOWER_PORT", "many", "flower"),
        ("PORT", "-1", "flower"),
        ("ADMIN_PORT", "x", "admin"),
        ("METRICS_PORT", "70000", "metrics"),
        ("OUTPUT_MAX_BYTES", "10MB", "downloads"),
        ("USER_AGENT", "é", "downloads"),
    ],
)
def test_a_wrong_setting_of_one_process_only_stops_that_process(
    name: str, value: str, process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)

    settings = load(*(name_of_process for name_of_process in PROCESS_SETTINGS if name_of_process != process))

    assert [line.partition(" ")[0] for line in settings.process_errors] == [name]
    with pytest.raises(SettingsError, match=f"^{name} "):
        load(process)


def test_a_file_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_bytes(b'\xef\xbb\xbfSD_API_KEY=a\r\nPOLL_MIN="7"\r\nEMPTY=\r\n')

    assert read_environment({}, file) == {"SD_API_KEY": "a", "POLL_MIN": "7"}


def test_a_byte_order_mark_before_a_name_is_removed() -> None:
    assert read_environment({"\ufeffSD_API_KEY": "a"}, None) == {"SD_API_KEY": "a"}


def test_s3_credentials_are_cleaned_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f'"{KEY}"\n')
    monkeypatch.setenv("STORAGE_URL", "s3://pictures")
    load()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == KEY

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"a\nb{KEY}")
    with pytest.raises(SettingsError, match=r"^AWS_SECRET_ACCESS_KEY has a line break"):
        load()
