"""One worker process: its resources, the runs that tasks start, and how it starts and stops. Polling is elsewhere."""
