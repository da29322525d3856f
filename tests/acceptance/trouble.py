"""A key that is refused and later taken, and outputs that must not be stored."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from tests.acceptance.api import Job, Output
from tests.acceptance.hosted import Hosted
from tests.acceptance.jobs import (
    FINAL,
    Size,
    check_completed,
    check_files,
    check_no_stray_files,
    check_nothing_left_the_machine,
    make_batch,
    outputs_of,
    rows_of,
    track_by_name,
    wait_final,
)
from tests.acceptance.main_job import KEY, start_working
from tests.acceptance.report import Report
from tests.acceptance.stand import WORKING, Place, Stand, epoch, wait_until

PROBE_GAPS = (10, 20, 40, 60)  # seconds between the calls with a key that is refused, the last one from then on
EARLY, LATE = 1.0, 5.0  # how far a probe may be off its time
PATIENCE_SECONDS = 60  # how long a link that answers 404 is asked again before it is renewed


def wrong_key(place: Place, home: Path, size: Size) -> Report:
    """A refused key costs single calls on schedule and no job; work goes on when a key is taken."""
    report = Report("wrong-key")
    with (
        Hosted(seed=size.seed, accept=[KEY]) as hosted,
        Stand(place, home, hosted.base, "wrong-key-6a1e") as stand,
    ):
        start_working(report, stand)
        hosted.behave(latency_seconds=0.4)  # two calls at once would overlap
        jobs = make_batch(size, first_id=15_000_000)
        hosted.register(jobs)
        track_by_name(stand, jobs)
        probes = len(PROBE_GAPS)
        wait_until(lambda: len(hosted.ledger().calls) >= probes, sum(PROBE_GAPS[:-1]) + 20, 0.5)
        _check_hold(report, stand, hosted, len(jobs))

        hosted.behave(accept=["wrong-key-6a1e"])
        accepted = time.time()
        wait_final(stand, jobs, PROBE_GAPS[-1] + LATE + size.slowest + 30)
        calls = hosted.ledger().calls
        refused = [call for call in calls if call.answer == "wrong_key"]
        first_taken = next((call.began for call in calls if call.answer != "wrong_key"), float("inf"))
        moments = [call.began for call in refused] + [first_taken]
        gaps = [later - earlier for earlier, later in pairwise(moments)]
        on_time = [due - EARLY <= gap <= due + LATE for gap, due in zip(gaps, PROBE_GAPS, strict=False)]
        report.figure("seconds between probes", ", ".join(f"{gap:.1f}" for gap in gaps))
        report.figure("key taken to next call (s)", first_taken - accepted)
        report.check("probes came after 10, 20, 40 and 60 s", len(gaps) == probes and all(on_time), gaps)
        in_flight = hosted.ledger().most_in_flight(0, first_taken + 0.3)
        report.check("never more than one call in flight until the key was taken", in_flight == 1, in_flight)
        check_completed(report, stand, jobs)
        asked, rows = hosted.ledger().calls_per_job(), rows_of(stand, jobs)
        told = {remote: row["polls"] for remote, row in rows.items()}
        report.check("polls counts the refused calls too", told == dict(asked), f"{told} told, {asked} asked")
        _check_new_key(report, stand, hosted, size)
        check_nothing_left_the_machine(report, stand)
    return report


def _check_hold(report: Report, stand: Stand, hosted: Hosted, count: int) -> None:
    told = stand.document("status")
    (account,) = [entry for entry in told["accounts"] if entry["account"] == "default"]
    hold = account["hold"] or {}
    report.figure("what status says", f"{hold.get('reason')!r} since {hold.get('since')} until {hold.get('until')}")
    report.check("status says why", "key" in str(hold.get("reason")).lower(), account)
    report.check("status says since when and until when", bool(hold.get("since")) and bool(hold.get("until")), hold)
    report.check("all jobs are pending", told["jobs"].get("pending") == count, told["jobs"])
    keys = {call.key for call in hosted.ledger().calls}
    report.check("the API saw only the key that is set", keys == {"wrong-key-6a1e"}, keys)


def _check_new_key(report: Report, stand: Stand, hosted: Hosted, size: Size) -> None:
    """The key is withdrawn; another one, set before a restart, is tried at once."""
    hosted.behave(accept=["new-key-93d2"])
    jobs = make_batch(size, first_id=16_000_000)
    hosted.register(jobs)
    track_by_name(stand, jobs)
    ids = {job.remote_id for job in jobs}
    refused = wait_until(lambda: any(call.remote_id in ids for call in hosted.ledger().calls), 30)
    report.check("the withdrawn key was tried and refused", refused)
    time.sleep(1)
    stubborn = stand.stop(*WORKING)
    stand.set(SD_API_KEY="new-key-93d2")
    restarted = time.time()
    stand.start(*WORKING)
    wait_final(stand, jobs, size.slowest + 60)
    check_completed(report, stand, jobs)
    report.none_of("the working processes end within 30 s of SIGTERM", stubborn)
    taken = [call.began for call in hosted.ledger().calls if call.key == "new-key-93d2"]
    delay = min(taken, default=float("inf")) - restarted
    report.figure("restart to first call with the new key (s)", delay)
    report.check("the new key was tried within 15 s of the restart", delay <= 15, delay)


class Forbidden:
    """A listener that nobody may reach; it counts who did."""

    def __init__(self, address: str) -> None:
        self._listener = socket.create_server((address, 0))
        self.port = int(self._listener.getsockname()[1])
        self.visitors: list[str] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator["Forbidden"]:
        """Listen in a thread while the block runs."""
        thread = threading.Thread(target=self._count, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            thread.join(5)

    def _count(self) -> None:
        while True:
            try:
                connection, visitor = self._listener.accept()
            except OSError:  # closed: the block was left
                return
            connection.close()
            self.visitors.append(str(visitor))


def bad_outputs(place: Place, home: Path, size: Size) -> Report:
    """HTML, a cut body, a dead link and forbidden addresses end with their codes and leave no file."""
    report = Report("bad-outputs")
    with (
        Hosted(seed=size.seed, accept=[KEY]) as hosted,
        Forbidden("127.0.0.2").listening() as forbidden,
        Stand(place, home, hosted.base, KEY, OUTPUT_ALLOWED_NETWORKS="127.0.0.1/32") as stand,
    ):
        start_working(report, stand)
        cases = _cases(forbidden.port)
        started = time.time()
        jobs = {
            name: Job(str(17_000_000 + number), started, 1.0, (output,))
            for number, (name, (output, _)) in enumerate(cases.items())
        }
        mixed = Job("17000100", started, 1.0, (Output(), Output("html"), Output()))
        late = Job("17000101", started, 1.0, (Output("late", seconds=15),))
        everything = [*jobs.values(), mixed, late]
        hosted.register(everything)
        track_by_name(stand, everything)
        wait_final(stand, everything, PATIENCE_SECONDS + 180)

        rows, ledger = rows_of(stand, everything), hosted.ledger()
        for name, (_, code) in cases.items():
            job = jobs[name]
            (found,) = outputs_of(stand, job.remote_id) or [{"status": "no row", "error_code": None, "attempts": 0}]
            seen = (found["status"], found["error_code"], rows[job.remote_id]["status"])
            report.check(f"{name} ends as {code}", seen[:2] == ("failed", code), seen)
            ending = (rows[job.remote_id]["status"], rows[job.remote_id]["error_code"])
            report.check(f"{name}: the job ends failed, output_failed", ending == ("failed", "output_failed"), ending)
            gets = len([get for get in ledger.gets if get.remote_id == job.remote_id])
            report.figure(name, f"{found['error_code']}, {found['attempts']} attempts, {gets} GETs")
            if code in ("not_media", "truncated"):
                # a cut transfer is asked for once more within an attempt: at the same place again, it is cut there
                requests = found["attempts"] * (2 if code == "truncated" else 1)
                counted = (found["attempts"], gets)
                report.check(
                    f"{name} was tried for a minute, then three times", counted[0] > 3 and gets == requests, counted
                )
        _check_renewal(report, stand, hosted, jobs["404 for ever"], [jobs["html"], jobs["cut body"], mixed])
        states = [row["status"] for row in outputs_of(stand, mixed.remote_id)]
        report.check("beside a bad output the good ones stay stored", states == ["stored", "failed", "stored"], states)
        ending = (rows[mixed.remote_id]["status"], rows[mixed.remote_id]["error_code"])
        report.check("and the job ends failed, output_failed", ending == ("failed", "output_failed"), ending)
        check_files(report, stand, hosted, [late])
        report.check("a link that is late is waited for", rows[late.remote_id]["status"] == "completed")
        check_no_stray_files(report, stand)
        kept = sorted(path for path in stand.outputs.rglob("*") if path.is_file())
        report.check("three files are all that is stored", len(kept) == 3, kept)
        report.none_of("nobody reached the address that is not allowed", forbidden.visitors)
        check_nothing_left_the_machine(report, stand)
        report.none_of("all jobs are final", [row for row in rows.values() if row["status"] not in FINAL])
    return report


def _cases(forbidden_port: int) -> dict[str, tuple[Output, str]]:
    """An output for each kind of trouble and the code it ends with."""
    unallowed = f"http://127.0.0.2:{forbidden_port}/x.png"
    addresses = {
        "metadata address": "http://169.254.169.254/x.png",
        "private address": "http://10.0.0.1/x.png",
        "private address by https": "https://10.0.0.1/x.png",
        "loopback that is not allowed": unallowed,
        "loopback by https": f"https://127.0.0.2:{forbidden_port}/x.png",
        "loopback as one number": f"http://2130706434:{forbidden_port}/x.png",
        "loopback inside IPv6": f"http://[::ffff:127.0.0.2]:{forbidden_port}/x.png",
        "address of everything": "http://0.0.0.0/x.png",
        "public address without https": "http://1.1.1.1/x.png",
        "file scheme": "file:///etc/hostname",
        "ftp scheme": "ftp://127.0.0.1/x.png",
    }
    return {
        "html": (Output("html"), "not_media"),
        "cut body": (Output("truncated"), "truncated"),
        "404 for ever": (Output("missing"), "gone"),
        **{name: (Output("elsewhere", address), "refused_address") for name, address in addresses.items()},
        "redirect to loopback": (Output("redirect", unallowed), "refused_address"),
        "redirect to metadata": (Output("redirect", "http://169.254.169.254/x.png"), "refused_address"),
    }


def _check_renewal(report: Report, stand: Stand, hosted: Hosted, job: Job, lagging: Sequence[Job]) -> None:
    """A dead link, a page and a cut file are given a minute, then renewed by one fetch, and only then given up."""
    ledger = hosted.ledger()
    renewals = ledger.calls_after_success()[job.remote_id]
    report.check("the dead link was renewed by one fetch", renewals == 1, renewals)
    renewed = {one.remote_id: ledger.calls_after_success()[one.remote_id] for one in lagging}
    report.check("what may have come too early was renewed by one fetch", set(renewed.values()) == {1}, renewed)
    others = {job.remote_id, *renewed}
    elsewhere = {remote: count for remote, count in ledger.calls_after_success().items() if remote not in others}
    report.none_of("no other job was asked about after its success", elsewhere)
    row = rows_of(stand, [job])[job.remote_id]
    report.check("polls counts the renewal", row["polls"] == ledger.calls_per_job()[job.remote_id], row["polls"])
    if row["completed_at"] and row["ready_at"]:
        waited = epoch(row["completed_at"]) - epoch(row["ready_at"])
        report.figure("dead link given up after (s)", waited)
        report.check("the dead link was given up after a minute of patience", waited > PATIENCE_SECONDS, waited)
