"""An identifier of the database that contains no address, user or password."""

import hashlib
from pathlib import Path

from sqlalchemy import Connection

_QUERIES = {
    "postgresql": "SELECT system_identifier, current_database(), current_schema() FROM pg_control_system()",
    "mysql": "SELECT @@hostname, @@port, DATABASE()",
    "mariadb": "SELECT @@hostname, @@port, DATABASE()",
}


def database_id(connection: Connection) -> str:
    """Return 16 hex digits that do not depend on the address by which a process reaches the database.

    They are a hash. PostgreSQL: of the cluster's identifier, the database and the schema. MariaDB and MySQL: of the
    server's own host name, port and database. SQLite: of the file's device and inode.
    """
    query = _QUERIES.get(connection.dialect.name)
    if query is not None:
        parts = [*connection.exec_driver_sql(query).one()]
    else:
        file_status = Path(str(connection.engine.url.database)).stat()
        parts = [file_status.st_dev, file_status.st_ino]
    text = "\0".join(str(part) for part in (connection.dialect.name, *parts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
