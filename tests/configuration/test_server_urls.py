"""URLs of servers: parsed once, equal for every library, and refused in one line without any part of the password."""

import re

import pytest
from kombu.connection import Connection
from kombu.utils.url import parse_url
from sqlalchemy import create_engine

from worker.app import FetchWorkerApp
from worker.configuration.server_urls import broker_url, database_url
from worker.configuration.server_urls import redis_url as read_redis
from worker.coordination.rate_limiter import redis_client
from worker.settings import load

SECRET = "Q7se"


@pytest.mark.parametrize(
    ("url_text", "expected"),
    [
        ("redis://r", "redis://r:6379/0"),
        ("redis://r/3", "redis://r:6379/3"),
        ("redis://r?db=3", "redis://r:6379/3"),
        ("redis://r?virtual_host=3", "redis://r:6379/3"),
        ("redis://:Q7se/cret=@r:1/2", "redis://:Q7se%2Fcret%3D@r:1/2"),
        ("redis://:Q7se#cret@r", "redis://:Q7se%23cret@r:6379/0"),
        ("redis://:Q7se?c=ret@r", "redis://:Q7se%3Fc%3Dret@r:6379/0"),
        ("redis://u:Q7se@cret@r", "redis://u:Q7se%40cret@r:6379/0"),
        ("redis://:Q7se%cret@r", "redis://:Q7se%25cret@r:6379/0"),
        ("redis://:Q7se%23cret@r", "redis://:Q7se%23cret@r:6379/0"),
        ("redis://:Q7se@r/1?client_name=a@b", "redis://:Q7se@r:6379/1"),
        ("redis://r?password=Q7se", "redis://:Q7se@r:6379/0"),
        ("redis://[::1]:7/1", "redis://[::1]:7/1"),
        ("redis://r?health_check_interval=30&protocol=2&socket_timeout=1&decode_responses=true", "redis://r:6379/0"),
        ("redis://r?tls=true", "rediss://r:6379/0?ssl_cert_reqs=required"),
        ("valkeys://r", "rediss://r:6379/0?ssl_cert_reqs=required"),
        ("rediss://r?ssl_cert_reqs=CERT_OPTIONAL", "rediss://r:6379/0?ssl_cert_reqs=optional"),
        ("rediss://r?ssl_ca_certs=/a/b.pem", "rediss://r:6379/0?ssl_cert_reqs=required&ssl_ca_certs=/a/b.pem"),
        (
            "rediss://r?ssl_check_hostname=False",
            "rediss://r:6379/0?ssl_cert_reqs=required&ssl_check_hostname=false",
        ),
        ("unix:///run/r.sock?db=2", "redis+socket:///run/r.sock?virtual_host=2"),
        ("unix://:Q7se/x@/run/r.sock", "redis+socket://:Q7se%2Fx@/run/r.sock"),
        ("REDIS://r", "redis://r:6379/0"),
    ],
)
def test_redis_py_kombu_and_celery_use_the_same_server(url_text: str, expected: str) -> None:
    url = read_redis(url_text)

    assert url == expected
    assert read_redis(url) == url
    client_options = redis_client(url, seconds=1.0).connection_pool.connection_kwargs
    app = FetchWorkerApp(load().model_copy(update={"redis_url": url, "broker_url": url}))
    backend_options = app.backend.connparams
    assert client_options.get("password") == backend_options.get("password")
    assert client_options.get("db", 0) == backend_options["db"]
    if "socket" not in url:
        broker = parse_url(url)
        assert (
            (broker["hostname"], broker["port"])
            == (client_options["host"], client_options["port"])
            == (backend_options["host"], backend_options["port"])
        )
        assert broker["password"] == client_options.get("password")


