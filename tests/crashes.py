"""The beginning of a program that dies, for tests of crashes between two steps."""

EXIT_CODE = 70
DIES_AFTER = f"""
import os

die = lambda *arguments, **named: os._exit({EXIT_CODE})
def after(owner, name, times=1):
    real, left = getattr(owner, name), [times]
    def inner(*arguments, **named):
        answer = real(*arguments, **named)
        left[0] -= 1
        return answer if left[0] else die()
    setattr(owner, name, inner)
"""  # `after(owner, name, times)` lets the process die after that many calls of a function
