"""One job of every family, ordered and tracked in each of three ways, and a mistyped SD_API_URL."""

import http.client
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.acceptance.deployment import WORKING, Deployment, Installation, epoch, file_of, wait_until
from tests.acceptance.families_api import ENDINGS, FAMILIES, ApiFamily, FamilyCall, ReceivedOrder, content
from tests.acceptance.jobs import FINAL, check_no_foreign_connections
from tests.acceptance.main_job import KEY, start_working
from tests.acceptance.report import Report

READY_WITHIN = 60.0  # seconds from the last order until all jobs are stored
UNKNOWN_WITHIN = 150.0  # until a job that is fetched at a wrong URL ends, or continues after a correction
HELD_WITHIN = 40.0  # until the hold for a mistyped SD_API_URL exists
MISTYPED = ("/api/v33", "/api/v3/text2img")
BY_RESPONSE = """
import json, sys
import requests
from worker import track
base, key, *paths = sys.argv[1:]
responses = [requests.post(f"{base}/api/{path}", json={"key": key, "prompt": "a lighthouse"}) for path in paths]
print(json.dumps([int(track(response)) for response in responses]))
"""


class FamiliesApi:
    """The fake API with all families in a separate process. Leaving the block stops it."""

    def __enter__(self) -> Self:
        program = [sys.executable, "-I", str(Path(__file__).with_name("families_api.py")), "--key", KEY]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(json.loads(self._process.stdout.readline())["port"])
        self.base = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._process.communicate(timeout=10)

    def order(self, family: ApiFamily) -> dict[str, Any]:
        """Order a job of a family. Return the answer."""
        body = json.dumps({"key": KEY, "prompt": "a lighthouse"})
        answer: dict[str, Any] = self._ask("POST", f"/api/{family.order}", body)
        return answer

    def ledger(self) -> dict[str, Any]:
        """Return all requests so far."""
        ledger: dict[str, Any] = self._ask("GET", "/control/ledger")
        return ledger

    def orders(self) -> list[ReceivedOrder]:
        """Return the orders in the order of their arrival."""
        return [ReceivedOrder(**order) for order in self.ledger()["orders"]]

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request(method, path, body, headers)
            return json.loads(connection.getresponse().read())


def families(installation: Installation, home: Path) -> Report:
    """Jobs of each family are stored, in each way of tracking. A mistyped path ends no job."""
    report = Report("families")
    with FamiliesApi() as api, Deployment(installation, home, f"{api.base}/api/v3", KEY) as deployment:
        start_working(report, deployment)
        began = time.time()
        jobs = {
            "the answer": _track_answers(deployment, api),
            "the response": _track_responses(deployment, api),
            "the bare id and its endpoint": _track_ids(deployment, api),
        }
        orders = api.orders()
        all_jobs = [job for ids in jobs.values() for job in ids]
        report.figure("families / jobs", f"{len(FAMILIES)} / {len(all_jobs)}")
        report.check("each order is a separate job, although ids repeat", len(set(all_jobs)) == len(orders))
        ids = Counter(order.remote_id for order in orders)
        report.check("ids repeat between families", max(ids.values()) > 3, ids.most_common(3))
        answered = zip(jobs["the answer"], orders[: len(FAMILIES)], strict=True)
        ambiguous = {job: order for job, order in answered if not FAMILIES[order.family].alone}
        _wait_final(deployment, set(all_jobs) - set(ambiguous), READY_WITHIN)
        report.figure("all stored after (s)", time.time() - began)
        for number, (way, ids_of_way) in enumerate(jobs.items()):
            part = slice(number * len(FAMILIES), (number + 1) * len(FAMILIES))
            _check_way(report, deployment, api, way, ids_of_way, orders[part], part.start)
        ledger = api.ledger()
        report.none_of("every call has a documented form", ledger["strays"])
        report.none_of("no key was sent with a request for a file", ledger["keys_at_files"])
        _check_ambiguous(report, deployment, api, ambiguous)
        for path in MISTYPED:
            _check_mistyped(report, deployment, api, path)
        check_no_foreign_connections(report, deployment)
        report.none_of("no process exited by itself", deployment.died())
    return report


