"""The names of the worker's queues."""

QUEUE = "fetch-worker"
POLLS = "fetch-worker.polls"
DOWNLOADS = "fetch-worker.downloads"
ALL = (QUEUE, POLLS, DOWNLOADS)
