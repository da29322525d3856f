"""A minimal asyncio poller with aiohttp and asyncpg, for comparison only.

Like the worker it claims and records in batches. It has no rate limit, learned pace, holds, leases, counters or Celery.
`python -m tests.benchmarks.peer API_URL DATABASE_URL` runs until it is killed.
"""

import asyncio
import sys

import aiohttp
import asyncpg

ROWS = 20_000
IN_FLIGHT = 128
CLAIM_ROWS = 200
RECORD_SECONDS = 0.05
TABLE = """
CREATE TABLE peer_pictures (
  id bigint PRIMARY KEY, status text NOT NULL, polls int NOT NULL, due_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON peer_pictures (due_at) WHERE status = 'processing'
"""
FILL = "INSERT INTO peer_pictures SELECT n, 'processing', 0 FROM generate_series(1, $1::bigint) AS n"
CLAIM = """
UPDATE peer_pictures SET due_at = now() + interval '30 seconds'
WHERE id IN (
  SELECT id FROM peer_pictures WHERE status = 'processing' AND due_at <= now()
  ORDER BY due_at LIMIT $1 FOR UPDATE SKIP LOCKED
)
RETURNING id
"""
RECORD = """
UPDATE peer_pictures SET status = answer.status, polls = polls + 1, due_at = now()
FROM unnest($1::bigint[], $2::text[]) AS answer (id, status) WHERE peer_pictures.id = answer.id
"""


class Peer:
    """A poller on one event loop."""

    def __init__(self, api_url: str, database: asyncpg.Pool, session: aiohttp.ClientSession) -> None:
        self._api_url = api_url
        self._database = database
        self._session = session
        self._queue: asyncio.Queue[int] = asyncio.Queue(CLAIM_ROWS)
        self._answers: list[tuple[int, str]] = []

    async def run(self) -> None:
        """Poll until the process is killed."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._claim())
            tasks.create_task(self._record())
            for _ in range(IN_FLIGHT):
                tasks.create_task(self._ask())

    async def _claim(self) -> None:
        while True:
            rows = await self._database.fetch(CLAIM, CLAIM_ROWS)
            for row in rows:
                await self._queue.put(row["id"])
            if not rows:
                await asyncio.sleep(RECORD_SECONDS / 5)

    async def _ask(self) -> None:
        while True:
            picture_id = await self._queue.get()
            url = f"{self._api_url}/fetch/{picture_id}"
            try:
                async with self._session.post(url, json={"key": "sk-benchmark"}, allow_redirects=False) as response:
                    answer = await response.json()
            except (TimeoutError, aiohttp.ClientError):
                continue  # due again after 30 seconds; the benchmark stops this process between two rounds
            self._answers.append((picture_id, answer["status"]))

    async def _record(self) -> None:
        while True:
            await asyncio.sleep(RECORD_SECONDS)
            answers, self._answers = self._answers, []
            if answers:
                ids, statuses = zip(*answers, strict=True)
                await self._database.execute(RECORD, ids, statuses)


async def main(api_url: str, database_url: str) -> None:
    """Create and fill the table, and poll its rows."""
    connector = aiohttp.TCPConnector(limit=IN_FLIGHT)
    async with (
        asyncpg.create_pool(database_url, min_size=2, max_size=4) as database,
        aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=20)) as session,
    ):
        await database.execute(TABLE)
        await database.execute(FILL, ROWS)
        await Peer(api_url, database, session).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
