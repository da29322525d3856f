"""The former place of `worker.client.hooks.fastapi`. Change the import; this module goes in the next release."""

import warnings

from worker.client.hooks.fastapi import router as router

warnings.warn("worker.hooks_fastapi has moved to worker.client.hooks.fastapi", DeprecationWarning, stacklevel=2)
