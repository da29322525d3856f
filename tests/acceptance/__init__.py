"""Acceptance programs: they use the product only through its environment, Procfile, task names, tables and command."""
