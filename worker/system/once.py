"""Make things once, however many threads ask for them first.

`functools.cached_property` has no lock since Python 3.12, and `functools.cache` never had one: threads that arrive
together each make their own. Use these two where a second one does harm (a pool, a thread, a counter), and the standard
ones where it only costs a computation.
"""

import os
import threading
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, Generic, Self, TypeVar, overload

T = TypeVar("T")

_LOCK = "_made_once_lock"  # in the instance's `__dict__`, beside what was made


class locked_property(cached_property[T]):  # noqa: N801  # named as the one that it stands for
    """A `cached_property` that one thread makes while all others wait for it.

    Each instance has one lock for all its locked properties, so that they may use each other.
    """

    @overload
    def __get__(self, instance: None, owner: type[Any] | None = None) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type[Any] | None = None) -> T: ...

    def __get__(self, instance: object | None, owner: type[Any] | None = None) -> Self | T:
        """Return the value, made by the first caller. Afterwards the instance's `__dict__` answers, without a lock."""
        if instance is None:
            return self
        values, name = instance.__dict__, str(self.attrname)
        with values.setdefault(_LOCK, threading.RLock()):  # one step, whatever other threads do
            if name not in values:
                values[name] = self.func(instance)
            made: T = values[name]
            return made


class locked_cache(Generic[T]):  # noqa: N801  # named as the one that it stands for
    """A `functools.cache` for functions with positional arguments that one thread calls while all others wait.

    A forked child begins with a lock that nobody holds. It does inherit what was made: take the process id as an
    argument where that must not be.
    """

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._made: dict[tuple[Hashable, ...], T] = {}
        self._new_lock()
        os.register_at_fork(after_in_child=self._new_lock)
        self.__doc__ = make.__doc__

    def __call__(self, *arguments: Hashable) -> T:
        """Return what was made for these arguments, made by the first caller."""
        try:
            return self._made[arguments]
        except KeyError:
            pass
        with self._lock:
            if arguments not in self._made:
                self._made[arguments] = self._make(*arguments)
            return self._made[arguments]

    def cache_clear(self) -> None:
        """Forget everything that was made."""
        with self._lock:
            self._made.clear()

    def _new_lock(self) -> None:
        self._lock = threading.RLock()
