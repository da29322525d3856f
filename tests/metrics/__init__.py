"""Metrics: their values, the server, and the alert rules and dashboard that use them."""
