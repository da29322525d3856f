"""One job of every family, ordered and tracked as the documents say, in each of three ways; and a mistyped address."""

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

from tests.acceptance.families_api import ENDINGS, FAMILIES, Call, Family, Order, content
from tests.acceptance.jobs import FINAL, check_nothing_left_the_machine
from tests.acceptance.main_job import KEY, start_working
from tests.acceptance.report import Report
from tests.acceptance.stand import WORKING, Place, Stand, epoch, file_of, wait_until

READY_WITHIN = 60.0  # seconds from the last order until all jobs are stored
UNKNOWN_WITHIN = 150.0  # until a job that is asked at the wrong place ends, or one that was goes on
HELD_WITHIN = 40.0  # until it shows that SD_API_URL is mistyped
MISTYPED = ("/api/v33", "/api/v3/text2img")
BY_RESPONSE = """
import json, sys
import requests
from worker import track
base, key, *paths = sys.argv[1:]
responses = [requests.post(f"{base}/api/{path}", json={"key": key, "prompt": "a lighthouse"}) for path in paths]
print(json.dumps([int(track(response)) for response in responses]))
"""


class Api:
    """The API of all families in a process of its own; leaving the block ends it."""

    def __enter__(self) -> Self:
        program = [sys.executable, "-I", str(Path(__file__).with_name("families_api.py")), "--key", KEY]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(json.loads(self._process.stdout.readline())["port"])
        self.base = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._process.communicate(timeout=10)

    def order(self, family: Family) -> dict[str, Any]:
        """Post an order as its page says; the answer."""
        body = json.dumps({"key": KEY, "prompt": "a lighthouse"})
        answer: dict[str, Any] = self._ask("POST", f"/api/{family.order}", body)
        return answer

    def ledger(self) -> dict[str, Any]:
        """All that was asked so far."""
        ledger: dict[str, Any] = self._ask("GET", "/control/ledger")
        return ledger

    def orders(self) -> list[Order]:
        """The orders in which they came."""
        return [Order(**order) for order in self.ledger()["orders"]]

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request(method, path, body, headers)
            return json.loads(connection.getresponse().read())


def families(place: Place, home: Path) -> Report:
    """Each family is stored in each way of tracking, asked as its documents say; a mistyped path ends no job."""
    report = Report("families")
    with Api() as api, Stand(place, home, f"{api.base}/api/v3", KEY) as stand:
        start_working(report, stand)
        began = time.time()
        jobs = {
            "the answer": _track_answers(stand, api),
            "the response": _track_responses(stand, api),
            "the bare id and its endpoint": _track_ids(stand, api),
        }
        orders = api.orders()
        everything = [job for ids in jobs.values() for job in ids]
        report.figure("families / jobs", f"{len(FAMILIES)} / {len(everything)}")
        report.check("each order is a job of its own, though ids repeat", len(set(everything)) == len(orders))
        ids = Counter(order.remote_id for order in orders)
        report.check("ids did repeat between families", max(ids.values()) > 3, ids.most_common(3))
        answered = zip(jobs["the answer"], orders[: len(FAMILIES)], strict=True)
        lost = {job: order for job, order in answered if not FAMILIES[order.family].alone}
        _wait_final(stand, set(everything) - set(lost), READY_WITHIN)
        report.figure("all stored after (s)", time.time() - began)
        for number, (way, ids_of_way) in enumerate(jobs.items()):
            part = slice(number * len(FAMILIES), (number + 1) * len(FAMILIES))
            _check_way(report, stand, api, way, ids_of_way, orders[part], part.start)
        ledger = api.ledger()
        report.none_of("no call had another form than the documents show", ledger["strays"])
        report.none_of("no key went with a request for a file", ledger["keys_at_files"])
        _check_lost(report, stand, api, lost)
        for path in MISTYPED:
            _check_mistyped(report, stand, api, path)
        check_nothing_left_the_machine(report, stand)
        report.none_of("no process died by itself", stand.died())
    return report


