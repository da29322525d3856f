"""This process and its machine: identity, logs, terminal, redaction of keys. Knows no job and no setting."""