def _track_answers(deployment: Deployment, api: FamiliesApi) -> list[int]:
    results = [_track(deployment, api.order(family)) for family in FAMILIES]
    return [result.get(timeout=60) for result in results]


def _track_responses(deployment: Deployment, api: FamiliesApi) -> list[int]:
    command = ["python", "-c", BY_RESPONSE, api.base, KEY, *(family.order for family in FAMILIES)]
    result = deployment.command(*command)
    if result.returncode:
        raise RuntimeError(f"tracking by the response failed: {result.stderr[-800:]}")
    ids: list[int] = json.loads(result.stdout)
    return ids


def _track_ids(deployment: Deployment, api: FamiliesApi) -> list[int]:
    for family in FAMILIES:
        api.order(family)
    results = []
    for number, order in enumerate(api.orders()[-len(FAMILIES) :]):
        path = FAMILIES[order.family].order
        endpoint = path if number % 2 else f"{api.base}/api/{path}"
        results.append(_track(deployment, order.remote_id, endpoint=endpoint))
    return [result.get(timeout=60) for result in results]


def _track(deployment: Deployment, remote: object, **options: object) -> Any:
    return deployment.client.send_task("worker.track", [remote], options, queue="fetch-worker", ignore_result=False)


def _rows(deployment: Deployment) -> dict[int, dict[str, Any]]:
    return {row["id"]: row for row in deployment.rows("SELECT * FROM fetch_jobs")}


def _wait_final(deployment: Deployment, ids: set[int], seconds: float) -> bool:
    return wait_until(lambda: all(_rows(deployment)[job]["status"] in FINAL for job in ids), seconds, 0.5)


def _check_way(
    report: Report,
    deployment: Deployment,
    api: FamiliesApi,
    way: str,
    ids: Sequence[int],
    orders: Sequence[ReceivedOrder],
    first: int,
) -> None:
    rows = _rows(deployment)
    outputs: dict[int, list[dict[str, Any]]] = {job: [] for job in ids}
    for row in deployment.rows("SELECT * FROM fetch_outputs ORDER BY position"):
        outputs.get(row["job_id"], []).append(row)
    calls = [FamilyCall(**call) for call in api.ledger()["calls"]]
    statuses, files, requests, kinds = [], [], [], []
    for number, (job, order) in enumerate(zip(ids, orders, strict=True)):
        family = FAMILIES[order.family]
        if way == "the answer" and not family.alone:
            continue
        row, name = rows[job], f"{family.order} {order.remote_id}"
        if row["status"] != "completed":
            statuses.append(f"{name}: {row['status']} {row['error_code']} {row['error_message']}")
        files += _file_faults(name, family, order, outputs[job])
        own = {(call.method, call.path, json.dumps(call.body)) for call in calls if call.order == first + number}
        expected = _expected_call(family, order, by_endpoint=way.startswith("the bare"))
        if own != {expected}:
            requests.append(f"{name}: {own} instead of {expected}")
        kinds += _kind_faults(name, family, row, way)
    report.none_of(f"by {way}: every job is completed", statuses)
    report.none_of(f"by {way}: every file belongs to its job, is complete and has the right type", files)
    report.none_of(f"by {way}: every job is fetched with the right method, URL and body", requests)
    report.none_of(f"by {way}: videos and trainings have their kind and deadline", kinds)


def _file_faults(name: str, family: ApiFamily, order: ReceivedOrder, outputs: Sequence[dict[str, Any]]) -> list[str]:
    if not family.media_type:
        return [f"{name}: {len(outputs)} outputs of a training"] if outputs else []
    if [row["status"] for row in outputs] != ["stored"]:
        return [f"{name}: {[(row['status'], row['error_code'], row['error_message']) for row in outputs]}"]
    path = file_of(outputs[0]["location"])
    source = content(family.media_type, f"{family.order} {order.remote_id}")
    recorded = (outputs[0]["media_type"], path.suffix, outputs[0]["size_bytes"])
    expected = (family.media_type, f".{ENDINGS[family.media_type]}", len(source))
    if recorded != expected:
        return [f"{name}: {recorded}, expected {expected}"]
    return [] if path.read_bytes() == source else [f"{name}: the file has other bytes"]


