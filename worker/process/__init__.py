"""One worker process: its resources, its runs, and how it starts and stops. Polling itself is not here."""
