"""URLs of servers, read once and whole, and written so that every library takes them for the same server.

People share one URL among programs of many languages: passwords with raw `#`, `/`, `@` or `%`, and options that only
one library knows. Each is translated, dropped, or refused with what to write instead. No message repeats any part of a
URL that may hold a password.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlencode

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
# What follows the user and the password: hosts, then a path, then options. None of them has a raw `@`, but options may.
_TAIL = re.compile(r"(?P<hosts>[^/?#@\s]*)(?P<path>/[^?#@]*)?(?:\?(?P<query>[^#]*))?")
_OPTIONS_BEGAN = re.compile(r"@[^@/?#]*(?:/[^@?#]*)?\?[A-Za-z_]+=[^@]*$")
_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.%]+)\]|(?P<name>[^\[\]:]*))(?::(?P<port>[0-9]{1,5})?)?")
_TRUE = ("1", "true", "yes", "on", "required", "require")
_FALSE = ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Host:
    """A host name or address, without brackets, and a port where one is given."""

    name: str
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Parts:
    """A URL taken apart; user, password and path are decoded. The representation shows no password."""

    scheme: str
    user: str
    password: str = field(repr=False)
    hosts: tuple[Host, ...]
    path: str
    options: Mapping[str, str] = field(repr=False)


def split(text: str) -> Parts:
    """Take a URL apart. Raises ValueError where it is none, without a word of it.

    >>> split("redis://:a#b/c@[::1]:6379/0").hosts, split("amqp://u:a@b@h//").path
    ((Host(name='::1', port=6379),), '//')
    """
    url = _URL.fullmatch(text)
    if url is None:
        raise ValueError("is no URL: it has to begin with a scheme, such as redis:// or postgresql://")
    login, tail = _divided(url["rest"])
    user, _, password = login.partition(":")
    options: dict[str, str] = {}
    for name, value in parse_qsl(tail["query"] or "", keep_blank_values=True):
        options[name] = f"{options[name]},{value}" if name == "host" and name in options else value
    hosts = tuple(_host(item) for item in tail["hosts"].split(",")) if tail["hosts"] else ()
    return Parts(url["scheme"].lower(), unquote(user), unquote(password), hosts, tail["path"] or "", options)


def _divided(rest: str) -> tuple[str, re.Match[str]]:
    """Divide what follows the scheme at the last `@` that ends a login: none in an option, hosts behind it."""
    for place in reversed([index for index, char in enumerate(rest) if char == "@"]):
        tail = _TAIL.fullmatch(rest, place + 1)
        if tail is not None and not _OPTIONS_BEGAN.search(rest, 0, place):
            return rest[:place], tail
    tail = _TAIL.fullmatch(rest)
    if tail is None:
        raise ValueError("can't be read: write the signs # / ? @ % of the password as %23 %2F %3F %40 %25")
    return "", tail


def _host(item: str) -> Host:
    if item.startswith(("/", "%2F", "%2f")):
        return Host(unquote(item))  # the directory of a socket
    match = _HOST.fullmatch(item)
    if match is None:
        raise ValueError("has a host or port that can't be read; for example host:6379 or [::1]:6379")
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
_REDIS_TLS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")  # redis-py, kombu and Celery's results know these
_CERTIFICATES = {"none": "none", "optional": "optional", "required": "required"}


def redis_url(text: str) -> str:
    """Return the URL of a Redis server as redis-py, kombu and Celery all read it. Raises ValueError."""
    parts = split(_unix_authority(text))
    if "sentinel" in parts.scheme or "cluster" in parts.scheme:
        raise ValueError("names a Sentinel or a cluster: give the address of the primary itself, redis://host:6379/0")
    scheme = _REDIS.get(parts.scheme)
    if scheme is None:
        raise ValueError("must be a redis://, rediss:// or redis+socket:// URL")
    options = {name.lower(): value for name, value in parts.options.items()}
    if len(parts.hosts) > 1:
        raise ValueError("names several servers: give the address of the primary alone")
    if scheme == "redis" and any(options.get(name, "").lower() in _TRUE for name in ("ssl", "tls")):
        scheme = "rediss"
    user, password = parts.user or options.get("username", ""), parts.password or options.get("password", "")
    login = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user or password else ""
    if scheme == "redis+socket":
        number = _number(options.get("db") or options.get("virtual_host"))
        path = quote(unquote(parts.path))
        return f"{scheme}://{login}{path}" + (f"?virtual_host={number}" if number else "")
    number = _number(options.get("db") or options.get("virtual_host") or unquote(parts.path).strip("/"))
    host = parts.hosts[0] if parts.hosts else Host("localhost")
    query = urlencode(_redis_tls(options, scheme), safe="/")
    return f"{scheme}://{login}{_shown_host(host, 'localhost')}:{host.port or 6379}/{number}" + (query and f"?{query}")


def _unix_authority(text: str) -> str:
    """`unix:/path` and `redis+socket:/path` as they are meant."""
    return re.sub(r"^(unix|redis\+socket|redis\+unix):(?=/[^/])", r"\1://", text, flags=re.IGNORECASE)


def _number(text: str | None) -> int:
    if not text:
        return 0
    if not re.fullmatch(r"[0-9]{1,5}", text):
        raise ValueError("has no database number: its path is one, such as redis://host:6379/0")
    return int(text)


def _redis_tls(options: Mapping[str, str], scheme: str) -> dict[str, str]:
    """What the options say of certificates, in words that all libraries know; unless told, they are checked."""
    if scheme != "rediss":
        if any(name in options for name in ("ssl_cert_reqs", *_REDIS_TLS)):
            raise ValueError("has options of TLS but not its scheme: write rediss:// instead of redis://")
        return {}
    wanted = options.get("ssl_cert_reqs", "required").lower().removeprefix("cert_") or "required"
    if wanted not in _CERTIFICATES:
        raise ValueError("has an ssl_cert_reqs that is none of none, optional, required")
    tls = {"ssl_cert_reqs": wanted} | {name: options[name] for name in _REDIS_TLS if options.get(name)}
    if options.get("ssl_check_hostname", "").lower() in _FALSE:
        tls["ssl_check_hostname"] = "false"
    known = {"ssl_cert_reqs", "ssl_check_hostname", *_REDIS_TLS}
    unknown = sorted(name for name in options if name.startswith("ssl_") and name not in known)
    if unknown:
        raise ValueError(f"has the option {unknown[0][:40]}, which not all of our libraries know: take it out")
    return tls


def _shown_host(host: Host, default: str) -> str:
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
    """Return the URL of a Celery broker as kombu reads it: several for RabbitMQ, `;` between. Raises ValueError."""
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
        wanted = verify.removeprefix("cert_").removeprefix("verify_")
        tls["ssl_cert_reqs"] = {"peer": "required"}.get(wanted, wanted)
        if tls["ssl_cert_reqs"] not in _CERTIFICATES:
            raise ValueError("has an ssl_cert_reqs that is none of none, optional, required")
    if parts.scheme != "amqps" and (tls or any(options.get(name, "").lower() in _TRUE for name in ("ssl", "tls"))):
        raise ValueError("has options of TLS but not its scheme: write amqps:// instead of amqp://")
    vhost = options.get("virtual_host") or options.get("vhost") or unquote(parts.path[1:])
    login = f"{quote(parts.user, safe='')}:{quote(parts.password, safe='')}@" if parts.user or parts.password else ""
    query = urlencode(tls, safe="/")
    hosts = parts.hosts or (Host("localhost"),)
    default = 5671 if parts.scheme == "amqps" else 5672
    return ";".join(
        f"{parts.scheme}://{login}{_shown_host(host, 'localhost')}:{host.port or default}/{quote(vhost, safe='')}"
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
    """Return the URL of the database with the driver that is used for it. Raises ValueError."""
    scheme = text.partition(":")[0].lower()
    backend = scheme.partition("+")[0]
    if backend == "sqlite":
        return _sqlite_url(text)
    driver = _DRIVERS.get(backend)
    if driver is None and "://" in text:
        raise ValueError("must be a postgresql://, sqlite:///, mysql:// or mariadb:// URL")
    if driver is None or "://" not in text:
        raise ValueError("is no database URL; for example postgresql://user@host/name or sqlite:///file.db")
    parts = split(text)
    options = {name.lower().replace("-", "_"): value for name, value in parts.options.items()}
    user, password = parts.user or options.pop("user", ""), parts.password or options.pop("password", "")
    read = _postgres_options if driver.startswith("postgresql") else _mysql_options
    query = read(options, parts.hosts)
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
        raise ValueError("is no SQLite URL: write sqlite:///file.db, or sqlite:////absolute/file.db") from None
    if url.host:
        raise ValueError("has two slashes: write sqlite:///file.db, or sqlite:////absolute/file.db")
    return url if (url.database or "").startswith("file:") else url.set(query={})


def _postgres_options(options: dict[str, str], hosts: tuple[Host, ...]) -> dict[str, str]:
    """Options as libpq knows them; pools, caches and other matters of other drivers are dropped."""
    _refuse(options, "sslpassword", "would be shown in messages: use a key without a passphrase")
    _refuse(options, "sslidentity", "is known to Prisma alone: write sslcert=… and sslkey=…")
    query = {name: value for name, value in options.items() if name in _LIBPQ and value}
    words = [options[name] for name in ("sslmode", "ssl") if name in options]
    if words:
        mode = _SSL_WORDS.get(words[0].lower(), words[0].lower())
        if mode not in _SSLMODES:
            raise ValueError(f"has an sslmode that is none of {', '.join(_SSLMODES)}")
        query["sslmode"] = mode
    if options.get("sslaccept", "").lower() == "strict":
        query["sslmode"] = "verify-full"
    schema = options.get("schema") or options.get("currentschema") or options.get("search_path") or ""
    if schema and not _IDENTIFIERS.fullmatch(schema):
        raise ValueError("has a schema that is no plain name: write options=-csearch_path%3Dname")
    if schema and schema != "public":
        query["options"] = f"{query.get('options', '')} -csearch_path={schema.replace(' ', '')}".strip()
    _refuse_unknown_tls(options, {*_LIBPQ, "ssl", "sslaccept", "sslcompression", "requiressl"}, "sslmode=require")
    if query.get("host"):
        ports = [*query.get("port", "").split(","), *[""] * query["host"].count(",")]
        given = [_host(item) for item in query["host"].split(",")]
        hosts = tuple(Host(host.name, host.port or int(port or 5432)) for host, port in zip(given, ports, strict=False))
    if len(hosts) > 1 or any(host.name.startswith("/") for host in hosts) or "host" in query:
        query["host"] = ",".join(host.name for host in hosts)
        query["port"] = ",".join(str(host.port or 5432) for host in hosts)
    if len(hosts) > 1:
        query["target_session_attrs"] = "read-write"  # nothing can be done on a standby
    return query


def _mysql_options(options: dict[str, str], hosts: tuple[Host, ...]) -> dict[str, str]:
    """Options as PyMySQL knows them. Character set, pools and time-outs are ours."""
    if len(hosts) > 1:
        raise ValueError("names several servers: give the address of the primary alone")
    query = {name: value for name, value in options.items() if name in _MYSQL and value}
    socket = options.get("socket") or next((host.name for host in hosts if host.name.startswith("/")), None)
    if socket:
        query["unix_socket"] = socket
    return query | _mysql_tls(options)


def _mysql_tls(options: Mapping[str, str]) -> dict[str, str]:
    """What the options say of TLS: by certificate and name, by certificate, encrypted at least, or not at all."""
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
        raise ValueError("wants the server's certificate checked: add ssl_ca=/path/to/ca.pem")
    if files:
        return files | {"ssl_check_hostname": "true" if mode in ("", "verify_identity") else "false"}
    return {"ssl_verify_cert": "none"} if mode == "required" else {}


def _mysql_mode(word: str) -> str:
    mode = word.lower().replace("-", "_")
    if mode in ("preferred", "prefer", "allow", ""):
        return ""
    if mode.startswith("{"):  # as mysql2 for Node takes it
        return "required" if re.search(r'"rejectUnauthorized"\s*:\s*false', word) else "verify_identity"
    names: dict[str, str] = (
        dict.fromkeys((*_TRUE, "accept_invalid_certs", "no_verify", "skip_verify"), "required")
        | dict.fromkeys((*_FALSE, "disable", "disabled"), "disabled")
        | {"verify_ca": "verify_ca", "verify_full": "verify_identity", "verify_identity": "verify_identity"}
        | {"strict": "verify_identity"}
    )
    if mode not in names:
        raise ValueError("has an ssl-mode that is none of DISABLED, PREFERRED, REQUIRED, VERIFY_CA, VERIFY_IDENTITY")
    return names[mode]


def _refuse(options: Mapping[str, str], name: str, why: str) -> None:
    if name in options:
        raise ValueError(f"has the option {name}, which {why}")


def _refuse_unknown_tls(options: Mapping[str, str], known: set[str], example: str) -> None:
    """An option of TLS that was dropped in silence would leave the connection open to all."""
    unknown = sorted(name for name in options if re.search("ssl|tls|cert", name) and name not in known)
    if unknown and re.fullmatch(r"[a-z0-9_]{1,40}", unknown[0]):
        raise ValueError(f"has the option {unknown[0]}, which the driver does not know; for example {example}")
