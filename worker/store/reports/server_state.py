"""The state of the database server for `doctor`: vacuum, open transactions, defaults. Read-only."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import BindParameter, Connection, Row, bindparam, text
from sqlalchemy.exc import DBAPIError

from worker.store.schema import metadata

LONG_TRANSACTION = timedelta(minutes=5)  # transactions of this project last for seconds
DEAD_LEAST = 20_000  # fewer dead rows do no harm
DEAD_SHARE = 0.5  # autovacuum starts at 0.2 by default
HISTORY_MOST = 1_000_000  # InnoDB row versions that wait for purge

_TABLES: BindParameter[Any] = bindparam("tables", sorted(metadata.tables), expanding=True)
_DEFAULTS_POSTGRES = text(
    "SELECT current_setting('default_transaction_isolation') AS isolation, current_setting('autovacuum') AS autovacuum"
)
_TABLES_POSTGRES = text(
    "SELECT relname AS name, n_live_tup AS live, n_dead_tup AS dead, EXISTS (SELECT 1 FROM pg_class AS c,"
    " pg_options_to_table(c.reloptions) AS o WHERE c.oid = relid AND o.option_name = 'autovacuum_enabled'"
    " AND o.option_value IN ('false', 'off', 'no', '0')) AS off"
    " FROM pg_stat_user_tables WHERE relid = to_regclass(quote_ident(relname)) AND relname IN :tables"
).bindparams(_TABLES)
_OPEN_POSTGRES = text(
    "SELECT 'process ' || pid AS name, coalesce(nullif(application_name, ''), usename) AS owner,"
    " extract(epoch FROM clock_timestamp() - xact_start)::float AS seconds FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start < clock_timestamp() - :age"
    " UNION ALL SELECT 'prepared transaction ' || gid, owner, extract(epoch FROM clock_timestamp() - prepared)::float"
    " FROM pg_prepared_xacts WHERE database = current_database() AND prepared < clock_timestamp() - :age"
    " ORDER BY seconds DESC"
)
_DEFAULTS_MARIADB = text("SHOW GLOBAL VARIABLES WHERE variable_name IN ('tx_isolation', 'transaction_isolation')")
_OPEN_MARIADB = text(
    "SELECT concat('connection ', trx_mysql_thread_id) AS name, coalesce(p.user, '') AS owner,"
    " TIMESTAMPDIFF(SECOND, CONVERT_TZ(trx_started, 'SYSTEM', '+00:00'), UTC_TIMESTAMP()) AS seconds"
    " FROM information_schema.innodb_trx JOIN information_schema.processlist AS p ON p.id = trx_mysql_thread_id"
    " WHERE trx_mysql_thread_id <> CONNECTION_ID() AND p.db = DATABASE() HAVING seconds > :seconds"
    " ORDER BY seconds DESC"
)
_HISTORY_MARIADB = text("SELECT count FROM information_schema.innodb_metrics WHERE name = 'trx_rseg_history_len'")


@dataclass(frozen=True, slots=True)
class OpenTransaction:
    """A transaction that has been open for a long time, its owner, and its age in seconds."""

    name: str
    owner: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ServerState:
    """The state of a server.

    `autovacuum` is the server's setting; `autovacuum_off` has the project's tables for which it is off. `unvacuumed`
    has tables with their numbers of dead rows and of all rows. `history` is the length of InnoDB's list of old row
    versions.
    """

    isolation: str | None = None
    autovacuum: bool = True
    autovacuum_off: tuple[str, ...] = ()
    unvacuumed: tuple[tuple[str, int, int], ...] = ()
    open: tuple[OpenTransaction, ...] = ()
    history: int | None = None


def server_state(connection: Connection) -> ServerState:
    """Read the state of the server, as far as this role has the permissions."""
    if connection.dialect.name == "postgresql":
        return _postgres(connection)
    return ServerState() if connection.dialect.name == "sqlite" else _mariadb(connection)


def _postgres(connection: Connection) -> ServerState:
    defaults = connection.execute(_DEFAULTS_POSTGRES).one()
    tables = connection.execute(_TABLES_POSTGRES).all()
    return ServerState(
        isolation=defaults.isolation,
        autovacuum=defaults.autovacuum == "on",
        autovacuum_off=tuple(row.name for row in tables if row.off),
        unvacuumed=tuple(
            (row.name, row.dead, row.live + row.dead)
            for row in tables
            if row.dead >= DEAD_LEAST and row.dead > DEAD_SHARE * (row.live + row.dead)
        ),
        open=_open(connection.execute(_OPEN_POSTGRES, {"age": LONG_TRANSACTION}).all()),
    )


def _mariadb(connection: Connection) -> ServerState:
    defaults = connection.execute(_DEFAULTS_MARIADB).all()
    isolation = str(defaults[0][1]).replace("-", " ").lower() if defaults else None
    try:
        rows = connection.execute(_OPEN_MARIADB, {"seconds": LONG_TRANSACTION.total_seconds()}).all()
        history = connection.execute(_HISTORY_MARIADB).scalar()
    except DBAPIError:  # this needs the PROCESS privilege, which most apps' users don't have
        return ServerState(isolation)
    return ServerState(isolation, open=_open(rows), history=None if history is None else int(history))


def _open(rows: Sequence[Row[Any]]) -> tuple[OpenTransaction, ...]:
    return tuple(OpenTransaction(row.name, row.owner, float(row.seconds)) for row in rows)
