"""All that is known of the hosted API: its families, the addresses they are asked at, and what its answers mean.

Everything here is pure. The rest of the worker knows none of it; the types of replies are in `worker.core.reply`.
"""
