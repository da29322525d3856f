"""Deprecated import path of `worker.client.hooks`. It will be removed in the next release."""

import warnings

from worker.client.hooks import hook_url as hook_url
from worker.client.hooks import received as received
from worker.client.hooks import status_of as status_of

warnings.warn("worker.hooks has moved to worker.client.hooks", DeprecationWarning, stacklevel=2)
