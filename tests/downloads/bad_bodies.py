"""Bodies that servers send instead of a picture."""

import gzip

from tests.download_stand import png

HTML = b"<!doctype html><html><body>Sign in</body></html>"
BOMB = gzip.compress(png()[:40] + b"\x00" * 64 * 1_048_576, 1)
