"""All decisions of the worker as pure functions: what to do after an answer, and when. Standard library only.

Nothing in this package reads a clock, a setting, a random number or a socket. All of these are arguments.
"""
