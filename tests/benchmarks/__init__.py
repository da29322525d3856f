"""Benchmarks: the worker, the naive way and the limit side by side (`python -m tests.benchmarks`)."""
