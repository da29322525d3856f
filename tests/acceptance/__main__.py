"""Run acceptance programs: `python -m tests.acceptance NAME… [--jobs 500]`; exit code 0 if every sentence held."""

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.acceptance.admin import admin
from tests.acceptance.canary import canary_key
from tests.acceptance.celery_user import celery_user
from tests.acceptance.downloads import bucket, downloads
from tests.acceptance.engine import budget, dripping_api, million_rows, two_accounts, unannounced_limit, wake_up
from tests.acceptance.families import families
from tests.acceptance.jobs import Size
from tests.acceptance.main_job import kills, main_job, track_races
from tests.acceptance.pace import pace
from tests.acceptance.prune import prune
from tests.acceptance.recovery import recovery, restarts
from tests.acceptance.report import Report
from tests.acceptance.stand import Place
from tests.acceptance.told import webhooks
from tests.acceptance.trouble import bad_outputs, wrong_key

Program = Callable[[Path], Report]


def programs(options: argparse.Namespace) -> Mapping[str, Program]:
    """Every program by its name, ready to run in a folder of its own."""
    place = Place(options.repo.resolve(), options.bin.resolve(), options.database)
    size = Size(options.jobs, options.slowest, options.seed)
    few = Size(min(20, options.jobs), min(5.0, options.slowest), options.seed)
    return {
        "main-job": lambda home: main_job(place, home, size),
        "kills": lambda home: kills(
            place, home, size, options.kills, options.recovery_seconds, options.restart_seconds
        ),
        "track-races": lambda home: track_races(place, home, few),
        "wrong-key": lambda home: wrong_key(place, home, few),
        "bad-outputs": lambda home: bad_outputs(place, home, few),
        "canary-key": lambda home: canary_key(place, home, few),
        "budget": lambda home: budget(place, home),
        "unannounced-limit": lambda home: unannounced_limit(place, home),
        "two-accounts": lambda home: two_accounts(place, home),
        "wake-up": lambda home: wake_up(place, home),
        "dripping-api": lambda home: dripping_api(place, home),
        "million-rows": lambda home: million_rows(place, home, options.rows, options.minutes),
        "admin": lambda home: admin(place, home, options.rows, options.page_milliseconds),
        "pace": lambda home: pace(place, home),
        "prune": lambda home: prune(place, home, options.rows),
        "downloads": lambda home: downloads(place, home),
        "bucket": lambda home: bucket(place, home),
        "recovery": lambda home: recovery(place, home, options.kills, options.recovery_seconds),
        "restarts": lambda home: restarts(place, home),
        "webhooks": lambda home: webhooks(place, home, few),
        "families": lambda home: families(place, home),
        "celery-user": lambda home: celery_user(place, home, few),
    }


def run(name: str, program: Program, home: Path) -> Report:
    """Run one program; one that breaks off has failed, and its traceback is what was seen."""
    home.mkdir(parents=True)
    began = time.monotonic()
    try:
        report = program(home)
    except Exception:  # whatever stops a program is a finding about the product; the others still run
        report = Report(name)
        report.check("the program ran to its end", False, traceback.format_exc()[-500:])
        print(traceback.format_exc(), file=sys.stderr)
    report.check("nothing of the product was imported here", "worker" not in sys.modules)
    report.figure("wall time (s)", time.monotonic() - began)
    return report


def main() -> int:
    """Run what was asked for, print each report and a last table, keep the files of those that failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="a program, or `all`")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--slowest", type=float, default=10.0, help="the longest a job takes, in seconds")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of million-rows, prune and admin")
    parser.add_argument("--page-milliseconds", type=float, default=300.0, help="most that a page of admin may take")
    parser.add_argument("--minutes", type=float, default=10.0, help="of million-rows")
    parser.add_argument("--recovery-seconds", type=int, default=30)
    parser.add_argument("--restart-seconds", type=int, default=10, help="that kills may add to a lease; more if busy")
    parser.add_argument("--database", choices=("postgresql", "sqlite"), default="postgresql")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repo", type=Path, default=Path(__file__).parents[2], help="the checkout to try")
    parser.add_argument(
        "--bin", type=Path, default=Path(sys.executable).parent, help="where fetch-worker and celery are"
    )
    parser.add_argument("--keep", type=Path, help="a folder for logs and files, kept")
    options = parser.parse_args()
    known = programs(options)
    names = list(known) if options.names == ["all"] else options.names
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"no program {', '.join(unknown)}; there are {', '.join(known)}, all")

    folder = options.keep or Path(tempfile.mkdtemp(prefix="acceptance-"))
    reports = []
    for name in names:
        home = folder / name
        report = run(name, known[name], home)
        print(report.text(), flush=True)
        if report.passed and options.keep is None:
            shutil.rmtree(home)
        elif not report.passed:
            print(f"   logs and files: {home}")
        reports.append(report)
    if len(reports) > 1:
        print("\n".join(f"{'PASS' if report.passed else 'FAIL'} {report.name}" for report in reports))
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
