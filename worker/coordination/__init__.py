"""How processes share work: leases, the request rate in Redis, wake-ups, background publishing."""
