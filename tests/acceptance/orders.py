"""A burst of orders is charged exactly once each, and at most once each with kills and cut connections."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.acceptance.deployment import WORKING, Deployment, Installation, epoch, file_of, wait_until
from tests.acceptance.jobs import FINAL, Size, check_no_foreign_connections, check_no_stray_files
from tests.acceptance.main_job import KEY, start_working
from tests.acceptance.orders_api import Arrival, picture
from tests.acceptance.orders_process import LOST_ON_PURPOSE, OrdersApi, OrdersReport
from tests.acceptance.report import Report

BURST, PAUSE = 100, 0.5  # orders in a burst, and seconds between two bursts
MAX_REFUSALS = 2
MIN_SLOT_USE = 0.9
MEASURED_JOBS = 100  # with fewer, how long jobs take is not learned yet, and the first and last seconds count too much
MEAN_SECONDS, SLOTS = 2.5, 5  # of a job at the API, and of its plan
SETTINGS = {"POLL_MIN": "0", "SD_API_RPS": "50"}
LEASE_SECONDS = 10
ORDER_TIMEOUT = 3
FAULTY_SETTINGS = {
    **SETTINGS,
    "SD_API_TIMEOUT": "2",
    "SD_API_ORDER_TIMEOUT": str(ORDER_TIMEOUT),
    "RECOVERY_SECONDS": str(LEASE_SECONDS),
}
FAULTS = {"cut_before": 0.05, "cut_during": 0.7, "cut_after": 0.04, "swallowed": 0.1}
NO_FAULTS = dict.fromkeys(FAULTS, 0.0)
LARGE_EVERY = 50  # each so many orders one is large, so that it can be cut while it is sent
DOUBT_SECONDS = 2.0  # between the API's clock readings and the moment at which a worker noticed or died

ORDER_IN_BURSTS = """
import json, sys, time
from worker import order
count, burst, pause, large_every = (float(text) for text in sys.argv[1:])
ids = []
for number in range(int(count)):
    if number and number % burst == 0:
        time.sleep(pause)
    payload = {"order_number": number, "prompt": f"a lighthouse, number {number}", "samples": 1}
    if large_every and number % large_every == large_every // 2:
        payload["padding"] = "x" * 6_000_000
    ids.append(int(order("v6/images/text2img", payload)))
print(json.dumps(ids))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One run: where it happens, and the job of each order, by its number."""

    report: Report
    deployment: Deployment
    api: OrdersApi
    ids: Sequence[int]

    def rows(self) -> dict[int, dict[str, Any]]:
        """Return the rows of the orders' jobs, by order number. An order without a row is missing."""
        rows = {row["id"]: row for row in self.deployment.rows("SELECT * FROM fetch_jobs")}
        return {number: rows[job] for number, job in enumerate(self.ids) if job in rows}

    def wait_settled(self, seconds: float) -> bool:
        """Wait until every order is in a final state or uncertain."""
        return wait_until(lambda: self._settled() == len(self.ids), seconds, 0.5)

    def _settled(self) -> int:
        counts = self.deployment.rows("SELECT status, count(*) AS number FROM fetch_jobs GROUP BY status")
        return sum(row["number"] for row in counts if row["status"] in (*FINAL, "uncertain"))


def orders(installation: Installation, home: Path, size: Size) -> Report:
    """Order in bursts with a plan of 5 slots: each order is charged once, and the slots are hardly ever empty."""
    report = Report("orders")
    with (
        OrdersApi(KEY, seed=size.seed) as api,
        Deployment(installation, home, f"{api.base}/api/v3", KEY, **SETTINGS) as deployment,
    ):
        start_working(report, deployment)
        began = time.time()
        with _ordering(deployment, size.jobs) as process:
            run = Run(report, deployment, api, _ids(process))
        report.figure("all ordered after (s)", time.time() - began)
        run.wait_settled(_patience(size.jobs))
        time.sleep(2)  # so that unnecessary requests are recorded
        seen = api.report()
        _check_rows(run)
        _check_completed(run, seen, range(size.jobs))
        charged = dict(seen.charged())
        report.check(f"charged exactly {size.jobs} times, once each", charged == dict.fromkeys(range(size.jobs), 1),
                     _not_once(charged, size.jobs))  # fmt: skip
        report.check(f"never more than {seen.slots} queued", seen.most_queued <= seen.slots, seen.most_queued)
        refused = seen.count("refused")
        report.check(f"at most {MAX_REFUSALS} refusals", refused <= MAX_REFUSALS, refused)
        use = seen.slot_use()
        if size.jobs >= MEASURED_JOBS:
            report.check(f"slots used at least {MIN_SLOT_USE:.0%} of the time", use >= MIN_SLOT_USE, f"{use:.1%}")
        report.none_of("every request was a valid order or fetch", seen.strays)
        check_no_stray_files(report, deployment)
        _figures(report, seen, began)
        report.figure("processor time (s)", deployment.cpu_seconds())
    return report