@pytest.mark.parametrize(
    ("url_text", "message"),
    [
        (f"redis://:{SECRET}@r/mydb", "database number"),
        (f"redis://:{SECRET}@r1:1,r2:2/0", "several servers"),
        (f"sentinel://:{SECRET}@r:26379", "Sentinel"),
        (f"redis+sentinel://:{SECRET}@r:26379", "Sentinel"),
        (f"redis+cluster://:{SECRET}@r", "cluster"),
        (f"rediss://:{SECRET}@r?ssl_cert_reqs=maybe", "ssl_cert_reqs"),
        (f"rediss://:{SECRET}@r?ssl_ca_data={SECRET}", "ssl_ca_data"),
        (f"redis://:{SECRET}@r?ssl_cert_reqs=none", "rediss://"),
        (f"redis://:{SECRET}@r:99999", "port"),
        (f"redis://:{SECRET}@r:port", "host or port"),
        (f"http://:{SECRET}@r", "redis://"),
        (f":{SECRET}@r:6379", "scheme"),
    ],
)
def test_an_invalid_redis_url_is_refused_without_showing_its_password(url_text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_redis(url_text)

    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("url_text", "expected"),
    [
        ("amqp://r", "amqp://r:5672/"),
        ("amqp://u:Q7/se#c@ret@r//", "amqp://u:Q7%2Fse%23c%40ret@r:5672/%2F"),
        ("amqp://u:p@r/shop?heartbeat=30&connection_attempts=3", "amqp://u:p@r:5672/shop"),
        ("amqp://u:p@r/%2F", "amqp://u:p@r:5672/%2F"),
        ("amqp://u:p@r?virtual_host=shop", "amqp://u:p@r:5672/shop"),
        ("amqp://u:p@a;amqp://u:p@b", "amqp://u:p@a:5672/;amqp://u:p@b:5672/"),
        ("amqp://u:p@a,b:7/v", "amqp://u:p@a:5672/v;amqp://u:p@b:7/v"),
        (
            "amqps://u:p@r/?verify=verify_peer&cacertfile=/ca.pem",
            "amqps://u:p@r:5671/?ssl_ca_certs=/ca.pem&ssl_cert_reqs=required",
        ),
        ("redis://:a#b@r", "redis://:a%23b@r:6379/0"),
        ("sqs://", "sqs://"),
    ],
)
def test_a_broker_url_is_one_that_kombu_supports(url_text: str, expected: str) -> None:
    assert broker_url(url_text) == expected
    if not url_text.startswith("sqs"):
        with Connection(expected) as connection:
            assert connection.hostname


@pytest.mark.parametrize(
    ("url_text", "expected"),
    [
        ("postgresql://u:p@h/d?pgbouncer=true&connection_limit=1&pool_timeout=0", "postgresql+psycopg://u:p@h/d"),
        ("postgresql+asyncpg://h/d?prepared_statement_cache_size=0", "postgresql+psycopg://h/d"),
        ("postgresql+asyncpg://h/d?ssl=require", "postgresql+psycopg://h/d?sslmode=require"),
        ("postgresql+asyncpg://h/d?ssl=true", "postgresql+psycopg://h/d?sslmode=require"),
        ("postgres://h/d?sslmode=no-verify", "postgresql+psycopg://h/d?sslmode=require"),
        ("postgres://h/d?sslmode=disable", "postgresql+psycopg://h/d?sslmode=disable"),
        ("postgis://h/d", "postgresql+psycopg://h/d"),
        ("postgresql://h/d?schema=public", "postgresql+psycopg://h/d"),
        ("postgresql://h/d?schema=shop", "postgresql+psycopg://h/d?options=-csearch_path%3Dshop"),
        ("postgresql://h/d?options=-csearch_path%3Dshop", "postgresql+psycopg://h/d?options=-csearch_path%3Dshop"),
        ("postgresql://u:Q7/s#e@c?r@h/d", "postgresql+psycopg://u:Q7%2Fs%23e%40c%3Fr@h/d"),
        ("postgresql://h/d?user=u&password=Q7se", "postgresql+psycopg://u:Q7se@h/d"),
        (
            "postgresql://u@a:1,b/d?target_session_attrs=any",
            "postgresql+psycopg://u@/d?host=a%2Cb&port=1%2C5432&target_session_attrs=read-write",
        ),
        (
            "postgresql:///d?host=a:1&host=b:2",
            "postgresql+psycopg:///d?host=a%2Cb&port=1%2C2&target_session_attrs=read-write",
        ),
        ("postgresql:///d?host=/run/pg", "postgresql+psycopg:///d?host=%2Frun%2Fpg&port=5432"),
        ("postgresql://%2Frun%2Fpg/d", "postgresql+psycopg:///d?host=%2Frun%2Fpg&port=5432"),
        ("mysql+aiomysql://u@h/d?charset=latin1&autocommit=true", "mysql+pymysql://u@h/d"),
        ("mysql://u@h/d?ssl-mode=REQUIRED", "mysql+pymysql://u@h/d?ssl_verify_cert=none"),
        ("mysql://u@h/d?ssl-mode=DISABLED", "mysql+pymysql://u@h/d?ssl_disabled=true"),
        ("mysql://u@h/d?sslmode=prefer", "mysql+pymysql://u@h/d"),
        (
            "mysql://u@h/d?ssl-mode=VERIFY_CA&ssl-ca=/ca.pem",
            "mysql+pymysql://u@h/d?ssl_ca=%2Fca.pem&ssl_check_hostname=false",
        ),
        ("mysql://u@h/d?ssl_ca=/ca.pem", "mysql+pymysql://u@h/d?ssl_ca=%2Fca.pem&ssl_check_hostname=true"),
        ("mysql://u@/d?unix_socket=/run/m.sock", "mysql+pymysql://u@/d?unix_socket=%2Frun%2Fm.sock"),
        ("sqlite+aiosqlite:///x.db?timeout=5", "sqlite:///x.db"),
    ],
)
def test_options_of_other_programs_are_translated_or_dropped(url_text: str, expected: str) -> None:
    url = database_url(url_text)

    assert url.render_as_string(hide_password=False) == expected
    assert create_engine(url).dialect.create_connect_args(url)


