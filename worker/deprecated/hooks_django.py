"""Deprecated import path of `worker.client.hooks.django`. It will be removed in the next release."""

import warnings

from worker.client.hooks.django import urlpatterns as urlpatterns

warnings.warn("worker.hooks_django has moved to worker.client.hooks.django", DeprecationWarning, stacklevel=2)
