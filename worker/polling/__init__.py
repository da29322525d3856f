"""Polls the API for due jobs and records the answers. Downloads, webhooks and `on_done` calls are elsewhere."""
