"""What each database writes in its own way: spans of time, and the jobs that have a due time."""

from typing import Any

from sqlalchemy import Boolean, Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ColumnElement
from sqlalchemy.sql.functions import FunctionElement

from worker.store.schema import jobs, waiting_account


class seconds_between(FunctionElement[float]):  # noqa: N801  # SQLAlchemy's functions are written like this
    """The seconds from one time to another, with fractions."""

    type = Double()
    inherit_cache = True


def _both(element: seconds_between, compiler: SQLCompiler, options: dict[str, Any]) -> tuple[str, str]:
    begin, end = (compiler.process(clause, **options) for clause in element.clauses)
    return begin, end


@compiles(seconds_between)
def _postgresql(element: seconds_between, compiler: SQLCompiler, **options: Any) -> str:
    begin, end = _both(element, compiler, options)
    return f"EXTRACT(epoch FROM ({end} - {begin}))::double precision"


@compiles(seconds_between, "sqlite")
def _sqlite(element: seconds_between, compiler: SQLCompiler, **options: Any) -> str:
    begin, end = _both(element, compiler, options)
    return f"((julianday({end}) - julianday({begin})) * 86400.0)"


@compiles(seconds_between, "mysql", "mariadb")
def _mysql(element: seconds_between, compiler: SQLCompiler, **options: Any) -> str:
    begin, end = _both(element, compiler, options)
    return f"(TIMESTAMPDIFF(MICROSECOND, {begin}, {end}) / 1e6)"


class HasDueTime(ColumnElement[bool]):
    """The condition that a job has a due time, in the words for which the database has an index of such jobs alone."""

    type = Boolean()
    inherit_cache = True

    def self_group(self, against: Any = None) -> Any:
        """Return itself: MariaDB has no booleans, and SQLAlchemy would append `= 1`, which no index serves."""
        return self

    @property
    def _from_objects(self) -> list[Any]:
        return [jobs]


HAS_DUE_TIME = HasDueTime()


@compiles(HasDueTime)
def _partial_index(element: HasDueTime, compiler: SQLCompiler, **options: Any) -> str:
    return str(compiler.process(jobs.c.due_at.is_not(None), **options))


@compiles(HasDueTime, "mysql", "mariadb")
def _generated_column(element: HasDueTime, compiler: SQLCompiler, **options: Any) -> str:
    return str(compiler.process(waiting_account.is_not(None), **options))
