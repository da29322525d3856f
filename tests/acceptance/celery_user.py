"""What a Celery user tries: inspect, alembic up and down, and the Procfile under honcho."""

import os
import re
import signal
import time
from pathlib import Path

from tests.acceptance.api import Job
from tests.acceptance.canary import flower_answers
from tests.acceptance.hosted import Hosted
from tests.acceptance.jobs import Size, check_completed, check_nothing_left_the_machine, track_by_name, wait_final
from tests.acceptance.main_job import KEY, start_working
from tests.acceptance.report import Report
from tests.acceptance.stand import WORKING, Place, Stand, wait_until

TASKS = ("track", "nudge", "cancel", "retry", "poll", "sweep", "prune", "download")
MIGRATIONS = (("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head"), ("check",))
PROCESSES = (*WORKING, "beat", "flower")


def celery_user(place: Place, home: Path, size: Size) -> Report:
    """The tools that come with Celery, Alembic and honcho work on the checkout as they do on any other."""
    report = Report("celery-user")
    with Hosted(seed=size.seed, accept=[KEY]) as hosted, Stand(place, home, hosted.base, KEY) as stand:
        for words in MIGRATIONS:
            done = stand.command("alembic", *words)
            report.check(f"alembic {' '.join(words)}", done.returncode == 0, done.stdout[-300:] + done.stderr[-700:])
            if words == ("downgrade", "base"):
                left = stand.rows(_OUR_TABLES[place.database])
                report.none_of("downgrade leaves no table but the version's", left)

        start_working(report, stand)
        done = stand.command("celery", "-A", "worker.app", "inspect", "registered")
        missing = [name for name in TASKS if f"worker.{name}" not in done.stdout]
        report.check("celery inspect registered ends with 0", done.returncode == 0, done.stderr[-500:])
        report.none_of("and shows every task of the contract", missing)
        report.none_of("the processes end within 30 s of SIGTERM", stand.stop(*WORKING, "beat"))
        report.none_of("and leave no process behind", stand.leftovers())

        for number, (whom, last_word) in enumerate((("the group", signal.SIGINT), ("honcho", signal.SIGTERM))):
            job = Job(str(19_000_000 + number), time.time(), 2.0)
            hosted.register([job])
            _honcho(report, stand, job, whom, last_word)
        check_nothing_left_the_machine(report, stand)
    return report


_OUR_TABLES = {
    "postgresql": "SELECT tablename FROM pg_tables WHERE tablename LIKE 'fetch!_%' ESCAPE '!' "
    "AND tablename <> 'fetch_worker_version'",
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'fetch!_%' ESCAPE '!' "
    "AND name <> 'fetch_worker_version'",
}


def _honcho(report: Report, stand: Stand, job: Job, whom: str, last_word: signal.Signals) -> None:
    log = stand.log_folder / f"honcho-{last_word.name}.log"
    honcho = stand.shell(f"{stand.place.bin}/honcho start {' '.join(PROCESSES)}", log)
    try:
        stand.wait_ready()
        report.check(f"{last_word.name}: flower answers", wait_until(lambda: flower_answers(stand), 30))
        track_by_name(stand, [job])
        wait_final(stand, [job], 40)
        check_completed(report, stand, [job])
        pids = dict(re.findall(r"(\w+)\.1 started \(pid=(\d+)\)", log.read_text()))
        alive = [name for name in PROCESSES if name in pids and Path(f"/proc/{pids[name]}").exists()]
        report.check(f"{last_word.name}: all four processes live", alive == list(PROCESSES), alive)
        asked = time.monotonic()
        if whom == "honcho":
            honcho.send_signal(last_word)
        else:
            os.killpg(honcho.pid, last_word)
        ended = wait_until(lambda: honcho.poll() is not None, 30)
        report.figure(f"{last_word.name} to {whom}: ended after (s)", time.monotonic() - asked)
        report.check(f"{last_word.name}: honcho ends within 30 s", ended)
        gone = wait_until(lambda: not stand.leftovers(), 5)
        report.check(f"{last_word.name}: and leaves no process behind", gone, stand.command_lines())
        killed = "SIGKILL" in log.read_text()
        report.check(f"{last_word.name}: no process had to be killed", not killed, log.read_text()[-600:])
    finally:
        if honcho.poll() is None:
            honcho.kill()
        honcho.wait()
        for pid in stand.leftovers():
            os.kill(pid, signal.SIGKILL)
