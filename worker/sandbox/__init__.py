"""Stand-in of the hosted API: every family of endpoints, fetches, and viewable outputs.

It imports no other package of the worker. Its knowledge of the API comes from the API's documentation.
"""

from worker.sandbox.answers import Answer
from worker.sandbox.families import Family
from worker.sandbox.options import SandboxOptions
from worker.sandbox.server import Sandbox

__all__ = ["Answer", "Family", "Sandbox", "SandboxOptions"]
