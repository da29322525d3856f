"""Deprecated import path of `worker.client.hooks.flask`. It will be removed in the next release."""

import warnings

from worker.client.hooks.flask import blueprint as blueprint

warnings.warn("worker.hooks_flask has moved to worker.client.hooks.flask", DeprecationWarning, stacklevel=2)
