"""The handler of the API's webhook for FastAPI and Starlette: `app.mount("/api-hook", router)`."""

from contextlib import suppress

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router

from worker.client.hooks import MAX_BODY, is_valid, status_of


async def hook(request: Request) -> Response:
    """Process a call of the API. The database is used in a thread and not on the event loop."""
    reference, signature = request.path_params["reference"], request.path_params["signature"]
    body = await _start_of_body(request) if is_valid(reference, signature) else b""
    return Response(status_code=await run_in_threadpool(status_of, reference, signature, lambda: body))


async def _start_of_body(request: Request) -> bytes:
    body = b""
    with suppress(ClientDisconnect):
        async for chunk in request.stream():
            body += chunk
            if len(body) >= MAX_BODY:
                break
    return body[:MAX_BODY]


router = Router([Route("/{reference}/{signature}", hook, methods=["POST"])])
