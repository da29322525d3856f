"""Rate limit of the stand-in, and the answer that refuses a request."""

from math import ceil

from worker.sandbox.answers import Answer, json_answer
from worker.sandbox.options import SandboxOptions


class RateLimit:
    """Counts requests with a token bucket. The requests of one second may come at once."""

    def __init__(self) -> None:
        self._allowance: float | None = None
        self._counted_at = 0.0

    def refusal(self, options: SandboxOptions, now: float) -> Answer | None:
        """Count a request. Return the answer that refuses it if there were too many."""
        rate = options.rps
        if not rate:
            return None
        burst, elapsed = max(1.0, rate), max(0.0, now - self._counted_at)
        allowance = burst if self._allowance is None else min(burst, self._allowance + elapsed * rate)
        self._counted_at = now
        self._allowance = allowance - 1 if allowance >= 1 else allowance
        if allowance >= 1:
            return None
        seconds = max(1, ceil((1 - allowance) / rate))
        if options.limit_style == "http429":
            text = f"Rate limit exceeded. At most {rate:g} requests per second are allowed."
            return json_answer({"status": "error", "message": text, "retry_after": seconds}, status=429)
        tips = f"too many requests in a short time, please wait for {seconds} seconds and try again"
        return json_answer({"status": "error", "message": "Rate limit exceeded", "tips": tips, "retry_after": seconds})
