"""The stand-in of the hosted API: submit, fetch, and pictures worth looking at. Imports nothing else of the worker."""

from worker.sandbox.behaviour import Answer, Family, SandboxOptions
from worker.sandbox.server import Sandbox

__all__ = ["Answer", "Family", "Sandbox", "SandboxOptions"]
