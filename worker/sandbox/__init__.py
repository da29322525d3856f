"""The stand-in of the hosted API: every family of orders, fetches, and outputs worth looking at. Imports nothing else
of the worker: what it knows of the API it has from the documents."""

from worker.sandbox.answers import Answer
from worker.sandbox.families import Family
from worker.sandbox.options import SandboxOptions
from worker.sandbox.server import Sandbox

__all__ = ["Answer", "Family", "Sandbox", "SandboxOptions"]
