"""Orders whose answers, payloads and options contain the API key, in many spellings. For the program `canary-key`."""

import json
import subprocess
import time
from collections.abc import Iterable, Mapping
from secrets import token_urlsafe
from typing import Any

from tests.acceptance.admin import Browser
from tests.acceptance.api import FAIL_WITH, ORDER_PATH, ApiJob, ApiOrder
from tests.acceptance.api_process import ApiProcess
from tests.acceptance.deployment import Deployment, NotReady, free_port, wait_until
from tests.acceptance.report import Report
from tests.spellings import SPELLINGS

ENDPOINT = ORDER_PATH.removeprefix("/api/")
FIRST_ID = 18_002_000
HINT = "https://shop.example/hooks/modelslab"  # the address that the API would call; the app then sends a hint
STATES = {
    "taken": ("taken_echo", "completed"),
    "ready at once": ("ready_echo", "completed"),
    "with a webhook": ("taken_echo", "completed"),
    "with the key in its options": ("taken_echo", "completed"),
    "refused": ("error_echo", "failed"),
    "cut": ("cut_echo", "uncertain"),
    "gateway": ("gateway_echo", "uncertain"),
}  # the answer and the state of each order, by its name

ORDER_FOR_AN_APP = """
import json, sys
from worker import NotTrackable, order
outcomes = {}
for name, (endpoint, payload, options) in json.load(sys.stdin).items():
    try:
        outcomes[name] = int(order(endpoint, payload, **options))
    except NotTrackable as refused:
        outcomes[name] = str(refused)
print(json.dumps(outcomes))
"""


def provoke_orders(report: Report, deployment: Deployment, api: ApiProcess, key: str) -> bytes:
    """Order with answers that quote the key, and try to order with the key in the payload. Return what apps saw."""
    api.behave(accept=[key], echo_rejected=True)
    spelled = {f"spelled: {name}": spell(key) for name, spell in SPELLINGS.items()} | {"cut short": f"{key[:-4]}…"}
    answers = {name: answer for name, (answer, _) in STATES.items()}
    answers |= {name: f"{FAIL_WITH}refused: {text} (see there)" for name, text in spelled.items()}
    _expect(api, answers)
    hint = {"webhook": HINT}
    in_options = "with the key in its options"
    by_name = [name for name in answers if name != in_options]
    ids = _order_by_name(deployment, {name: hint if name == "with a webhook" else {} for name in by_name})
    options = {"reference": f"order of {key}", "kind": f"kind {key}"}
    seen = _order_in_app(deployment, {in_options: (ENDPOINT, _payload(in_options), options)})
    ids |= {name: int(answer) for name, answer in seen.items()}
    expected = {name: state for name, (_, state) in STATES.items()} | dict.fromkeys(spelled, "failed")
    states = _wait_for(deployment, ids, expected)
    report.check("the orders end as expected", states == expected, _differences(states, expected))
    _check_messages(report, deployment, ids, ["refused", *spelled])
    deployment.client.send_task("worker.nudge", [str(_remote_id(answers, "with a webhook"))], queue="fetch-worker")
    attached = deployment.command("fetch-worker", "attach", str(ids["cut"]), str(_remote_id(answers, "cut")))
    states = _wait_for(deployment, {"cut": ids["cut"]}, {"cut": "completed"})
    report.check("an attached order is completed", states == {"cut": "completed"}, states)
    refused = _refused_payloads(report, deployment, key)
    ids["with a refused key"] = _order_with_refused_key(report, deployment, api, key)
    shown = [deployment.command("fetch-worker", "show", *map(str, ids.values()), *form) for form in ([], ["--json"])]
    report.check("every order is shown", all(not result.returncode for result in shown), shown[0].stderr[-300:])
    report.check("their payloads are shown", all(HINT in result.stdout for result in shown))
    pages = _admin_pages(report, deployment, ids.values())
    return b"\n".join([json.dumps(seen).encode(), refused, *map(_printed, [attached, *shown]), pages])


def _expect(api: ApiProcess, answers: Mapping[str, str]) -> None:
    """Tell the API how to answer each order."""
    api.expect(
        [
            ApiOrder(name, answer, ApiJob(str(_remote_id(answers, name)), time.time(), 2.0))
            for name, answer in answers.items()
        ]
    )


def _remote_id(answers: Mapping[str, str], name: str) -> int:
    return FIRST_ID + list(answers).index(name)


def _payload(name: str, **fields: object) -> dict[str, object]:
    return {"track_id": name, "prompt": f"a lake, {name}", "samples": 1, **fields}


def _order_by_name(deployment: Deployment, orders: Mapping[str, Mapping[str, object]]) -> dict[str, int]:
    """Order by task name, as a web app without the package does. Return the job ids."""
    results = {
        name: deployment.client.send_task(
            "worker.order", [ENDPOINT, _payload(name, **fields)], queue="fetch-worker", ignore_result=False
        )
        for name, fields in orders.items()
    }
    return {name: int(result.get(timeout=60)) for name, result in results.items()}


