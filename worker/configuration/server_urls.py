"""Parses URLs of servers and writes them in a form that all client libraries read in the same way.

People share one URL among programs in many languages: with a raw `#`, `/`, `@` or `%` in the password, and with options
that only one library supports. Each of these is translated, dropped, or refused with advice. No error message repeats
a part of the URL that may contain the password.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
# The part after user and password: hosts, path, options. Only options may contain a raw `@`.
_TAIL = re.compile(r"(?P<hosts>[^/?#@\s]*)(?P<path>/[^?#@]*)?(?:\?(?P<query>[^#]*))?")
_IN_OPTIONS = re.compile(r"@[^@/?#]*(?:/[^@?#]*)?\?[A-Za-z_]+=[^@]*$")
_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.%]+)\]|(?P<name>[^\[\]:]*))(?::(?P<port>[0-9]{1,5})?)?")
_TRUE = ("1", "true", "yes", "on", "required", "require")
_FALSE = ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Host:
    """A host name or address without brackets, and a port if one is given."""

    name: str
    port: int | None = None


@dataclass(frozen=True, slots=True)
class UrlParts:
    """The parts of a URL. User, password and path are decoded. The representation hides the password."""

    scheme: str
    user: str
    password: str = field(repr=False)
    hosts: tuple[Host, ...]
    path: str
    options: Mapping[str, str] = field(repr=False)


def split(text: str) -> UrlParts:
    """Split a URL into its parts. Raises ValueError if it is not a URL; the message contains no part of it.

    >>> split("redis://:a#b/c@[::1]:6379/0").hosts, split("amqp://u:a@b@h//").path
    ((Host(name='::1', port=6379),), '//')
    """
    url = _URL.fullmatch(text)
    if url is None:
        raise ValueError("is not a URL: it must begin with a scheme, such as redis:// or postgresql://")
    login, tail = _split_login(url["rest"])
    user, _, password = login.partition(":")
    options: dict[str, str] = {}
    for name, value in parse_qsl(tail["query"] or "", keep_blank_values=True):
        options[name] = f"{options[name]},{value}" if name == "host" and name in options else value
    hosts = tuple(_host(item) for item in tail["hosts"].split(",")) if tail["hosts"] else ()
    return UrlParts(url["scheme"].lower(), unquote(user), unquote(password), hosts, tail["path"] or "", options)


def _split_login(rest: str) -> tuple[str, re.Match[str]]:
    """Split at the last `@` that can end a login: it is not inside an option, and hosts follow it."""
    for place in reversed([index for index, char in enumerate(rest) if char == "@"]):
        tail = _TAIL.fullmatch(rest, place + 1)
        if tail is not None and not _IN_OPTIONS.search(rest, 0, place):
            return rest[:place], tail
    tail = _TAIL.fullmatch(rest)
    if tail is None:
        raise ValueError("cannot be read: write the characters # / ? @ % of the password as %23 %2F %3F %40 %25")
    return "", tail


def _host(item: str) -> Host:
    if item.startswith(("/", "%2F", "%2f")):
        return Host(unquote(item))  # the directory of a socket
    match = _HOST.fullmatch(item)
    if match is None:
        raise ValueError("has a host or port that cannot be read; for example host:6379 or [::1]:6379")
    port = int(match["port"]) if match["port"] else None
    if port is not None and port > 65_535:
        raise ValueError("has a port above 65535")
    return Host(match["ipv6"] or unquote(match["name"]), port)


# ── Redis ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_REDIS = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "unix": "redis+socket",
    "redis+socket": "redis+socket",
    "redis+unix": "redis+socket",
}
_REDIS_TLS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")  # supported by redis-py, kombu and Celery's result backend
_CERTIFICATES = {"none": "none", "optional": "optional", "required": "required"}


def redis_url(text: str) -> str:
    """Return the URL of a Redis server as redis-py, kombu and Celery all read it. Raises ValueError."""
    parts = split(_unix_authority(text))
    if "sentinel" in parts.scheme or "cluster" in parts.scheme:
        raise ValueError("names a Sentinel or a cluster: give the address of the primary, such as redis://host:6379/0")
    scheme = _REDIS.get(parts.scheme)
    if scheme is None:
        raise ValueError("must be a redis://, rediss:// or redis+socket:// URL")
    options = {name.lower(): value for name, value in parts.options.items()}
    if len(parts.hosts) > 1:
        raise ValueError("names several servers: give only the address of the primary")
    if scheme == "redis" and any(options.get(name, "").lower() in _TRUE for name in ("ssl", "tls")):
        scheme = "rediss"
    user, password = parts.user or options.get("username", ""), parts.password or options.get("password", "")
    login = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user or password else ""
    if scheme == "redis+socket":
        number = _database_number(options.get("db") or options.get("virtual_host"))
        path = quote(unquote(parts.path))
        return f"{scheme}://{login}{path}" + (f"?virtual_host={number}" if number else "")
    number = _database_number(options.get("db") or options.get("virtual_host") or unquote(parts.path).strip("/"))
    host = parts.hosts[0] if parts.hosts else Host("localhost")
    query = urlencode(_redis_tls(options, scheme), safe="/")
    return f"{scheme}://{login}{_host_text(host, 'localhost')}:{host.port or 6379}/{number}" + (query and f"?{query}")


def _unix_authority(text: str) -> str:
    """Return `unix:/path` and `redis+socket:/path` with two more slashes."""
    return re.sub(r"^(unix|redis\+socket|redis\+unix):(?=/[^/])", r"\1://", text, flags=re.IGNORECASE)


def _database_number(text: str | None) -> int:
    if not text:
        return 0
    if not re.fullmatch(r"[0-9]{1,5}", text):
        raise ValueError("has no database number: give it as the path, such as redis://host:6379/0")
    return int(text)


def _redis_tls(options: Mapping[str, str], scheme: str) -> dict[str, str]:
    """Return the certificate options in a form that all libraries support. Certificates are checked by default."""
    if scheme != "rediss":
        if any(name in options for name in ("ssl_cert_reqs", *_REDIS_TLS)):
            raise ValueError("has TLS options without the TLS scheme: write rediss:// instead of redis://")
        return {}
    mode = options.get("ssl_cert_reqs", "required").lower().removeprefix("cert_") or "required"
    if mode not in _CERTIFICATES:
        raise ValueError("has an invalid ssl_cert_reqs: use none, optional or required")
    tls = {"ssl_cert_reqs": mode} | {name: options[name] for name in _REDIS_TLS if options.get(name)}
    if options.get("ssl_check_hostname", "").lower() in _FALSE:
        tls["ssl_check_hostname"] = "false"
    supported = {"ssl_cert_reqs", "ssl_check_hostname", *_REDIS_TLS}
    unknown = sorted(name for name in options if name.startswith("ssl_") and name not in supported)
    if unknown:
        raise ValueError(f"has the option {unknown[0][:40]}, which not all of our libraries support: remove it")
    return tls


def _host_text(host: Host, default: str) -> str:
    name = host.name or default
    return f"[{name}]" if ":" in name else quote(name, safe=".-_")


# ── brokers ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_AMQP = ("amqp", "amqps", "pyamqp")
_AMQP_TLS = {
    "cacertfile": "ssl_ca_certs",
    "certfile": "ssl_certfile",
    "keyfile": "ssl_keyfile",
    "ssl_ca_certs": "ssl_ca_certs",
    "ssl_certfile": "ssl_certfile",
    "ssl_keyfile": "ssl_keyfile",
}


def broker_url(text: str) -> str:
    """Return the URL of a Celery broker for kombu. Several RabbitMQ URLs are joined by `;`. Raises ValueError."""
    scheme = text.partition("://")[0].lower()
    if scheme in _REDIS or "sentinel" in scheme or "redis" in scheme or "valkey" in scheme or scheme.startswith("unix"):
        return redis_url(text)
    if scheme in _AMQP:
        return ";".join(_amqp_url(item) for item in re.split(r";(?=(?:py)?amqps?://)", text))
    if not re.match(r"[a-z][a-z0-9+]*://", text):
        raise ValueError("must be a broker's URL, for example redis://host/0 or amqp://host")
    return text


def _amqp_url(text: str) -> str:
    parts = split(text)
    options = {name.lower(): value for name, value in parts.options.items()}
    tls = {_AMQP_TLS[name]: value for name, value in options.items() if name in _AMQP_TLS and value}
    verify = options.get("ssl_cert_reqs", options.get("verify", "")).lower()
    if verify:
        mode = verify.removeprefix("cert_").removeprefix("verify_")
        tls["ssl_cert_reqs"] = {"peer": "required"}.get(mode, mode)
        if tls["ssl_cert_reqs"] not in _CERTIFICATES:
            raise ValueError("has an invalid ssl_cert_reqs: use none, optional or required")
    if parts.scheme != "amqps" and (tls or any(options.get(name, "").lower() in _TRUE for name in ("ssl", "tls"))):
        raise ValueError("has TLS options without the TLS scheme: write amqps:// instead of amqp://")
    vhost = options.get("virtual_host") or options.get("vhost") or unquote(parts.path[1:])
    login = f"{quote(parts.user, safe='')}:{quote(parts.password, safe='')}@" if parts.user or parts.password else ""
    query = urlencode(tls, safe="/")
    hosts = parts.hosts or (Host("localhost"),)
    default = 5671 if parts.scheme == "amqps" else 5672
    return ";".join(
        f"{parts.scheme}://{login}{_host_text(host, 'localhost')}:{host.port or default}/{quote(vhost, safe='')}"
        + (query and f"?{query}")
        for host in hosts
    )


# ── databases ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_DRIVERS = {
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgis": "postgresql+psycopg",
    "pgsql": "postgresql+psycopg",
    "psql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mysql2": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}
_LIBPQ = frozenset(
    {"host", "hostaddr", "port", "passfile", "require_auth", "channel_binding", "options", "application_name"}
    | {"connect_timeout"}
    | {"fallback_application_name", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"}
    | {"tcp_user_timeout", "gssencmode", "krbsrvname", "gsslib", "gssdelegation", "service", "target_session_attrs"}
    | {"load_balance_hosts", "sslmode", "sslcert", "sslkey", "sslcertmode", "sslrootcert", "sslcrl", "sslcrldir"}
    | {"sslsni", "sslnegotiation", "requirepeer", "ssl_min_protocol_version", "ssl_max_protocol_version"}
)
_SSLMODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_SSL_WORDS = (
    dict.fromkeys(_TRUE, "require")
    | dict.fromkeys(_FALSE, "disable")
    | {"no-verify": "require", "verify_ca": "verify-ca", "verify_full": "verify-full", "": "require"}
)
_MYSQL = frozenset({"unix_socket", "read_default_file", "read_default_group", "bind_address", "server_public_key"})
_MYSQL_TLS = {
    "ssl_ca": "ssl_ca",
    "sslca": "ssl_ca",
    "sslrootcert": "ssl_ca",
    "ssl_cert": "ssl_cert",
    "ssl_key": "ssl_key",
    "ssl_capath": "ssl_capath",
    "ssl_cipher": "ssl_cipher",
}
_MYSQL_MODES = ("ssl_mode", "sslmode", "ssl", "usessl", "requiressl", "sslaccept")
_MYSQL_CHECKS = ("ssl_disabled", "ssl_check_hostname", "ssl_verify_identity", "ssl_verify_cert")
_IDENTIFIERS = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(?:\s*,\s*[A-Za-z_][A-Za-z0-9_$]*)*")


def database_url(text: str) -> URL:
    """Return the database URL with the SQLAlchemy driver to use. Raises ValueError."""
    scheme = text.partition(":")[0].lower()
    backend = scheme.partition("+")[0]
    if backend == "sqlite":
        return _sqlite_url(text)
    driver = _DRIVERS.get(backend)
    if driver is None and "://" in text:
        raise ValueError("must be a postgresql://, sqlite:///, mysql:// or mariadb:// URL")
    if driver is None or "://" not in text:
        raise ValueError("is not a database URL; for example postgresql://user@host/name or sqlite:///file.db")
    parts = split(text)
    options = {name.lower().replace("-", "_"): value for name, value in parts.options.items()}
    user, password = parts.user or options.pop("user", ""), parts.password or options.pop("password", "")
    read_options = _postgres_options if driver.startswith("postgresql") else _mysql_options
    query = read_options(options, parts.hosts)
    host = None if "host" in query or "unix_socket" in query or not parts.hosts else parts.hosts[0]
    return URL.create(
        driver,
        username=user or None,
        password=password or None,
        host=(host.name or None) if host else None,
        port=host.port if host else None,
        database=unquote(parts.path[1:]) or options.get("dbname") or None,
        query=query,
    )


def _sqlite_url(text: str) -> URL:
    try:
        url = make_url(re.sub(r"^sqlite\+\w+:", "sqlite:", text, flags=re.IGNORECASE))
    except (ArgumentError, ValueError):
        raise ValueError("is not an SQLite URL: write sqlite:///file.db, or sqlite:////absolute/file.db") from None
    if url.host:
        raise ValueError("has two slashes: write sqlite:///file.db, or sqlite:////absolute/file.db")
    return url if (url.database or "").startswith("file:") else url.set(query={})


def _postgres_options(options: dict[str, str], hosts: tuple[Host, ...]) -> dict[str, str]:
    """Return the options that libpq supports. Options of other drivers, such as pool sizes, are dropped."""
    _refuse(options, "sslpassword", "would be shown in messages: use a key without a passphrase")
    _refuse(options, "sslidentity", "only Prisma supports: write sslcert=… and sslkey=…")
    query = {name: value for name, value in options.items() if name in _LIBPQ and value}
    modes = [options[name] for name in ("sslmode", "ssl") if name in options]
    if modes:
        mode = _SSL_WORDS.get(modes[0].lower(), modes[0].lower())
        if mode not in _SSLMODES:
            raise ValueError(f"has an invalid sslmode: use one of {', '.join(_SSLMODES)}")
        query["sslmode"] = mode
    if options.get("sslaccept", "").lower() == "strict":
        query["sslmode"] = "verify-full"
    schema = options.get("schema") or options.get("currentschema") or options.get("search_path") or ""
    if schema and not _IDENTIFIERS.fullmatch(schema):
        raise ValueError("has a schema that is not a plain name: write options=-csearch_path%3Dname")
    if schema and schema != "public":
        query["options"] = f"{query.get('options', '')} -csearch_path={schema.replace(' ', '')}".strip()
    _refuse_unknown_tls(options, {*_LIBPQ, "ssl", "sslaccept", "sslcompression", "requiressl"}, "sslmode=require")
    if query.get("host"):
        ports = [*query.get("port", "").split(","), *[""] * query["host"].count(",")]
        named_hosts = [_host(item) for item in query["host"].split(",")]
        hosts = tuple(
            Host(host.name, host.port or int(port or 5432)) for host, port in zip(named_hosts, ports, strict=False)
        )
    if len(hosts) > 1 or any(host.name.startswith("/") for host in hosts) or "host" in query:
        query["host"] = ",".join(host.name for host in hosts)
        query["port"] = ",".join(str(host.port or 5432) for host in hosts)
    if len(hosts) > 1:
        query["target_session_attrs"] = "read-write"  # standby servers are read-only
    return query


def _mysql_options(options: dict[str, str], hosts: tuple[Host, ...]) -> dict[str, str]:
    """Return the options that PyMySQL supports. Character set, pools and timeouts are set by this project."""
    if len(hosts) > 1:
        raise ValueError("names several servers: give only the address of the primary")
    query = {name: value for name, value in options.items() if name in _MYSQL and value}
    socket = options.get("socket") or next((host.name for host in hosts if host.name.startswith("/")), None)
    if socket:
        query["unix_socket"] = socket
    return query | _mysql_tls(options)


def _mysql_tls(options: Mapping[str, str]) -> dict[str, str]:
    """Return the TLS options: check certificate and name, check only the certificate, only encrypt, or no TLS."""
    _refuse_unknown_tls(options, {*_MYSQL_TLS, *_MYSQL_MODES, *_MYSQL_CHECKS}, "ssl-mode=REQUIRED")
    files = {_MYSQL_TLS[name]: value for name, value in options.items() if name in _MYSQL_TLS and value}
    checks = {name: options[name].lower() in _TRUE for name in _MYSQL_CHECKS if name in options}
    mode = next((_mysql_mode(options[name]) for name in _MYSQL_MODES if name in options), "")
    if checks.get("ssl_disabled"):
        mode = "disabled"
    elif not mode and (checks.get("ssl_verify_identity") or checks.get("ssl_check_hostname")):
        mode = "verify_identity"
    elif not mode and checks.get("ssl_verify_cert"):
        mode = "verify_ca"
    elif not mode and checks.get("ssl_check_hostname") is False:
        mode = "verify_ca" if files else "required"
    if mode == "disabled":
        return {"ssl_disabled": "true"}
    if mode.startswith("verify_") and not {"ssl_ca", "ssl_capath"} & set(files):
        raise ValueError("requires a check of the server's certificate: add ssl_ca=/path/to/ca.pem")
    if files:
        return files | {"ssl_check_hostname": "true" if mode in ("", "verify_identity") else "false"}
    return {"ssl_verify_cert": "none"} if mode == "required" else {}


def _mysql_mode(word: str) -> str:
    mode = word.lower().replace("-", "_")
    if mode in ("preferred", "prefer", "allow", ""):
        return ""
    if mode.startswith("{"):  # the form of mysql2 for Node
        return "required" if re.search(r'"rejectUnauthorized"\s*:\s*false', word) else "verify_identity"
    names: dict[str, str] = (
        dict.fromkeys((*_TRUE, "accept_invalid_certs", "no_verify", "skip_verify"), "required")
        | dict.fromkeys((*_FALSE, "disable", "disabled"), "disabled")
        | {"verify_ca": "verify_ca", "verify_full": "verify_identity", "verify_identity": "verify_identity"}
        | {"strict": "verify_identity"}
    )
    if mode not in names:
        raise ValueError("has an invalid ssl-mode: use DISABLED, PREFERRED, REQUIRED, VERIFY_CA or VERIFY_IDENTITY")
    return names[mode]


def _refuse(options: Mapping[str, str], name: str, reason: str) -> None:
    if name in options:
        raise ValueError(f"has the option {name}, which {reason}")


def _refuse_unknown_tls(options: Mapping[str, str], supported: set[str], example: str) -> None:
    """Refuse an unknown TLS option. Dropping it silently could leave the connection unencrypted."""
    unknown = sorted(name for name in options if re.search("ssl|tls|cert", name) and name not in supported)
    if unknown and re.fullmatch(r"[a-z0-9_]{1,40}", unknown[0]):
        raise ValueError(f"has the option {unknown[0]}, which the driver does not support; for example {example}")


def same_database(first: URL, second: URL) -> bool:
    """Return whether two URLs name the same database, whatever their drivers and users are.

    >>> same_database(make_url("mysql://a@localhost/shop"), make_url("mariadb+pymysql://127.0.0.1:3306/shop"))
    True
    """
    return _place(first) == _place(second)


def _place(url: URL) -> tuple[object, ...]:
    backend = url.get_backend_name().replace("mariadb", "mysql")
    if backend == "sqlite":
        in_memory = not url.database or url.database.startswith((":memory:", "file:"))
        return backend, url.database if in_memory else Path(url.database or "").absolute()
    host = url.host or url.query.get("host") or url.query.get("unix_socket") or "localhost"
    port = url.port or {"postgresql": 5432, "mysql": 3306}.get(backend)
    return backend, "127.0.0.1" if host == "localhost" else host, port, url.database
