"""The pure heart: what an answer means, what to do next, and when. Standard library only.

Nothing below this package reads a clock, a setting, a random number or a socket; all of it comes in as arguments.
"""
