"""The former place of `worker.client.hooks.flask`. Change the import; this module goes in the next release."""

import warnings

from worker.client.hooks.flask import blueprint as blueprint

warnings.warn("worker.hooks_flask has moved to worker.client.hooks.flask", DeprecationWarning, stacklevel=2)
