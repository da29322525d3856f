"""`fetch-worker demo`: the whole job on real parts, in one directory, in one go.

Modules: `run` is the course of events; `parts` the processes; `watch` how the jobs stand, and how that is shown;
`sheet` the page with the pictures.
"""
