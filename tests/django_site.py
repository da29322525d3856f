"""Django's settings for the tests. A process can configure Django only once, so all tests share them."""


class UrlConf:
    """A URLconf with the handler of webhooks from the API."""

    def __init__(self) -> None:
        from django.urls import include, path

        self.urlpatterns = [path("api-hook/", include("worker.client.hooks.django"))]


def configure_django() -> None:
    """Configure Django, unless another test has done it."""
    from django.conf import settings

    if not settings.configured:
        protected = ["django.middleware.common.CommonMiddleware", "django.middleware.csrf.CsrfViewMiddleware"]
        settings.configure(
            SECRET_KEY="k",
            ALLOWED_HOSTS=["127.0.0.1", "testserver"],
            MIDDLEWARE=protected,
            LOGGING_CONFIG=None,
            ROOT_URLCONF=UrlConf(),
        )
