"""SQL expressions that differ between databases: seconds between two times, and the condition for a due time."""

from datetime import datetime
from typing import Any

from sqlalchemy import Boolean, Double, String
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ColumnElement
from sqlalchemy.sql.functions import FunctionElement

from worker.store.schema import jobs, waiting_account

Moment = datetime | ColumnElement[datetime]  # a time, or a parameter or expression with one


class seconds_between(FunctionElement[float]):  # noqa: N801  # SQLAlchemy's functions are written like this
    """The seconds from one time to another, as a float."""

    type = Double()
    inherit_cache = True


def _compiled_arguments(element: seconds_between, compiler: SQLCompiler, options: dict[str, Any]) -> tuple[str, str]:
    begin, end = (compiler.process(clause, **options) for clause in element.clauses)
    return begin, end


@compiles(seconds_between)
def _postgresql(element: seconds_between, compiler: SQLCompiler, **options: Any) -> str:
    begin, end = _compiled_arguments(element, compiler, options)
    return f"EXTRACT(epoch FROM ({end} - {begin}))::double precision"


@compiles(seconds_between, "sqlite")
def _sqlite(element: seconds_between, compiler: SQLCompiler, **options: Any) -> str:
    begin, end = _compiled_arguments(element, compiler, options)
    return f"((julianday({end}) - julianday({begin})) * 86400.0)"


@compiles(seconds_between, "mysql", "mariadb")
def _mysql(element: seconds_between, compiler: SQLCompiler, **options: Any) -> str:
    begin, end = _compiled_arguments(element, compiler, options)
    return f"(TIMESTAMPDIFF(MICROSECOND, {begin}, {end}) / 1e6)"


class HasDueTime(ColumnElement[bool]):
    """The condition that a job has a due time, in the form that matches the database's index of such jobs."""

    type = Boolean()
    inherit_cache = True

    def self_group(self, against: Any = None) -> Any:
        """Return self. SQLAlchemy would append `= 1` on MariaDB, which has no booleans, and no index matches that."""
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


class DueAccount(ColumnElement[str]):
    """The account of a job with a due time, in the form that the database's index of such jobs holds."""

    type = String(64)
    inherit_cache = True

    @property
    def _from_objects(self) -> list[Any]:
        return [jobs]


DUE_ACCOUNT: ColumnElement[Any] = DueAccount()


@compiles(DueAccount)
def _account(_element: DueAccount, compiler: SQLCompiler, **options: Any) -> str:
    return str(compiler.process(jobs.c.account, **options))


@compiles(DueAccount, "mysql", "mariadb")
def _account_mysql(_element: DueAccount, compiler: SQLCompiler, **options: Any) -> str:
    return str(compiler.process(waiting_account, **options))
