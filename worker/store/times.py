"""Spans of time in SQL, as each database writes them."""

from typing import Any

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


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
