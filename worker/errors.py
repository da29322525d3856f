"""All errors that fetch-worker raises, as one tree, with what to do about each.

WorkerError
├── SettingsError      a setting is missing, unknown or malformed: correct it and restart
├── NotTrackable       the argument can't become a job: nothing was written; correct the call
│   ├── ApiRefused     the API refused the order: see `answer` and `message`
│   └── RefusedAddress the API key must not be sent to this fetch address
├── JobNotFound        no such job: `fetch-worker list` shows the jobs
├── OutputMissing      no such output, not stored yet, or its file is missing: run `fetch-worker verify`
├── WaitTimeout        the job is not final yet: wait again (also a TimeoutError)
├── SchemaOutdated     the tables are missing or old: run `fetch-worker migrate`
├── TraceError         a line of a trace is not a job: correct the file
├── Unavailable        a server did not answer: nothing was done; try again
│   └── DeploymentError a server lacks a right, a schema or a setting: correct it, then try again
├── DatabaseRefused    the database refused a value: nothing was written; correct the call
├── CopyRefused        a database can't be copied to or from: the message says what to do
└── StorageTrouble     the storage refused a file: nothing is lost; it is tried again
"""

from typing import Any


class WorkerError(Exception):
    """The base class of all errors of this package."""


class SettingsError(WorkerError):
    """A setting is missing, unknown or malformed. Correct it and restart."""


class NotTrackable(WorkerError, ValueError):
    """The argument can't become a job. Nothing was written; correct the call."""


class ApiRefused(NotTrackable):
    """The API refused the order. Nothing was written.

    `message` is the reason of the API, `answer` is its whole JSON object, or `None` if there was none.
    """

    def __init__(self, text: str, *, message: str = "", answer: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.message = message
        self.answer = answer


class RefusedAddress(NotTrackable):
    """The API key must not be sent to this fetch address. Nothing was written."""


class JobNotFound(WorkerError, LookupError):
    """There is no such job."""


class OutputMissing(WorkerError, LookupError):
    """There is no such output, it is not stored yet, or its file is missing."""


class WaitTimeout(WorkerError, TimeoutError):
    """The job was not final within the time-out. It continues; wait again."""


class SchemaOutdated(WorkerError):
    """The tables are missing or of another version. Run `fetch-worker migrate`."""


class Unavailable(WorkerError):
    """A server did not answer. Nothing was done; try again."""


class DeploymentError(Unavailable):
    """A server answers, but lacks a right, a schema or a setting. Nothing was done; correct it on the server."""


class DatabaseRefused(WorkerError, ValueError):
    """The database refused a value. Nothing was written; correct the call."""


class CopyRefused(WorkerError):
    """A database can't be copied, or another one can't take the copy. The message says what to do."""


class StorageTrouble(WorkerError):
    """The storage refused a file. Nothing is lost; the output waits and is tried again."""


class TraceError(WorkerError, ValueError):
    """A line of a trace is not a job. Correct the file and simulate again."""
