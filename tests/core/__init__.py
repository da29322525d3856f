"""Tests of the pure core: tables, properties and simulations with a controlled clock."""
