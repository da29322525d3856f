"""The ids that apps pass: plain numbers, with an error that shows what to write."""

from worker.errors import JobNotFound, NotTrackable


def checked_job_id(job_id: object) -> int:
    """Return a job id as a plain number. Raises NotTrackable for anything else, also for digits in a text."""
    return _checked(job_id, "a job id")


def checked_output_id(output_id: object) -> int:
    """Return an output id as a plain number. Raises NotTrackable for anything else."""
    return _checked(output_id, "an output id")


def no_job(job_id: int) -> JobNotFound:
    """Return the error for an id without a job."""
    return JobNotFound(f"there is no job {job_id}: `fetch-worker list` shows the jobs")


def quoted(value: object) -> str:
    """Return a short form of any value, for an error message."""
    text = repr(value) if isinstance(value, (str, float, bool)) else f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"


def _checked(value: object, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    digits = isinstance(value, str) and value.isascii() and value.isdecimal()
    advice = f": write int({quoted(value)})" if digits else ""
    raise NotTrackable(f"{name} must be a whole number, not {quoted(value)}{advice}")
