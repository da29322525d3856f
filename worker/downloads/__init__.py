"""Downloads outputs: claim, transfer, check, store, record."""