def _track_answers(stand: Stand, api: Api) -> list[int]:
    promises = [_track(stand, api.order(family)) for family in FAMILIES]
    return [promise.get(timeout=60) for promise in promises]


def _track_responses(stand: Stand, api: Api) -> list[int]:
    words = ["python", "-c", BY_RESPONSE, api.base, KEY, *(family.order for family in FAMILIES)]
    done = stand.command(*words)
    if done.returncode:
        raise RuntimeError(f"tracking by the response failed: {done.stderr[-800:]}")
    ids: list[int] = json.loads(done.stdout)
    return ids


def _track_ids(stand: Stand, api: Api) -> list[int]:
    for family in FAMILIES:
        api.order(family)
    promises = []
    for number, order in enumerate(api.orders()[-len(FAMILIES) :]):
        path = FAMILIES[order.family].order
        endpoint = path if number % 2 else f"{api.base}/api/{path}"
        promises.append(_track(stand, order.remote_id, endpoint=endpoint))
    return [promise.get(timeout=60) for promise in promises]


def _track(stand: Stand, remote: object, **named: object) -> Any:
    return stand.client.send_task("worker.track", [remote], named, queue="fetch-worker", ignore_result=False)


def _rows(stand: Stand) -> dict[int, dict[str, Any]]:
    return {row["id"]: row for row in stand.rows("SELECT * FROM fetch_jobs")}


def _wait_final(stand: Stand, ids: set[int], seconds: float) -> bool:
    return wait_until(lambda: all(_rows(stand)[job]["status"] in FINAL for job in ids), seconds, 0.5)


def _check_way(
    report: Report, stand: Stand, api: Api, way: str, ids: Sequence[int], orders: Sequence[Order], first: int
) -> None:
    rows = _rows(stand)
    outputs: dict[int, list[dict[str, Any]]] = {job: [] for job in ids}
    for row in stand.rows("SELECT * FROM fetch_outputs ORDER BY position"):
        outputs.get(row["job_id"], []).append(row)
    calls = [Call(**call) for call in api.ledger()["calls"]]
    ends, files, asked, kinds = [], [], [], []
    for number, (job, order) in enumerate(zip(ids, orders, strict=True)):
        family = FAMILIES[order.family]
        if way == "the answer" and not family.alone:
            continue
        row, name = rows[job], f"{family.order} {order.remote_id}"
        if row["status"] != "completed":
            ends.append(f"{name}: {row['status']} {row['error_code']} {row['error_message']}")
        files += _file_faults(name, family, order, outputs[job])
        own = {(call.method, call.path, json.dumps(call.body)) for call in calls if call.order == first + number}
        expected = _expected_call(family, order, by_endpoint=way.startswith("the bare"))
        if own != {expected}:
            asked.append(f"{name}: {own} instead of {expected}")
        kinds += _kind_faults(name, family, row, way)
    report.none_of(f"by {way}: every job is completed", ends)
    report.none_of(f"by {way}: every file is the job's own, whole, and of its type", files)
    report.none_of(f"by {way}: every job is asked at its address, with its method and body", asked)
    report.none_of(f"by {way}: videos and trainings are of their kind, with its deadline", kinds)


def _file_faults(name: str, family: Family, order: Order, outputs: Sequence[dict[str, Any]]) -> list[str]:
    if not family.media_type:
        return [f"{name}: {len(outputs)} outputs of a training"] if outputs else []
    if [row["status"] for row in outputs] != ["stored"]:
        return [f"{name}: {[(row['status'], row['error_code'], row['error_message']) for row in outputs]}"]
    path = file_of(outputs[0]["location"])
    source = content(family.media_type, f"{family.order} {order.remote_id}")
    said = (outputs[0]["media_type"], path.suffix, outputs[0]["size_bytes"])
    true = (family.media_type, f".{ENDINGS[family.media_type]}", len(source))
    if said != true:
        return [f"{name}: {said}, true is {true}"]
    return [] if path.read_bytes() == source else [f"{name}: the bytes of another file"]


