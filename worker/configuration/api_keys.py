"""API keys by account. Keys from a file are read again when the file changes, so no process has to restart."""

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

CHECK_SECONDS = 1.0  # a change of the file is noticed after at most this time
MAX_FILE_BYTES = 1 << 20
_SHAPE = 'must be a JSON object of account names and keys, for example {"shop": "key"}'

Listener = Callable[[Iterable[str]], object]


class ApiKeys(Mapping[str, SecretStr]):
    """The current keys by account. With a file, `fixed` provides keys for accounts that the file does not name.

    If the file cannot be read, or is not valid JSON because it is being written, the previous keys stay in use.
    """

    def __init__(
        self, fixed: Mapping[str, str], file: Path | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fixed, self._file, self._clock = dict(fixed), file, clock
        self._lock = threading.Lock()
        self._keys = dict(fixed)
        self._texts = dict.fromkeys(fixed.values())  # ordered; keeps replaced keys, so that they stay redacted
        self._listeners: list[Listener] = []
        self._changed: set[str] = set()
        self._content: bytes | None = None
        self._check_at = 0.0
        self.trouble: str | None = None

    def __getitem__(self, account: str) -> SecretStr:
        """Return the account's key. Raises KeyError if it has none."""
        return SecretStr(self._current()[account])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the accounts that have a key."""
        return iter(tuple(self._current()))

    def __len__(self) -> int:
        """Return how many accounts have a key."""
        return len(self._current())

    def __repr__(self) -> str:
        """Show the accounts, never the keys."""
        return f"ApiKeys({', '.join(sorted(self._keys))})"

    def texts(self) -> tuple[str, ...]:
        """Return every key that this process has known. All of them stay secret."""
        self._current()
        return tuple(self._texts)

    def listen(self, listener: Listener) -> None:
        """Call `listener` with all keys before a new key is used, for as long as the process runs."""
        with self._lock:
            self._listeners.append(listener)

    def take_changed(self) -> set[str]:
        """Return the accounts whose key was added, replaced or removed since the last call."""
        self._current()
        with self._lock:
            changed, self._changed = self._changed, set()
        return changed

    def _current(self) -> dict[str, str]:
        if self._file is None or self._clock() < self._check_at:
            return self._keys
        with self._lock:
            if self._clock() >= self._check_at:
                self._read(self._file)
                self._check_at = self._clock() + CHECK_SECONDS
            return self._keys

    def _read(self, file: Path) -> None:
        try:
            with file.open("rb") as stream:
                content = stream.read(MAX_FILE_BYTES + 1)
            if content == self._content:
                self._trouble(None)
                return
            keys = self._fixed | parse_keys(content.decode("utf-8-sig"))
        except OSError as error:
            self._trouble(f"cannot be read ({error.strerror})")
        except ValueError as error:  # includes UnicodeDecodeError
            self._trouble("is not UTF-8 text" if isinstance(error, UnicodeError) else str(error))
        else:
            self._use({account: key for account, key in keys.items() if key})
            self._content = content
            self._trouble(None)

    def _use(self, keys: dict[str, str]) -> None:
        previous = self._keys
        changed = {account for account in previous.keys() | keys.keys() if previous.get(account) != keys.get(account)}
        self._texts |= dict.fromkeys(keys.values())
        for listener in self._listeners:
            listener(tuple(self._texts))
        self._keys = keys
        self._changed |= changed
        if changed and self._content is not None:
            log.info("SD_API_KEYS_FILE has changed accounts=%s", ",".join(sorted(changed)))

    def _trouble(self, trouble: str | None) -> None:
        """Log a problem with the file once, until it changes or goes away."""
        if trouble is not None and trouble != self.trouble:
            log.warning("SD_API_KEYS_FILE %s: the previous keys stay in use", trouble)
        self.trouble = trouble


def parse_keys(text: str) -> dict[str, str]:
    """Return the keys by account. Raises ValueError for other JSON; the message contains no part of the text."""
    if not text.strip():
        raise ValueError("is empty: write {} for no keys")  # editors truncate a file before they write it
    try:
        document = json.loads(text.replace("\u00a0", " "))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document.values()):
        raise ValueError(_SHAPE)
    keys = {clean(account): clean(key) for account, key in document.items()}
    if not all(ACCOUNT.fullmatch(account) for account in keys):
        # The name is not shown: if key and account were swapped, it would put the key into a log.
        raise ValueError("has an invalid account name: letters, digits, '.', '_' and '-' are allowed, at most 64")
    return keys
