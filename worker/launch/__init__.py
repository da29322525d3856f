"""Starting and supervising processes: `fetch-worker up`, its supervisor and the embedded Redis."""
