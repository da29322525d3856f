"""Web apps of one file each, as a reader would write them, and the tests that use them from a browser."""
