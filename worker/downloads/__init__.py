"""Download outputs: claim an output, receive its file, check it, store it, record the result."""
