"""This process and its machine: identity, logs, terminal, watchdog, redaction of keys. No jobs, no settings."""
