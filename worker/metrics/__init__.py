"""Prometheus metrics, computed from the database when they are asked for: no process counts, so none can miscount."""