def _expected_call(family: ApiFamily, order: ReceivedOrder, *, by_endpoint: bool) -> tuple[str, str, str]:
    path = family.fetch if by_endpoint or not family.named else family.named
    body = {} if "{id}" in path else {family.id_field: order.remote_id}
    return family.method, path.replace("{id}", order.remote_id), json.dumps(body)


def _kind_faults(name: str, family: ApiFamily, row: dict[str, Any], way: str) -> list[str]:
    seconds = round(epoch(row["deadline_at"]) - epoch(row["submitted_at"]))
    if family.answer == "training":
        right = row["kind"] == "training" and seconds == 14_400
    elif family.video and (way != "the answer" or "video" in family.fetch):
        right = "video" in row["kind"] and seconds == 7_200
    else:
        right = row["kind"] != "training" and seconds in (3_600, 7_200)
    return [] if right else [f"{name}: kind {row['kind']}, {seconds} s"]


def _check_ambiguous(
    report: Report, deployment: Deployment, api: FamiliesApi, ambiguous: dict[int, ReceivedOrder]
) -> None:
    """Check jobs whose answer names neither a URL nor a family: they are fetched at the default URL.

    They end as not_found with a hint, or their file is stored from the links that the answer promised.
    """
    _wait_final(deployment, set(ambiguous), UNKNOWN_WITHIN)
    rows = _rows(deployment)
    wrong: dict[int, object] = {}
    for job, order in sorted(ambiguous.items()):
        if rows[job]["status"] == "completed":
            outputs = deployment.rows("SELECT * FROM fetch_outputs WHERE job_id = :job", job=job)
            faults = _file_faults(f"job {job}", FAMILIES[order.family], order, outputs)
            if faults:
                wrong[job] = faults
            continue
        why = deployment.document("show", str(job))["why"]
        if rows[job]["error_code"] != "not_found" or "endpoint" not in why:
            wrong[job] = why
    report.none_of("a job without URL and family ends as not_found, with a hint about the endpoint", wrong)
    default = [call["path"] for call in api.ledger()["calls"] if call["order"] == -1]
    report.none_of(
        "it was fetched only at the default URL", [path for path in default if not path.startswith("v3/fetch/")]
    )


def _check_mistyped(report: Report, deployment: Deployment, api: FamiliesApi, path: str) -> None:
    """Check a mistyped path in SD_API_URL: no job ends, and one hold names the setting."""
    deployment.stop(*WORKING)
    deployment.set(SD_API_URL=f"{api.base}{path}")
    deployment.start(*WORKING)
    strays = len(api.ledger()["strays"])
    for _ in range(4):
        api.order(FAMILIES[0])
    jobs = {_track(deployment, order.remote_id).get(timeout=60) for order in api.orders()[-4:]}
    wait_until(lambda: len(api.ledger()["strays"]) > strays, 30)
    wait_until(lambda: bool(_holds(deployment)), HELD_WITHIN, 1)
    rows, holds = _rows(deployment), _holds(deployment)
    report.none_of(f"{path}: no job ends", [rows[job] for job in jobs if rows[job]["status"] != "pending"])
    report.check(f"{path}: one hold, which names the setting", len(holds) == 1 and "SD_API_URL" in holds[0], holds)
    deployment.stop(*WORKING)
    deployment.set(SD_API_URL=f"{api.base}/api/v3")
    deployment.start(*WORKING)
    _wait_final(deployment, jobs, UNKNOWN_WITHIN)
    statuses = {job: (row["status"], row["error_message"]) for job, row in _rows(deployment).items() if job in jobs}
    report.none_of(
        f"{path}: all jobs are completed after the correction",
        {job: status for job, status in statuses.items() if status[0] != "completed"},
    )


def _holds(deployment: Deployment) -> list[str]:
    """Return the reasons of all holds in `status --json`."""
    return [account["hold"]["reason"] for account in deployment.document("status")["accounts"] if account["hold"]]