@pytest.mark.parametrize(
    ("url_text", "message"),
    [
        (f"oracle://u:{SECRET}@h/d", "postgresql://"),
        (f"jdbc:postgresql://h/d?password={SECRET}", "postgresql://"),
        (f"postgresql://u:{SECRET}@h:port/d", "host or port"),
        (f"postgresql://u:{SECRET}@h/d?sslmode=sometimes", "sslmode"),
        (f"postgresql://u:{SECRET}@h/d?sslmod=require", "sslmod"),
        (f"postgresql://u:{SECRET}@h/d?sslpassword={SECRET}", "sslpassword"),
        (f"postgresql://u:{SECRET}@h/d?schema=a;b", "schema"),
        (f"mysql://u:{SECRET}@h/d?ssl-mode=MAYBE", "ssl-mode"),
        (f"mysql://u:{SECRET}@h/d?ssl-mode=VERIFY_CA", "ssl_ca="),
        (f"mysql://u:{SECRET}@h1,h2/d", "several servers"),
        ("sqlite://x.db", "slashes"),
        (SECRET, "not a database URL"),
    ],
)
def test_an_invalid_database_url_is_refused_without_showing_its_password(url_text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        database_url(url_text)

    assert SECRET not in str(raised.value)


def test_a_password_with_special_characters_and_a_database_number_work_with_a_real_server(redis_url: str) -> None:
    password, secret = "a/b#c?d=e@f:g%h i", "shop"
    admin = redis_client(redis_url, seconds=2.0)
    admin.execute_command("ACL", "SETUSER", secret, "on", f">{password}", "~*", "&*", "+@all")  # type: ignore[no-untyped-call]  # redis-py
    url = read_redis(redis_url.replace("redis+socket://", f"unix://{secret}:{password}@") + "?db=2")
    try:
        with Connection(url) as connection, connection.SimpleQueue("letters") as queue:
            queue.put("hello")

        assert redis_client(url, seconds=2.0).llen("letters") == 1
        assert admin.llen("letters") == 0
        assert FetchWorkerApp(load().model_copy(update={"redis_url": url})).backend.client.llen("letters") == 1
    finally:
        redis_client(url, seconds=2.0).flushdb()
        admin.execute_command("ACL", "DELUSER", secret)  # type: ignore[no-untyped-call]  # redis-py
        admin.close()
