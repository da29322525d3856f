"""Standard tools on the product: celery inspect, alembic upgrade and downgrade, and the Procfile under honcho."""

import os
import re
import signal
import time
from pathlib import Path

from tests.acceptance.api import ApiJob
from tests.acceptance.api_process import ApiProcess
from tests.acceptance.canary import flower_answers
from tests.acceptance.deployment import WORKING, Deployment, Installation, wait_until
from tests.acceptance.jobs import Size, check_completed, check_no_foreign_connections, track_by_name, wait_final
from tests.acceptance.main_job import KEY, start_working
from tests.acceptance.report import Report

TASKS = ("track", "nudge", "cancel", "retry", "poll", "sweep", "prune", "download")
MIGRATIONS = (("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head"), ("check",))
PROCESSES = (*WORKING, "beat", "flower")


def celery_user(installation: Installation, home: Path, size: Size) -> Report:
    """Run the tools of Celery, Alembic and honcho on the checkout."""
    report = Report("celery-user")
    with ApiProcess(seed=size.seed, accept=[KEY]) as api, Deployment(installation, home, api.base, KEY) as deployment:
        for arguments in MIGRATIONS:
            result = deployment.command("alembic", *arguments)
            output = result.stdout[-300:] + result.stderr[-700:]
            report.check(f"alembic {' '.join(arguments)}", result.returncode == 0, output)
            if arguments == ("downgrade", "base"):
                tables = deployment.rows(_TABLES[installation.database])
                report.none_of("downgrade leaves only the version table", tables)

        start_working(report, deployment)
        result = deployment.command("celery", "-A", "worker.app", "inspect", "registered")
        missing = [name for name in TASKS if f"worker.{name}" not in result.stdout]
        report.check("celery inspect registered exits with 0", result.returncode == 0, result.stderr[-500:])
        report.none_of("and lists every task of the contract", missing)
        report.none_of("the processes exit within 30 s of SIGTERM", deployment.stop(*WORKING, "beat"))
        report.none_of("and leave no process behind", deployment.leftovers())

        for number, (target, signal_) in enumerate((("the group", signal.SIGINT), ("honcho", signal.SIGTERM))):
            job = ApiJob(str(19_000_000 + number), time.time(), 2.0)
            api.register([job])
            _honcho(report, deployment, job, target, signal_)
        check_no_foreign_connections(report, deployment)
    return report


_TABLES = {
    "postgresql": "SELECT tablename FROM pg_tables WHERE tablename LIKE 'fetch!_%' ESCAPE '!' "
    "AND tablename <> 'fetch_worker_version'",
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'fetch!_%' ESCAPE '!' "
    "AND name <> 'fetch_worker_version'",
}


def _honcho(report: Report, deployment: Deployment, job: ApiJob, target: str, signal_: signal.Signals) -> None:
    log = deployment.log_folder / f"honcho-{signal_.name}.log"
    honcho = deployment.shell(f"{deployment.installation.bin}/honcho start {' '.join(PROCESSES)}", log)
    try:
        deployment.wait_ready()
        report.check(f"{signal_.name}: flower answers", wait_until(lambda: flower_answers(deployment), 30))
        track_by_name(deployment, [job])
        wait_final(deployment, [job], 40)
        check_completed(report, deployment, [job])
        pids = dict(re.findall(r"(\w+)\.1 started \(pid=(\d+)\)", log.read_text()))
        alive = [name for name in PROCESSES if name in pids and Path(f"/proc/{pids[name]}").exists()]
        report.check(f"{signal_.name}: all four processes run", alive == list(PROCESSES), alive)
        began = time.monotonic()
        if target == "honcho":
            honcho.send_signal(signal_)
        else:
            os.killpg(honcho.pid, signal_)
        exited = wait_until(lambda: honcho.poll() is not None, 30)
        report.figure(f"{signal_.name} to {target}: exited after (s)", time.monotonic() - began)
        report.check(f"{signal_.name}: honcho exits within 30 s", exited)
        none_left = wait_until(lambda: not deployment.leftovers(), 5)
        report.check(f"{signal_.name}: and leaves no process behind", none_left, deployment.command_lines())
        killed = "SIGKILL" in log.read_text()
        report.check(f"{signal_.name}: no process had to be killed", not killed, log.read_text()[-600:])
    finally:
        if honcho.poll() is None:
            honcho.kill()
        honcho.wait()
        for pid in deployment.leftovers():
            os.kill(pid, signal.SIGKILL)
