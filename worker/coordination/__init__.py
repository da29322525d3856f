"""What processes share: leases, the rate limiter in Redis, wake-ups. Also the thread that publishes messages."""
