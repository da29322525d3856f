"""Fuzzing: what no table of cases thinks of. A few hundred examples each time, ten thousand with `-m long`."""