def orders_faults(installation: Installation, home: Path, size: Size, kills: int) -> Report:
    """Order with kills, cut connections and swallowed answers: charged at most once each, and none is lost.

    Afterwards each uncertain order is put right, half of those that were charged by `attach`, the others by `retry`.
    """
    report = Report("orders-faults")
    with (
        OrdersApi(KEY, seed=size.seed) as api,
        Deployment(installation, home, f"{api.base}/api/v3", KEY, **FAULTY_SETTINGS) as deployment,
    ):
        start_working(report, deployment)
        api.behave(**FAULTS)
        began = time.time()
        with _ordering(deployment, size.jobs, LARGE_EVERY) as process:
            killed_at = _kill_workers(deployment, api, size.jobs, kills)
            run = Run(report, deployment, api, _ids(process))
        run.wait_settled(_patience(size.jobs) + kills * 4 * LEASE_SECONDS)
        time.sleep(ORDER_TIMEOUT + 1)  # so that a late answer is recorded
        seen = api.report()
        _check_rows(run)
        twice = {number: count for number, count in seen.charged().items() if count > 1}
        report.none_of("charged at most once each", twice)
        report.none_of("every request was a valid order or fetch", seen.strays)
        rows = run.rows()
        uncertain = [number for number, row in rows.items() if row["status"] == "uncertain"]
        _check_completed(run, seen, sorted(set(range(size.jobs)) - set(uncertain)))
        _check_causes(run, seen, uncertain, killed_at)
        _figures(report, seen, began)
        report.figure("uncertain orders", len(uncertain))
        _put_right(run, seen, uncertain)
        check_no_stray_files(report, deployment)
    return report


