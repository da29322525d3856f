"""Where outputs are stored: local files, S3, and partial files on their way there."""
