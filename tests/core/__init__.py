"""The tests of the pure core: tables, properties, and walks on a clock that is told the time."""
