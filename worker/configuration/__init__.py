"""Groups of settings and their sources: environment variables, the key file, server URLs, the state directory."""
