"""The tests, in a tree that mirrors the code they are about."""
