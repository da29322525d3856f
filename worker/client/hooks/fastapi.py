"""The handler of the API's webhook for FastAPI and Starlette: `app.mount("/api-hook", router)`."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from worker.client.hooks import status_of


def hook(request: Request) -> Response:
    """Process a call of the API, in a thread and not on the event loop."""
    return Response(status_code=status_of(request.path_params["reference"], request.path_params["signature"]))


router = Router([Route("/{reference}/{signature}", hook, methods=["POST"])])
