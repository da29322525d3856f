"""The former place of `worker.client.hooks.django`. Change the import; this module goes in the next release."""

import warnings

from worker.client.hooks.django import urlpatterns as urlpatterns

warnings.warn("worker.hooks_django has moved to worker.client.hooks.django", DeprecationWarning, stacklevel=2)
