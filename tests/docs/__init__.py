"""The manual: its examples run, its links lead somewhere, its tables agree with the code."""
