"""Queries that only read: search, pages, figures and history for people. Nothing here writes a job."""
