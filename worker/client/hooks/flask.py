"""The handler of the API's webhook for Flask: `app.register_blueprint(blueprint, url_prefix="/api-hook")`."""

from flask import Blueprint, Response, request

from worker.client.hooks import MAX_BODY, status_of

blueprint = Blueprint("fetch_worker_hook", __name__)


@blueprint.post("/<reference>/<signature>")
def hook(reference: str, signature: str) -> Response:
    """Process a call of the API."""
    return Response(status=status_of(reference, signature, lambda: request.stream.read(MAX_BODY)))
