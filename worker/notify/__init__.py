"""Tells web apps that a job is final: their `on_done` task and signed webhooks."""
