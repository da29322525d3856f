"""Prometheus metrics, computed from the database at each scrape, so that they do not depend on any process."""
