"""Check `on_done`: it must name a task and a queue of the web app."""

DEFAULT_QUEUE = "celery"
OWN_TASKS = ("worker.", "celery.")
OWN_QUEUES = "fetch-worker"  # the prefix of the worker's queues and of its keys in Redis


def task_and_queue(on_done: str) -> tuple[str, str]:
    """Return the name of the task and its queue.

    >>> task_and_queue("shop.ready"), task_and_queue("orders/shop.ready")
    (('shop.ready', 'celery'), ('shop.ready', 'orders'))
    """
    queue, _, task = on_done.rpartition("/")
    return task, queue or DEFAULT_QUEUE


def on_done_problem(on_done: str) -> str | None:
    """Return why this `on_done` is not allowed, or None if it is.

    Tasks of the worker are not allowed, because they could restart a final job, again and again.

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
