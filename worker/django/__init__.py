"""fetch-worker as a Django app: add `worker.django` to INSTALLED_APPS.

Calls such as `worker.track` then use Django's own connection, so a job is committed or rolled back with the view's
transaction. `manage.py migrate` makes the tables, and the admin shows the jobs.
"""
