"""Sources of settings: environment variables, the key file, server URLs and the state directory."""
