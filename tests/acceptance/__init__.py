"""Acceptance: drives the product from outside, by its environment, Procfile, task names, tables and command alone."""
