"""Metrics: their figures, how they are served, and what is made of them."""
