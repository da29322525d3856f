"""Deprecated import path of `worker.client.hooks.fastapi`. It will be removed in the next release."""

import warnings

from worker.client.hooks.fastapi import router as router

warnings.warn("worker.hooks_fastapi has moved to worker.client.hooks.fastapi", DeprecationWarning, stacklevel=2)
