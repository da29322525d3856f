"""Log lines of tasks that found nothing to do: left out, unless the level is DEBUG."""

import logging
from collections.abc import Iterator

import pytest
from celery.app.trace import LOG_FAILURE, LOG_RECEIVED, LOG_SUCCESS

from worker.polling.poller import PollReport
from worker.system.idle_lines import LOGGERS, IdleFilter, leave_out_idle_lines


@pytest.fixture(params=[logging.INFO, logging.DEBUG])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """The level of Celery's loggers, which have the filter."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(request.param)
    leave_out_idle_lines()
    yield request.param
    for logger, before in zip(loggers, levels, strict=True):
        logger.setLevel(before)
        logger.filters = [item for item in logger.filters if not isinstance(item, IdleFilter)]


def ended(name: str, result: str) -> tuple[str, str, dict[str, object]]:
    """Return logger, template and arguments of the line about the end of a task."""
    return "celery.app.trace", LOG_SUCCESS, {"name": name, "id": "1", "runtime": 0.1, "return_value": repr(result)}


@pytest.mark.parametrize(
    ("logger", "template", "arguments"),
    [
        ended("worker.poll", str(PollReport())),
        ended("worker.poll", "another run is active"),
        ended("worker.sweep", "nothing to requeue"),
        ended("worker.prune", "nothing is pruned: PRUNE_AFTER is not set"),
        ended("worker.prune", "0 jobs pruned"),
        ended("worker.download", "again later: unreachable"),
        ("celery.worker.strategy", LOG_RECEIVED, {"name": "worker.download", "id": "1", "kwargs": "{}"}),
        ("celery.worker.strategy", LOG_RECEIVED, {"name": "worker.poll", "id": "1", "kwargs": "{}"}),
        ("celery.beat", "Scheduler: Sending due task %s (%s)", ("poll", "worker.poll")),
    ],
)
def test_given_a_task_with_nothing_to_do_when_it_is_logged_then_only_debug_shows_it(
    level: int, logger: str, template: str, arguments: object, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger(logger).info(template, *(arguments if isinstance(arguments, tuple) else (arguments,)))

    lines = [record for record in caplog.records if record.name == logger]  # other threads may log, too
    assert len(lines) == (1 if level == logging.DEBUG else 0)


@pytest.mark.parametrize(
    ("logger", "template", "arguments"),
    [
        ended("worker.poll", "asked about 3 jobs: 3 ready"),
        ended("worker.sweep", "3 downloads requeued"),
        ended("worker.prune", "10 jobs pruned"),
        ended("shop.picture_ready", "nothing to do"),
        ended("worker.download", "stored 7 bytes, job 1 completed"),
        ended("worker.download", "gave up: gone"),
        ("celery.worker.strategy", LOG_RECEIVED, {"name": "worker.track", "id": "1", "kwargs": "{}"}),
        ("celery.beat", "beat: Starting...", ()),
    ],
)
def test_given_work_when_it_is_logged_then_the_line_stays(
    level: int, logger: str, template: str, arguments: object, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger(logger).info(template, *(arguments if isinstance(arguments, tuple) else (arguments,)))

    assert len(caplog.messages) == 1


def test_given_a_failed_poll_when_it_is_logged_then_the_line_stays(
    level: int, caplog: pytest.LogCaptureFixture
) -> None:
    context = {"name": "worker.poll", "id": "1", "description": "raised", "exc": "KeyError()"}

    logging.getLogger("celery.app.trace").error(LOG_FAILURE, context)

    assert len(caplog.messages) == 1
