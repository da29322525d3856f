"""HTTP for untrusted servers: one deadline per call, pooled connections, guarded addresses. Knows nothing of jobs."""
