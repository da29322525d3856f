"""Example web apps of one file each, and their tests in a browser."""
