"""Asks the API about due jobs and records what it says. Downloads, webhooks and `on_done` are elsewhere."""
