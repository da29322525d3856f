"""`cached_property` and `cache` with a lock: the value is made once, even if several threads ask for it together.

`functools.cached_property` has had no lock since Python 3.12, and `functools.cache` never had one, so concurrent
threads may each make a value. Use the versions here where a second value would do harm (a pool, a thread, a counter),
and those of `functools` where it would only waste time.
"""

import os
import threading
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, Generic, Self, TypeVar, overload

T = TypeVar("T")

_LOCK = "_made_once_lock"  # stored in the instance's `__dict__`, beside the values


class locked_property(cached_property[T]):  # noqa: N801  # lower case, like the standard class
    """A `cached_property` that is computed by one thread while the others wait.

    Each instance has one reentrant lock for all its locked properties, so that they may use each other.
    """

    @overload
    def __get__(self, instance: None, owner: type[Any] | None = None) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type[Any] | None = None) -> T: ...

    def __get__(self, instance: object | None, owner: type[Any] | None = None) -> Self | T:
        """Return the value, computed on first use. Later it is found in the instance's `__dict__`, without a lock."""
        if instance is None:
            return self
        values, name = instance.__dict__, str(self.attrname)
        with values.setdefault(_LOCK, threading.RLock()):  # setdefault is atomic
            if name not in values:
                values[name] = self.func(instance)
            value: T = values[name]
            return value


class locked_cache(Generic[T]):  # noqa: N801  # lower case, like the standard function
    """A `functools.cache` for functions with positional arguments, computed by one thread while the others wait.

    A forked child gets a new lock, but inherits the cached values. Add the process id to the arguments if a value must
    not be inherited.
    """

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._results: dict[tuple[Hashable, ...], T] = {}
        self._new_lock()
        os.register_at_fork(after_in_child=self._new_lock)
        self.__doc__ = make.__doc__

    def __call__(self, *arguments: Hashable) -> T:
        """Return the value for these arguments, computing it on first use."""
        try:
            return self._results[arguments]
        except KeyError:
            pass
        with self._lock:
            if arguments not in self._results:
                self._results[arguments] = self._make(*arguments)
            return self._results[arguments]

    def cache_clear(self) -> None:
        """Remove all values."""
        with self._lock:
            self._results.clear()

    def _new_lock(self) -> None:
        self._lock = threading.RLock()
