"""The endpoint of an order: the URL to which the order, with the API key, may be posted."""

import re
from typing import NamedTuple

from worker.core.identity import FetchAddress
from worker.errors import NotTrackable, RefusedAddress
from worker.vendor.fetch_url import MAX_ADDRESS, AllowedApi, Order, fetch_address, order_and_path

# This excludes userinfo, query, fragment, percent signs, backslashes and white space.
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9._:/\[\]-]", re.ASCII)
_FETCHES = frozenset({"fetch", "fine_tune_status", "get_queued_response"})
# Calls about the account, a server or a training. They create no job, and some of them destroy jobs.
_OTHER_CALLS = re.compile(
    r"clear_queue|(?:cancel|cancle)(?:_.*)?|delete.*|system_(?:load|details)|request_count|wallet_balance"
    r"|assets_generated"
)
_WORKFLOWS = "workflows"
_EXAMPLE = "such as v6/images/text2img"


class OrderTarget(NamedTuple):
    """Where an order is posted: the URL, its host (in the form of `normal_host`), and its path below `/api/`.

    `order` says at which site and in which family the job is fetched.
    """

    url: str
    host: str
    path: str
    order: Order


def order_target(endpoint: object, api: AllowedApi) -> OrderTarget:
    """Return where to post an order. `endpoint` is a URL, or a path below `/api/`, such as `v6/images/text2img`.

    The path is in lower case, as the API writes it, except in workflows, because it contains their ids. Raises
    RefusedAddress if the key must not be sent there, and NotTrackable if the path is no path of an order.
    """
    if isinstance(endpoint, str):
        _check_is_plain(endpoint.strip())
    order, path = order_and_path(endpoint, api)
    parts = path.split("/")
    if len(parts) > 2 and parts[1].lower() == _WORKFLOWS:
        path = "/".join([parts[0].lower(), _WORKFLOWS, *parts[2:]])
        if len(parts) > 4 and parts[3].lower() == "runs":
            raise NotTrackable(f"endpoint {path[:120]!r} fetches a workflow run: order it at v1/workflows/ID/run")
    else:
        path = path.lower()
        _check_is_order(path)
    return OrderTarget(f"{order.site}/api/{path}", order.site.partition("://")[2], path, order)


def address_of_order(endpoint: str, remote_id: str, api: AllowedApi) -> FetchAddress:
    """Return the fetch address of the job that an order created. Raises the errors of `order_target`."""
    target = order_target(endpoint, api)
    return fetch_address(target.order.fetch_url(remote_id), remote_id, api)


def _check_is_plain(text: str) -> None:
    """Raise RefusedAddress for a text that is no plain URL or path. It is not quoted, because it may contain a key."""
    if len(text) > MAX_ADDRESS:
        raise RefusedAddress(f"the endpoint has {len(text):,} characters: {MAX_ADDRESS} at most")
    character = _NOT_PLAIN.search(text)
    if character is not None:
        raise RefusedAddress(
            f"the endpoint is refused, because it contains {character[0]!r}: use a plain path below /api/, {_EXAMPLE},"
            " or the URL with scheme, host and path alone; parameters belong to the payload"
        )


def _check_is_order(path: str) -> None:
    names = [part.replace("-", "_") for part in path.split("/")[1:]]
    if not _FETCHES.isdisjoint(names):
        raise NotTrackable(
            f"endpoint {path[:120]!r} fetches a job and orders nothing: use the path that creates the job, {_EXAMPLE};"
            " to follow a job that exists, call track"
        )
    if any(map(_OTHER_CALLS.fullmatch, names)):
        raise NotTrackable(
            f"endpoint {path[:120]!r} creates no job: use the path of an order, {_EXAMPLE}; call this one directly"
        )
