"""Run acceptance programs: `python -m tests.acceptance NAME… [--jobs 500]`; exit code 0 if every check passed."""

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
from tests.acceptance.deployment import Installation
from tests.acceptance.downloads import bucket, downloads
from tests.acceptance.engine import budget, dripping_api, million_rows, two_accounts, unannounced_limit, wake_up
from tests.acceptance.families import families
from tests.acceptance.jobs import Size
from tests.acceptance.main_job import kills, main_job, track_races
from tests.acceptance.orders import orders, orders_faults
from tests.acceptance.pace import pace
from tests.acceptance.prune import prune
from tests.acceptance.recovery import recovery, restarts
from tests.acceptance.report import Report
from tests.acceptance.trouble import bad_outputs, wrong_key
from tests.acceptance.webhooks import webhooks

Program = Callable[[Path], Report]


def programs(options: argparse.Namespace) -> Mapping[str, Program]:
    """Return the programs by name. Each one takes the folder to run in."""
    installation = Installation(options.repo.resolve(), options.bin.resolve(), options.database)
    size = Size(options.jobs, options.slowest, options.seed)
    small = Size(min(20, options.jobs), min(5.0, options.slowest), options.seed)
    return {
        "main-job": lambda home: main_job(installation, home, size),
        "kills": lambda home: kills(
            installation, home, size, options.kills, options.recovery_seconds, options.restart_seconds
        ),
        "track-races": lambda home: track_races(installation, home, small),
        "wrong-key": lambda home: wrong_key(installation, home, small),
        "bad-outputs": lambda home: bad_outputs(installation, home, small),
        "canary-key": lambda home: canary_key(installation, home, small),
        "budget": lambda home: budget(installation, home),
        "unannounced-limit": lambda home: unannounced_limit(installation, home),
        "two-accounts": lambda home: two_accounts(installation, home),
        "wake-up": lambda home: wake_up(installation, home),
        "dripping-api": lambda home: dripping_api(installation, home),
        "million-rows": lambda home: million_rows(installation, home, options.rows, options.minutes),
        "admin": lambda home: admin(installation, home, options.rows, options.page_milliseconds),
        "pace": lambda home: pace(installation, home),
        "prune": lambda home: prune(installation, home, options.rows),
        "downloads": lambda home: downloads(installation, home),
        "bucket": lambda home: bucket(installation, home),
        "recovery": lambda home: recovery(installation, home, options.kills, options.recovery_seconds),
        "restarts": lambda home: restarts(installation, home),
        "webhooks": lambda home: webhooks(installation, home, small),
        "orders": lambda home: orders(installation, home, size),
        "orders-faults": lambda home: orders_faults(installation, home, size, options.order_kills),
        "families": lambda home: families(installation, home),
        "celery-user": lambda home: celery_user(installation, home, small),
    }


def run(name: str, program: Program, home: Path) -> Report:
    """Run one program. An exception is reported as a failed check with its traceback."""
    home.mkdir(parents=True)
    began = time.monotonic()
    try:
        report = program(home)
    except Exception:  # report it, and run the other programs
        report = Report(name)
        report.check("the program ran to its end", False, traceback.format_exc()[-500:])
        print(traceback.format_exc(), file=sys.stderr)
    report.check("this process imported nothing of the product", "worker" not in sys.modules)
    report.figure("wall time (s)", time.monotonic() - began)
    return report


def main() -> int:
    """Run the named programs. Print each report and a summary; keep the files of failed programs."""
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="a program, or `all`")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--slowest", type=float, default=10.0, help="the longest a job takes, in seconds")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--order-kills", type=int, default=5, help="of orders-faults")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of million-rows, prune and admin")
    parser.add_argument("--page-milliseconds", type=float, default=300.0, help="longest time for a page of admin")
    parser.add_argument("--minutes", type=float, default=10.0, help="of million-rows")
    parser.add_argument("--recovery-seconds", type=int, default=30)
    parser.add_argument("--restart-seconds", type=int, default=10, help="seconds that kills may add to a lease")
    parser.add_argument("--database", choices=("postgresql", "sqlite"), default="postgresql")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repo", type=Path, default=Path(__file__).parents[2], help="the checkout to test")
    parser.add_argument(
        "--bin", type=Path, default=Path(sys.executable).parent, help="the folder of fetch-worker and celery"
    )
    parser.add_argument("--keep", type=Path, help="keep logs and files in this folder")
    options = parser.parse_args()
    available = programs(options)
    names = list(available) if options.names == ["all"] else options.names
    unknown = [name for name in names if name not in available]
    if unknown:
        parser.error(f"no program {', '.join(unknown)}; there are {', '.join(available)}, all")

    folder = options.keep or Path(tempfile.mkdtemp(prefix="acceptance-"))
    reports = []
    for name in names:
        home = folder / name
        report = run(name, available[name], home)
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
