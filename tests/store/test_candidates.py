"""Which remote ids are known, on every database."""

from sqlalchemy import Engine

from tests.rows import add_job
from worker.store.candidates import known_remote_ids


def test_given_remote_ids_then_those_of_jobs_of_the_account_are_known(engine: Engine) -> None:
    with engine.begin() as connection:
        add_job(connection, "12")
        add_job(connection, "ab", fetch_base="https://api.test/api/v6/video/fetch")
        add_job(connection, "13", account="shop")

        known = known_remote_ids(connection, "default", ["12", "13", "AB", "ab", "14"])
        assert known == {"12", "ab"}
        assert known_remote_ids(connection, "shop", ["12", "13"]) == {"13"}
        assert known_remote_ids(connection, "default", []) == set()


def test_given_thousands_of_remote_ids_then_all_are_looked_up(engine: Engine) -> None:
    with engine.begin() as connection:
        add_job(connection, "0")
        add_job(connection, "4999")

        assert known_remote_ids(connection, "default", [str(number) for number in range(5_000)]) == {"0", "4999"}
