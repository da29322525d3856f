"""Benchmarks: the worker beside a naive implementation and the theoretical limit (`python -m tests.benchmarks`)."""
