"""API keys by account from a file that changes while processes run."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from worker.configuration.api_keys import CHECK_SECONDS, ApiKeys
from worker.settings import load

OLD, NEW = "Kq3vZ8mT1xRw5yLb7nPd", "Zp9wQ2nS6vUe4tHc8jMf"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        self.now += 2 * CHECK_SECONDS


def plain_keys(keys: ApiKeys) -> dict[str, str]:
    return {account: key.get_secret_value() for account, key in keys.items()}


def overwrite(file: Path, text: str) -> None:
    file.write_text(text)


def replace(file: Path, text: str) -> None:
    new_file = file.with_suffix(".new")
    new_file.write_text(text)
    new_file.replace(file)


def swap_link(file: Path, text: str) -> None:
    """Replace the file as Kubernetes does for a mounted secret."""
    folder = file.parent / f"..{len(text)}-{os.urandom(4).hex()}"
    folder.mkdir()
    (folder / file.name).write_text(text)
    link = file.parent / "..new"
    link.symlink_to(folder / file.name)
    link.replace(file)


@pytest.mark.parametrize("write", [overwrite, replace, swap_link])
def test_a_changed_key_is_used_soon_and_the_old_one_stays_secret(
    write: Callable[[Path, str], None], tmp_path: Path
) -> None:
    file, clock = tmp_path / "keys.json", Clock()
    write(file, json.dumps({"shop": OLD, "gone": "old"}))
    keys = ApiKeys({}, file, clock=clock)
    assert plain_keys(keys) == {"shop": OLD, "gone": "old"}
    keys.take_changed()

    write(file, json.dumps({"shop": NEW, "added": f"{OLD}\n"}))
    clock.advance()

    assert plain_keys(keys) == {"shop": NEW, "added": OLD}
    assert keys.take_changed() == {"shop", "gone", "added"}
    assert keys.take_changed() == set()
    assert {OLD, NEW, "old"} <= set(keys.texts())


@pytest.mark.parametrize("broken", ["", " \n", "{", '{"shop": 5}', "[]", '{"a b": "x"}', '{"shop": "a\\nb"}', None])
def test_while_the_file_is_broken_the_previous_keys_stay_and_one_warning_is_logged(
    broken: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock = tmp_path / "keys.json", Clock()
    file.write_text(json.dumps({"shop": OLD}))
    keys = ApiKeys({}, file, clock=clock)
    assert plain_keys(keys) == {"shop": OLD}

    if broken is None:
        file.unlink()
    else:
        file.write_text(broken)
    for _ in range(3):
        clock.advance()
        assert plain_keys(keys) == {"shop": OLD}

    assert len(caplog.messages) == 1
    assert "SD_API_KEYS_FILE" in caplog.text
    assert keys.trouble
    file.write_text(json.dumps({"shop": NEW}))
    clock.advance()
    assert plain_keys(keys) == {"shop": NEW}
    assert keys.trouble is None


def test_listeners_get_a_key_before_it_is_used(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys.json", Clock()
    file.write_text("{}")
    keys = ApiKeys({}, file, clock=clock)
    calls: list[tuple[set[str], dict[str, str]]] = []
    keys.listen(lambda texts: calls.append((set(texts), dict(keys._keys))))

    file.write_text(json.dumps({"shop": NEW}))
    clock.advance()

    assert "shop" in keys
    assert calls[-1] == ({NEW}, {})
    assert NEW not in repr(keys)


def test_the_file_takes_precedence_over_both_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"default": NEW}))
    monkeypatch.setenv("SD_API_KEY", OLD)
    monkeypatch.setenv("SD_API_KEYS", json.dumps({"shop": OLD}))
    monkeypatch.setenv("SD_API_KEYS_FILE", str(file))

    assert plain_keys(load().keys) == {"default": NEW}


def test_rate_limits_can_differ_by_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_API_RPS", '{"shop": 3, "*": 7.5}')
    settings = load()
    assert [settings.rps(account) for account in ("shop", "default")] == [3, 7.5]

    monkeypatch.setenv("SD_API_RPS", '{"shop": 3}')
    assert load().rps("default") == 10