@contextmanager
def _ordering(deployment: Deployment, count: int, large_every: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Run an app process that orders in bursts. It is stopped if it does not end within the block."""
    arguments = [str(count), str(BURST), str(PAUSE), str(large_every)]
    process = subprocess.Popen(
        [str(deployment.installation.bin / "python"), "-c", ORDER_IN_BURSTS, *arguments],
        cwd=deployment.checkout,
        env=deployment.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _ids(process: subprocess.Popen[str]) -> list[int]:
    stdout, stderr = process.communicate(timeout=120)
    if process.returncode:
        raise RuntimeError(f"the app could not order: {stderr[-800:]}")
    ids: list[int] = json.loads(stdout)
    return ids


def _kill_workers(deployment: Deployment, api: OrdersApi, count: int, kills: int) -> list[float]:
    """Kill all workers each time when the next share of the orders is charged. Return the moments."""
    moments = []
    for number in range(kills):
        _wait_charged(api, count * (number + 1) / (kills + 1.5), _patience(count) + 60)
        deployment.kill(*WORKING)
        moments.append(time.time())
        deployment.start(*WORKING)
        print(f"killed after {len(api.report().charges)} charges", file=sys.stderr, flush=True)
    return moments


def _wait_charged(api: OrdersApi, minimum: float, seconds: float) -> bool:
    return wait_until(lambda: len(api.report().charges) >= minimum, seconds, 0.5)


def _check_rows(run: Run) -> None:
    report, rows = run.report, run.rows()
    report.check("order returns a job of its own each time", len(set(run.ids)) == len(run.ids), len(run.ids))
    report.none_of("no order is lost", sorted(set(range(len(run.ids))) - set(rows)))
    jobs = run.deployment.count("SELECT count(*) FROM fetch_jobs")
    report.check("there is no other job", jobs == len(run.ids), jobs)
    report.none_of("no process exited by itself", run.deployment.died())
    check_no_foreign_connections(report, run.deployment)


def _check_completed(run: Run, seen: OrdersReport, numbers: Sequence[int], what: str = "orders") -> None:
    """Check that these orders are completed, each with the picture of the job that the API charged last for it."""
    rows, outputs = run.rows(), _outputs(run.deployment)
    charges = {charge.number: charge for charge in seen.charges}
    statuses: list[tuple[int, str]] = []
    faults: list[tuple[object, ...]] = []
    for number in numbers:
        row = rows.get(number)
        if row is None or row["status"] != "completed":
            statuses.append((number, "no row" if row is None else _state(row)))
            continue
        charge = charges.get(number)
        if charge is None or row["remote_id"] != charge.remote_id:
            faults.append((number, row["remote_id"], charge))
        else:
            faults += [(number, fault) for fault in _file_faults(charge, outputs.get(row["id"], []))]
    run.report.none_of(f"all {len(numbers)} {what} are completed", statuses, statuses[:5])
    run.report.none_of(f"each of the {what} has its own picture", faults, faults[:5])


def _outputs(deployment: Deployment) -> dict[int, list[dict[str, Any]]]:
    outputs: dict[int, list[dict[str, Any]]] = {}
    for row in deployment.rows("SELECT * FROM fetch_outputs ORDER BY position"):
        outputs.setdefault(row["job_id"], []).append(row)
    return outputs


def _file_faults(charge: Arrival, outputs: Sequence[Mapping[str, Any]]) -> list[str]:
    if [row["status"] for row in outputs] != ["stored"]:
        return [str([(row["status"], row["error_code"]) for row in outputs])]
    path = file_of(outputs[0]["location"])
    same = path.is_file() and path.read_bytes() == picture(charge.remote_id)
    return [] if same else [f"{path} differs from its source"]


def _check_causes(run: Run, seen: OrdersReport, uncertain: Sequence[int], killed_at: Sequence[float]) -> None:
    """Check that exactly those orders are uncertain whose answer was lost or whose sender died."""
    lost = {charge.number for charge in seen.charges if charge.answer in LOST_ON_PURPOSE}
    run.report.none_of("every order whose answer was lost is uncertain", sorted(lost - set(uncertain)))
    attempts = {
        row["job_id"]: epoch(row["attempted_at"])
        for row in run.deployment.rows("SELECT job_id, attempted_at FROM fetch_orders")
        if row["attempted_at"]
    }
    causeless, by_kill = [], 0
    for number in sorted(set(uncertain) - lost):
        arrivals = seen.arrivals_of(number)
        if _died(attempts.get(run.ids[number]), arrivals, killed_at):
            by_kill += 1
        else:
            causeless.append((number, attempts.get(run.ids[number]), arrivals[-1:]))
    run.report.none_of("no order is uncertain without a cause", causeless, causeless[:5])
    run.report.figure("uncertain: answer lost / sender died", f"{len(lost & set(uncertain))} / {by_kill}")


def _died(attempted_at: float | None, arrivals: Sequence[Arrival], killed_at: Sequence[float]) -> bool:
    """Return whether a kill came between an attempt to send an order and the record of its answer."""
    last = arrivals[-1:]
    moments = [moment for arrival in last for moment in (arrival.began, arrival.ended) if moment]
    moments += [attempted_at] if attempted_at else []
    if not moments:
        return False
    return any(min(moments) - DOUBT_SECONDS <= moment <= max(moments) + DOUBT_SECONDS for moment in killed_at)


def _put_right(run: Run, before: OrdersReport, uncertain: Sequence[int]) -> None:
    """Put each uncertain order right, and check that only those sent again are charged again."""
    run.api.behave(**NO_FAULTS)
    charges = {charge.number: charge for charge in before.charges}
    attached = [number for number in uncertain if number in charges][::2]
    again = sorted(set(uncertain) - set(attached))
    failed = []
    for number in attached:
        failed += _command_faults(run, "attach", str(run.ids[number]), charges[number].remote_id)
    for number in again:
        failed += _command_faults(run, "retry", str(run.ids[number]))
    run.report.none_of("every attach and retry works", failed, failed[:3])
    wait_until(lambda: all(row["status"] in FINAL for row in run.rows().values()), _patience(len(uncertain)) + 60, 0.5)
    after = run.api.report()
    _check_completed(run, after, attached, "attached orders")
    _check_completed(run, after, again, "orders sent again")
    expected = before.charged() + Counter(again)
    wrong = {number: count for number, count in after.charged().items() if count != expected[number]}
    run.report.none_of("attach charges nothing, and retry charges once", wrong)
    run.report.figure("attached / sent again", f"{len(attached)} / {len(again)}")


def _command_faults(run: Run, *arguments: str) -> list[str]:
    result = run.deployment.command("fetch-worker", *arguments)
    return [f"{' '.join(arguments)}: {result.stderr[-300:]}"] if result.returncode else []


def _patience(count: int) -> float:
    """Return the seconds to wait for `count` orders: twice the time that the plan needs, and a minute."""
    return 60 + 2 * count * MEAN_SECONDS / SLOTS


def _state(row: Mapping[str, Any]) -> str:
    return f"{row['status']} {row['error_code'] or ''} {row['error_message'] or ''}"


def _not_once(charged: Mapping[int, int], count: int) -> dict[int, int]:
    counts = {number: charged.get(number, 0) for number in range(count)}
    return {number: times for number, times in counts.items() if times != 1}


def _figures(report: Report, seen: OrdersReport, began: float) -> None:
    charges, answers = seen.charges, seen.answers()
    if charges:
        report.figure("first / last charge after (s)", f"{charges[0].charged_at - began:.2f} / "
                      f"{charges[-1].charged_at - began:.1f}")  # fmt: skip
    report.figure("charged / refused / most queued", f"{len(charges)} / {seen.count('refused')} / {seen.most_queued}")
    report.figure("slots used", f"{seen.slot_use():.1%}")
    report.figure("fetches", seen.fetches)
    report.figure(
        "cut before / during / after, swallowed, client gone",
        f"{seen.cut_before} / {seen.count('cut_during')} / {answers['cut_after']}, {answers['swallowed']}, "
        f"{answers['client_gone']}",
    )
