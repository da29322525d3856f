"""Which database this is: a name that tells two apart and holds no address, user or password."""

import hashlib
from pathlib import Path

from sqlalchemy import Connection

_QUERIES = {
    "postgresql": "SELECT system_identifier, current_database(), current_schema() FROM pg_control_system()",
    "mysql": "SELECT @@hostname, @@port, DATABASE()",
    "mariadb": "SELECT @@hostname, @@port, DATABASE()",
}


def database_id(connection: Connection) -> str:
    """Return 16 hex digits, the same by whatever address a process reaches the database.

    PostgreSQL: its cluster's identifier, database and schema. MariaDB: host, port and database as the server knows
    them. SQLite: the file's device and inode.
    """
    query = _QUERIES.get(connection.dialect.name)
    if query is not None:
        parts = [*connection.exec_driver_sql(query).one()]
    else:
        found = Path(str(connection.engine.url.database)).stat()
        parts = [found.st_dev, found.st_ino]
    text = "\0".join(str(part) for part in (connection.dialect.name, *parts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
