"""What `on_done` may name: a task of the web app, on a queue of the web app."""

DEFAULT_QUEUE = "celery"
OWN_TASKS = ("worker.", "celery.")
OWN_QUEUES = "fetch-worker"  # the worker's queues, and the keys that it has in Redis, begin so


def task_and_queue(on_done: str) -> tuple[str, str]:
    """Return the task's name and its queue.

    >>> task_and_queue("shop.ready"), task_and_queue("orders/shop.ready")
    (('shop.ready', 'celery'), ('shop.ready', 'orders'))
    """
    queue, _, task = on_done.rpartition("/")
    return task, queue or DEFAULT_QUEUE


def on_done_problem(on_done: str) -> str | None:
    """Return why no message may be sent for this `on_done`, or None where it may.

    A task of the worker itself could take a final job up again, and so on without end.

    >>> on_done_problem("shop.ready")
    >>> on_done_problem("Fetch-Worker/shop.ready")
    "the queue 'Fetch-Worker' belongs to fetch-worker itself: name a queue of your app"
    """
    task, queue = task_and_queue(on_done)
    if not task.strip() or not queue.strip() or on_done.startswith("/"):
        return f"{on_done!r} is neither task.name nor queue/task.name"
    if task.strip().casefold().startswith(OWN_TASKS):
        return f"the task {task!r} belongs to fetch-worker or Celery itself: name a task of your app"
    if queue.strip().casefold().startswith(OWN_QUEUES):
        return f"the queue {queue!r} belongs to fetch-worker itself: name a queue of your app"
    return None
