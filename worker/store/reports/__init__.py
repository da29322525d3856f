"""Reports for people: search, pages, statistics and history. Nothing here changes a job."""
