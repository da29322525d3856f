"""The API's webhook handler for Django: `path("api-hook/", include("worker.client.hooks.django"))` in a URLconf."""

from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from worker.client.hooks import MAX_BODY, status_of


@csrf_exempt  # type: ignore[untyped-decorator]  # Django has no annotations
@require_POST  # type: ignore[untyped-decorator]  # the same
def hook(request: HttpRequest, reference: str, signature: str) -> HttpResponse:
    """Process a call of the API."""
    return HttpResponse(status=status_of(reference, signature, lambda: request.read(MAX_BODY)))


urlpatterns = [path("<str:reference>/<str:signature>", hook)]
