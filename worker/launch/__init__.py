"""Starts and supervises processes: `fetch-worker up`, its supervisor, the embedded Redis."""
