"""Fault injection: each test breaks a real process, server or connection, and checks that no work is lost."""
