"""The recorder of download attempts: claims whose end could not be recorded are released once, by any thread."""

import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from tests.rows import add_downloading, add_output, read_output
from worker.downloads.recorder import AttemptRecorder
from worker.storage.partial_files import PartialFiles
from worker.system.redaction import Scrubber

HOLDER = "host:1:1"
CLAIMS = 40
THREADS = 4


def test_given_lost_claims_when_several_threads_finish_earlier_work_then_each_claim_is_released_and_no_thread_fails(
    engine: Engine, tmp_path: Path
) -> None:
    recorder = AttemptRecorder(
        engine,
        HOLDER,
        partials=PartialFiles(tmp_path),
        scrubber=Scrubber([]),
        deadline=timedelta(days=1),
        notify=lambda _: None,
    )
    tokens = [f"{number:032x}" for number in range(CLAIMS)]
    with engine.begin() as connection:
        job = add_downloading(connection)
        outputs = [
            add_output(connection, job, number, claim_token=token, claim_holder=HOLDER)
            for number, token in enumerate(tokens)
        ]
    for token in tokens:
        with suppress(OperationalError), recorder.release_later_on_error(token):
            raise OperationalError("COMMIT", {}, Exception("the connection was lost"))
    start = threading.Barrier(THREADS)
    errors: list[Exception] = []

    def finish() -> None:
        start.wait()
        try:
            recorder.finish_earlier()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=finish) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert {read_output(engine, output).claim_token for output in outputs} == {None}
