"""An API key that is refused and later accepted, and outputs that must not be stored."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from tests.acceptance.api import ApiJob, ApiOutput
from tests.acceptance.api_process import ApiProcess
from tests.acceptance.deployment import WORKING, Deployment, Installation, epoch, wait_until
from tests.acceptance.jobs import (
    FINAL,
    Size,
    check_completed,
    check_files,
    check_no_foreign_connections,
    check_no_stray_files,
    make_batch,
    outputs_of,
    rows_of,
    track_by_name,
    wait_final,
)
from tests.acceptance.main_job import KEY, start_working
from tests.acceptance.report import Report

PROBE_GAPS = (10, 20, 40, 60)  # seconds between the probes with a refused key; the last one repeats
EARLY, LATE = 1.0, 5.0  # seconds by which a probe may be early or late
PATIENCE_SECONDS = 60  # how long a link that answers 404 is retried before it is renewed


def wrong_key(installation: Installation, home: Path, size: Size) -> Report:
    """A refused key causes only scheduled probes, and no job fails. Work continues when a key is accepted."""
    report = Report("wrong-key")
    with (
        ApiProcess(seed=size.seed, accept=[KEY]) as api,
        Deployment(installation, home, api.base, "wrong-key-6a1e") as deployment,
    ):
        start_working(report, deployment)
        api.behave(latency_seconds=0.4)  # two calls at once would overlap
        jobs = make_batch(size, first_id=15_000_000)
        api.register(jobs)
        track_by_name(deployment, jobs)
        probes = len(PROBE_GAPS)
        wait_until(lambda: len(api.ledger().calls) >= probes, sum(PROBE_GAPS[:-1]) + 20, 0.5)
        _check_hold(report, deployment, api, len(jobs))

        api.behave(accept=["wrong-key-6a1e"])
        accepted = time.time()
        wait_final(deployment, jobs, PROBE_GAPS[-1] + LATE + size.slowest + 30)
        calls = api.ledger().calls
        refused = [call for call in calls if call.answer == "wrong_key"]
        first_accepted = next((call.began for call in calls if call.answer != "wrong_key"), float("inf"))
        times = [call.began for call in refused] + [first_accepted]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        on_time = [due - EARLY <= gap <= due + LATE for gap, due in zip(gaps, PROBE_GAPS, strict=False)]
        report.figure("seconds between probes", ", ".join(f"{gap:.1f}" for gap in gaps))
        report.figure("key accepted to next call (s)", first_accepted - accepted)
        report.check("probes came after 10, 20, 40 and 60 s", len(gaps) == probes and all(on_time), gaps)
        in_flight = api.ledger().most_in_flight(0, first_accepted + 0.3)
        report.check("never more than one call in flight until the key was accepted", in_flight == 1, in_flight)
        check_completed(report, deployment, jobs)
        calls_per_job, rows = api.ledger().calls_per_job(), rows_of(deployment, jobs)
        polls = {remote: row["polls"] for remote, row in rows.items()}
        report.check(
            "polls counts the refused calls too", polls == dict(calls_per_job), f"{polls} polls, {calls_per_job} calls"
        )
        _check_new_key(report, deployment, api, size)
        check_no_foreign_connections(report, deployment)
    return report


def _check_hold(report: Report, deployment: Deployment, api: ApiProcess, count: int) -> None:
    status = deployment.document("status")
    (account,) = [entry for entry in status["accounts"] if entry["account"] == "default"]
    hold = account["hold"] or {}
    report.figure("hold in status", f"{hold.get('reason')!r} since {hold.get('since')} until {hold.get('until')}")
    report.check("status has the reason", "key" in str(hold.get("reason")).lower(), account)
    report.check("status has the start and end of the hold", bool(hold.get("since")) and bool(hold.get("until")), hold)
    report.check("all jobs are pending", status["jobs"].get("pending") == count, status["jobs"])
    keys = {call.key for call in api.ledger().calls}
    report.check("the API received only the configured key", keys == {"wrong-key-6a1e"}, keys)


def _check_new_key(report: Report, deployment: Deployment, api: ApiProcess, size: Size) -> None:
    """The key is revoked. A new key that is set before a restart is tried at once."""
    api.behave(accept=["new-key-93d2"])
    jobs = make_batch(size, first_id=16_000_000)
    api.register(jobs)
    track_by_name(deployment, jobs)
    ids = {job.remote_id for job in jobs}
    refused = wait_until(lambda: any(call.remote_id in ids for call in api.ledger().calls), 30)
    report.check("the revoked key was tried and refused", refused)
    time.sleep(1)
    killed = deployment.stop(*WORKING)
    deployment.set(SD_API_KEY="new-key-93d2")
    restarted = time.time()
    deployment.start(*WORKING)
    wait_final(deployment, jobs, size.slowest + 60)
    check_completed(report, deployment, jobs)
    report.none_of("the workers exit within 30 s of SIGTERM", killed)
    calls = [call.began for call in api.ledger().calls if call.key == "new-key-93d2"]
    delay = min(calls, default=float("inf")) - restarted
    report.figure("restart to first call with the new key (s)", delay)
    report.check("the new key was tried within 15 s of the restart", delay <= 15, delay)


class ForbiddenServer:
    """A listener that the product must not connect to. It records connections."""

    def __init__(self, address: str) -> None:
        self._listener = socket.create_server((address, 0))
        self.port = int(self._listener.getsockname()[1])
        self.connections: list[str] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator["ForbiddenServer"]:
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
                connection, address = self._listener.accept()
            except OSError:  # closed at the end of the block
                return
            connection.close()
            self.connections.append(str(address))


def bad_outputs(installation: Installation, home: Path, size: Size) -> Report:
    """HTML, a truncated body, a dead link and forbidden addresses end with their codes and leave no file."""
    report = Report("bad-outputs")
    with (
        ApiProcess(seed=size.seed, accept=[KEY]) as api,
        ForbiddenServer("127.0.0.2").listening() as forbidden,
        Deployment(installation, home, api.base, KEY, OUTPUT_ALLOWED_NETWORKS="127.0.0.1/32") as deployment,
    ):
        start_working(report, deployment)
        cases = _cases(forbidden.port)
        started = time.time()
        jobs = {
            name: ApiJob(str(17_000_000 + number), started, 1.0, (output,))
            for number, (name, (output, _)) in enumerate(cases.items())
        }
        mixed = ApiJob("17000100", started, 1.0, (ApiOutput(), ApiOutput("html"), ApiOutput()))
        late = ApiJob("17000101", started, 1.0, (ApiOutput("late", seconds=15),))
        all_jobs = [*jobs.values(), mixed, late]
        api.register(all_jobs)
        track_by_name(deployment, all_jobs)
        wait_final(deployment, all_jobs, PATIENCE_SECONDS + 180)

        rows, ledger = rows_of(deployment, all_jobs), api.ledger()
        for name, (_, code) in cases.items():
            job = jobs[name]
            (output,) = outputs_of(deployment, job.remote_id) or [
                {"status": "no row", "error_code": None, "attempts": 0}
            ]
            output_states = (output["status"], output["error_code"], rows[job.remote_id]["status"])
            report.check(f"{name} ends as {code}", output_states[:2] == ("failed", code), output_states)
            ending = (rows[job.remote_id]["status"], rows[job.remote_id]["error_code"])
            report.check(f"{name}: the job ends failed, output_failed", ending == ("failed", "output_failed"), ending)
            gets = len([get for get in ledger.gets if get.remote_id == job.remote_id])
            report.figure(name, f"{output['error_code']}, {output['attempts']} attempts, {gets} GETs")
            if code in ("not_media", "truncated"):
                # a cut transfer is resumed once per attempt, and is cut again at the same position
                requests = output["attempts"] * (2 if code == "truncated" else 1)
                counted = (output["attempts"], gets)
                report.check(
                    f"{name} was tried for a minute, then three times", counted[0] > 3 and gets == requests, counted
                )
        _check_renewal(report, deployment, api, jobs["404 forever"], [jobs["html"], jobs["cut body"], mixed])
        states = [row["status"] for row in outputs_of(deployment, mixed.remote_id)]
        report.check("beside a bad output the good ones stay stored", states == ["stored", "failed", "stored"], states)
        ending = (rows[mixed.remote_id]["status"], rows[mixed.remote_id]["error_code"])
        report.check("and the job ends failed, output_failed", ending == ("failed", "output_failed"), ending)
        check_files(report, deployment, api, [late])
        report.check("a link that works late is retried", rows[late.remote_id]["status"] == "completed")
        check_no_stray_files(report, deployment)
        files = sorted(path for path in deployment.outputs.rglob("*") if path.is_file())
        report.check("exactly three files are stored", len(files) == 3, files)
        report.none_of("no connection to the forbidden address", forbidden.connections)
        check_no_foreign_connections(report, deployment)
        report.none_of("all jobs are final", [row for row in rows.values() if row["status"] not in FINAL])
    return report


def _cases(forbidden_port: int) -> dict[str, tuple[ApiOutput, str]]:
    """Return an output for each kind of fault and the code that it ends with."""
    forbidden_url = f"http://127.0.0.2:{forbidden_port}/x.png"
    addresses = {
        "metadata address": "http://169.254.169.254/x.png",
        "private address": "http://10.0.0.1/x.png",
        "private address by https": "https://10.0.0.1/x.png",
        "loopback that is not allowed": forbidden_url,
        "loopback by https": f"https://127.0.0.2:{forbidden_port}/x.png",
        "loopback as one number": f"http://2130706434:{forbidden_port}/x.png",
        "loopback inside IPv6": f"http://[::ffff:127.0.0.2]:{forbidden_port}/x.png",
        "address of everything": "http://0.0.0.0/x.png",
        "public address without https": "http://1.1.1.1/x.png",
        "file scheme": "file:///etc/hostname",
        "ftp scheme": "ftp://127.0.0.1/x.png",
    }
    return {
        "html": (ApiOutput("html"), "not_media"),
        "cut body": (ApiOutput("truncated"), "truncated"),
        "404 forever": (ApiOutput("missing"), "gone"),
        **{name: (ApiOutput("elsewhere", address), "refused_address") for name, address in addresses.items()},
        "redirect to loopback": (ApiOutput("redirect", forbidden_url), "refused_address"),
        "redirect to metadata": (ApiOutput("redirect", "http://169.254.169.254/x.png"), "refused_address"),
    }


def _check_renewal(
    report: Report, deployment: Deployment, api: ApiProcess, job: ApiJob, lagging: Sequence[ApiJob]
) -> None:
    """Check that bad outputs are retried for a minute, then renewed by one fetch call, and only then given up."""
    ledger = api.ledger()
    renewals = ledger.calls_after_success()[job.remote_id]
    report.check("the dead link was renewed by one fetch", renewals == 1, renewals)
    renewed = {other.remote_id: ledger.calls_after_success()[other.remote_id] for other in lagging}
    report.check("HTML and truncated outputs were renewed by one fetch", set(renewed.values()) == {1}, renewed)
    expected = {job.remote_id, *renewed}
    unexpected = {remote: count for remote, count in ledger.calls_after_success().items() if remote not in expected}
    report.none_of("no other job was fetched after its success", unexpected)
    row = rows_of(deployment, [job])[job.remote_id]
    report.check("polls counts the renewal", row["polls"] == ledger.calls_per_job()[job.remote_id], row["polls"])
    if row["completed_at"] and row["ready_at"]:
        waited = epoch(row["completed_at"]) - epoch(row["ready_at"])
        report.figure("dead link given up after (s)", waited)
        report.check("the dead link was given up after a minute of patience", waited > PATIENCE_SECONDS, waited)