def _expected_call(family: Family, order: Order, *, by_endpoint: bool) -> tuple[str, str, str]:
    path = family.fetch if by_endpoint or not family.named else family.named
    body = {} if "{id}" in path else {family.id_field: order.remote_id}
    return family.method, path.replace("{id}", order.remote_id), json.dumps(body)


def _kind_faults(name: str, family: Family, row: dict[str, Any], way: str) -> list[str]:
    seconds = round(epoch(row["deadline_at"]) - epoch(row["submitted_at"]))
    if family.answer == "training":
        right = row["kind"] == "training" and seconds == 14_400
    elif family.video and (way != "the answer" or "video" in family.fetch):
        right = "video" in row["kind"] and seconds == 7_200
    else:
        right = row["kind"] != "training" and seconds in (3_600, 7_200)
    return [] if right else [f"{name}: kind {row['kind']}, {seconds} s"]


def _check_lost(report: Report, stand: Stand, api: Api, lost: dict[int, Order]) -> None:
    """Answers that name neither an address nor a family: asked at the default, and their end says what to do.

    The links that a queued task shows before its time may save it: then the file is its own.
    """
    _wait_final(stand, set(lost), UNKNOWN_WITHIN)
    rows = _rows(stand)
    wrong: dict[int, object] = {}
    for job, order in sorted(lost.items()):
        if rows[job]["status"] == "completed":
            outputs = stand.rows("SELECT * FROM fetch_outputs WHERE job_id = :job", job=job)
            faults = _file_faults(f"job {job}", FAMILIES[order.family], order, outputs)
            if faults:
                wrong[job] = faults
            continue
        why = stand.document("show", str(job))["why"]
        if rows[job]["error_code"] != "not_found" or "endpoint" not in why:
            wrong[job] = why
    report.none_of("an answer that names no place ends as not_found, which says that the family may be wrong", wrong)
    default = [call["path"] for call in api.ledger()["calls"] if call["order"] == -1]
    report.none_of("it was asked at the default alone", [path for path in default if not path.startswith("v3/fetch/")])


def _check_mistyped(report: Report, stand: Stand, api: Api, path: str) -> None:
    """Where SD_API_URL has a path that there is not: no job ends, one hold says so, and all goes on later."""
    stand.stop(*WORKING)
    stand.set(SD_API_URL=f"{api.base}{path}")
    stand.start(*WORKING)
    strays = len(api.ledger()["strays"])
    for _ in range(4):
        api.order(FAMILIES[0])
    jobs = {_track(stand, order.remote_id).get(timeout=60) for order in api.orders()[-4:]}
    wait_until(lambda: len(api.ledger()["strays"]) > strays, 30)
    wait_until(lambda: bool(_holds(stand)), HELD_WITHIN, 1)
    rows, holds = _rows(stand), _holds(stand)
    report.none_of(f"{path}: no job ends", [rows[job] for job in jobs if rows[job]["status"] != "pending"])
    report.check(f"{path}: one hold, which names the setting", len(holds) == 1 and "SD_API_URL" in holds[0], holds)
    stand.stop(*WORKING)
    stand.set(SD_API_URL=f"{api.base}/api/v3")
    stand.start(*WORKING)
    _wait_final(stand, jobs, UNKNOWN_WITHIN)
    ends = {job: (row["status"], row["error_message"]) for job, row in _rows(stand).items() if job in jobs}
    report.none_of(
        f"{path}: all jobs are completed once it is corrected",
        {job: end for job, end in ends.items() if end[0] != "completed"},
    )


def _holds(stand: Stand) -> list[str]:
    """Why the account is held, as `status --json` says it."""
    return [account["hold"]["reason"] for account in stand.document("status")["accounts"] if account["hold"]]
