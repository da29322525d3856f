"""What web apps call: track jobs, look them up, act on them, and the webhook handlers for web frameworks."""
