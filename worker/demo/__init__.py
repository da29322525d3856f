"""`fetch-worker demo`: a complete run on real processes, in one directory.

Modules: `run` is the sequence of steps; `processes` starts and stops the processes; `display` reads the jobs' progress
and shows it; `contact_sheet` is the page with the pictures.
"""