def _order_in_app(deployment: Deployment, orders: Mapping[str, tuple[str, Any, Mapping[str, Any]]]) -> dict[str, Any]:
    """Call `order` in a process of an app. Return the job id or the message of the refusal, by name."""
    process = subprocess.run(
        [str(deployment.installation.bin / "python"), "-c", ORDER_FOR_AN_APP],
        cwd=deployment.checkout,
        env=deployment.environment,
        input=json.dumps(orders),
        capture_output=True,
        text=True,
        timeout=60,
    )
    if process.returncode:
        raise RuntimeError(f"the app could not order: {process.stderr[-800:]}")
    outcomes: dict[str, Any] = json.loads(process.stdout)
    return outcomes


def _wait_for(deployment: Deployment, ids: Mapping[str, int], expected: Mapping[str, str]) -> dict[str, str]:
    """Wait until the orders are in their expected states. Return their states."""

    def states() -> dict[str, str]:
        rows = {row["id"]: row["status"] for row in deployment.rows("SELECT id, status FROM fetch_jobs")}
        return {name: rows.get(job_id, "no row") for name, job_id in ids.items()}

    wait_until(lambda: states() == expected, 60, 0.5)
    return states()


def _check_messages(report: Report, deployment: Deployment, ids: Mapping[str, int], names: Iterable[str]) -> None:
    rows = {row["id"]: str(row["error_message"]) for row in deployment.rows("SELECT id, error_message FROM fetch_jobs")}
    messages = {name: rows[ids[name]] for name in names}
    report.none_of(
        "each refusal of an order has the mask", {name: text for name, text in messages.items() if "[key]" not in text}
    )


def _refused_payloads(report: Report, deployment: Deployment, key: str) -> bytes:
    """Try to order with the key in the payload or in the endpoint. Return what the app and the command printed."""
    payloads: dict[str, object] = {name: {"prompt": f"a {spell(key)} b"} for name, spell in SPELLINGS.items()}
    payloads |= {
        "a field": {"key": key, "prompt": "a lake"},
        "a name of a field": {"prompt": "a lake", key: 1},
        "a nested value": {"prompt": "a lake", "meta": [{"account": {"token": key}}]},
        "the address for a webhook": {"prompt": "a lake", "webhook": f"{HINT}?key={key}"},
        "no object": [key],
    }
    orders: dict[str, tuple[str, Any, Mapping[str, Any]]] = {
        name: (ENDPOINT, payload, {}) for name, payload in payloads.items()
    }
    orders["the endpoint"] = (f"v6/images/{key}", {"prompt": "a lake"}, {})
    before = deployment.count("SELECT count(*) FROM fetch_orders")
    outcomes = _order_in_app(deployment, orders)
    taken = [name for name, outcome in outcomes.items() if isinstance(outcome, int)]
    report.none_of("no payload with the key is accepted, in any spelling", taken)
    file = deployment.home / "payload.json"
    file.write_text(json.dumps(payloads["a nested value"]))
    printed = deployment.command("fetch-worker", "order", ENDPOINT, str(file))
    file.unlink()
    report.check("the command accepts none either", printed.returncode == 1, printed.returncode)
    after = deployment.count("SELECT count(*) FROM fetch_orders")
    report.check("a refused payload leaves no row", after - before == len(taken), after - before)
    return json.dumps(outcomes).encode() + _printed(printed)


def _order_with_refused_key(report: Report, deployment: Deployment, api: ApiProcess, key: str) -> int:
    """Order while the API refuses the key and quotes it. Once the key is accepted, the order is sent again."""
    name = "with a refused key"
    api.expect([ApiOrder(name, "taken_echo", ApiJob(str(FIRST_ID + 900), time.time(), 1.0))])
    api.behave(accept=[])
    ids = _order_by_name(deployment, {name: {}})
    refused = wait_until(lambda: any(call.answer == "wrong_key" for call in api.ledger().orders), 20)
    report.check("a refusal of the key that answers an order was received", refused)
    time.sleep(1)  # until the hold is recorded
    api.behave(accept=[key])
    deployment.command("fetch-worker", "resume", "--account", "default")
    states = _wait_for(deployment, ids, {name: "completed"})
    report.check("the order is sent again once the key is accepted", states == {name: "completed"}, states)
    return ids[name]


def _admin_pages(report: Report, deployment: Deployment, ids: Iterable[int]) -> bytes:
    """Return the admin pages about these jobs. They show the payloads."""
    password, port = token_urlsafe(9), free_port()
    deployment.set(ADMIN_PASSWORD=password)
    deployment.start_line("admin", f"fetch-worker admin --port {port}")
    browser = Browser(port)
    if not wait_until(browser.answers, 30):
        raise NotReady((deployment.log_folder / "admin.log").read_text()[-800:])
    browser.log_in(password)
    paths = ["/", "/jobs/", "/accounts/", *(f"/jobs/details/?id={job_id}" for job_id in ids)]
    failed = {path: status for path in paths if (status := browser.get(path)[0]) != 200}
    deployment.stop("admin")
    pages = b"\n".join(browser.pages.values())
    report.none_of("every admin page of an order opens", failed)
    report.check("the admin pages show the payloads", HINT.encode() in pages)
    return pages


def _printed(result: subprocess.CompletedProcess[str]) -> bytes:
    return f"{result.stdout}\n{result.stderr}".encode()


def _differences(states: Mapping[str, str], expected: Mapping[str, str]) -> dict[str, str | None]:
    return {name: states.get(name) for name in expected if states.get(name) != expected[name]}
