"""Every error a caller of fetch-worker can meet, drawn as one tree; each says what its catcher may do.

WorkerError
├── SettingsError      a setting is missing, unknown or malformed: correct it and start again
├── NotTrackable       this can't become a job: nothing was written; correct the call
│   ├── ApiRefused     the API did not take the order: `answer` and `message` say why
│   └── RefusedAddress the fetch address is not one the key may go to
├── JobNotFound        no such job: look it up by `list`
├── OutputMissing      no such output, not stored yet, or its file is gone: `verify` gets it again
├── WaitTimeout        the job is not final yet: wait again (also a TimeoutError)
├── SchemaOutdated     the tables are missing or old: run `fetch-worker migrate`
├── TraceError         a line is no job of a trace: correct the file and simulate again
├── Unavailable        a server did not answer: nothing was done, safe to try again
│   └── DeploymentError a server lacks a right, a schema or a setting: correct it, then try again
├── DatabaseRefused    the database refused a value: nothing was written; correct the call
└── StorageTrouble     the file store refused: nothing is lost, it is tried again
"""

from typing import Any


class WorkerError(Exception):
    """The root of all errors of this package."""


class SettingsError(WorkerError):
    """A setting is missing, unknown or malformed. Correct it and start again."""


class NotTrackable(WorkerError, ValueError):
    """This can't become a job. Nothing was written; correct the call."""


class ApiRefused(NotTrackable):
    """The API did not take the order. Nothing was written.

    `message` is the API's reason in its own words, `answer` the whole JSON object (None where there was none).
    """

    def __init__(self, text: str, *, message: str = "", answer: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.message = message
        self.answer = answer


class RefusedAddress(NotTrackable):
    """The fetch address is not one that the API key may be sent to. Nothing was written."""


class JobNotFound(WorkerError, LookupError):
    """There is no such job."""


class OutputMissing(WorkerError, LookupError):
    """There is no such output, it is not stored yet, or its file is gone."""


class WaitTimeout(WorkerError, TimeoutError):
    """The job was not final within the time given. It goes on; waiting again is safe."""


class SchemaOutdated(WorkerError):
    """The tables are missing or of another version. Run `fetch-worker migrate`."""


class Unavailable(WorkerError):
    """A server did not answer. Nothing was done; it is safe to try again."""


class DeploymentError(Unavailable):
    """A server answers, but a right, a schema or a setting is missing there. Nothing was done; correct it there."""


class DatabaseRefused(WorkerError, ValueError):
    """The database refused a value. Nothing was written; correct the call."""


class StorageTrouble(WorkerError):
    """The file store refused a file. Nothing is lost; the output waits and is tried again."""


class TraceError(WorkerError, ValueError):
    """A line is no job of a trace. Correct the file and simulate again."""
