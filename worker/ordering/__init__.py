"""Sends orders to the API and records the answers. What an answer means is in `worker.vendor.order_answers`."""
