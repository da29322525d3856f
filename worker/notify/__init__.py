"""Notifies web apps that a job is final: through their `on_done` task and through signed webhooks."""
