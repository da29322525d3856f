"""Options of downloads."""

from dataclasses import dataclass

from worker.settings import Settings


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """Options of downloads. `timeout` is the longest time of one attempt, `deadline` that of all attempts together."""

    max_bytes: int
    max_pixels: int
    timeout: float
    deadline: float
    per_host: int = 12  # concurrent downloads
    user_agent: str = "fetch-worker"
    slow_seconds: float = 30.0  # an attempt ends if a period of this length is slower than the minimum speed


def download_options(settings: Settings) -> DownloadOptions:
    """Return the options from the settings."""
    return DownloadOptions(
        max_bytes=settings.output_max_bytes,
        max_pixels=settings.output_max_pixels,
        timeout=settings.output_timeout,
        deadline=settings.output_deadline,
        per_host=settings.downloads_per_host,
        user_agent=settings.user_agent,
    )
