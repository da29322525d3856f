"""The API keys by account: fixed, or from a file that is read again when it changes, so that no process starts anew."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import SecretStr

from worker.configuration.environment import clean
from worker.core.identity import ACCOUNT

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # how long a change of the file may stay unseen
LARGEST_FILE = 1 << 20  # bytes
_SHAPE = 'must be a JSON object of account names and keys, for example {"shop": "key"}'

Listener = Callable[[Iterable[str]], object]


class ApiKeys(Mapping[str, SecretStr]):
    """The keys that count now, by account. With a file, `fixed` is what counts where the file has no such account.

    While the file can't be read, or is no JSON because it is just being written, the keys stay as they were.
    """

    def __init__(
        self, fixed: Mapping[str, str], file: Path | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fixed, self._file, self._clock = dict(fixed), file, clock
        self._lock = threading.Lock()
        self._keys = dict(fixed)
        self._texts = dict.fromkeys(fixed.values())  # ordered; never forgets one, so that old keys stay masked
        self._listeners: list[Listener] = []
        self._changed: set[str] = set()
        self._content: bytes | None = None
        self._look_at = 0.0
        self.trouble: str | None = None

    def __getitem__(self, account: str) -> SecretStr:
        """The account's key. Raises KeyError where it has none."""
        return SecretStr(self._current()[account])

    def __iter__(self) -> Iterator[str]:
        """The accounts that have a key."""
        return iter(tuple(self._current()))

    def __len__(self) -> int:
        """How many accounts have a key."""
        return len(self._current())

    def __repr__(self) -> str:
        """The accounts, never the keys."""
        return f"ApiKeys({', '.join(sorted(self._keys))})"

    def texts(self) -> tuple[str, ...]:
        """Every key there was in this process's time: all of them stay secret."""
        self._current()
        return tuple(self._texts)

    def listen(self, listener: Listener) -> None:
        """Have `listener` called with all keys before a new one is used, for as long as the process lives."""
        with self._lock:
            self._listeners.append(listener)

    def take_changed(self) -> set[str]:
        """The accounts whose key is new, another one, or gone since this was last called."""
        self._current()
        with self._lock:
            changed, self._changed = self._changed, set()
        return changed

    def _current(self) -> dict[str, str]:
        if self._file is None or self._clock() < self._look_at:
            return self._keys
        with self._lock:
            if self._clock() >= self._look_at:
                self._read(self._file)
                self._look_at = self._clock() + LOOK_SECONDS
            return self._keys

    def _read(self, file: Path) -> None:
        try:
            with file.open("rb") as opened:
                content = opened.read(LARGEST_FILE + 1)
            if content == self._content:
                self._trouble(None)
                return
            keys = self._fixed | parse_keys(content.decode("utf-8-sig"))
        except OSError as error:
            self._trouble(f"can't be read ({error.strerror})")
        except ValueError as error:  # a UnicodeDecodeError is one, too
            self._trouble("is no UTF-8 text" if isinstance(error, UnicodeError) else str(error))
        else:
            self._use({account: key for account, key in keys.items() if key})
            self._content = content
            self._trouble(None)

    def _use(self, keys: dict[str, str]) -> None:
        before = self._keys
        changed = {account for account in before.keys() | keys.keys() if before.get(account) != keys.get(account)}
        self._texts |= dict.fromkeys(keys.values())
        for listener in self._listeners:
            listener(tuple(self._texts))
        self._keys = keys
        self._changed |= changed
        if changed and self._content is not None:
            log.info("SD_API_KEYS_FILE has changed accounts=%s", ",".join(sorted(changed)))

    def _trouble(self, trouble: str | None) -> None:
        """Log once what is wrong with the file, and that it is right again."""
        if trouble is not None and trouble != self.trouble:
            log.warning("SD_API_KEYS_FILE %s: the keys stay as they were", trouble)
        self.trouble = trouble


def parse_keys(text: str) -> dict[str, str]:
    """Return the keys by account. Raises ValueError, with no part of the text, where it is no JSON object of them."""
    if not text.strip():
        raise ValueError("is empty: write {} for no keys")  # an editor truncates a file before it writes
    try:
        document = json.loads(text.replace("\u00a0", " "))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document.values()):
        raise ValueError(_SHAPE)
    keys = {clean(account): clean(key) for account, key in document.items()}
    if not all(ACCOUNT.fullmatch(account) for account in keys):
        # Not shown: whoever took key and account for one another would find the key in a log.
        raise ValueError("has an account name that can't be one: letters, digits, '.', '_' and '-', at most 64")
    return keys
