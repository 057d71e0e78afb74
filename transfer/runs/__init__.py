"""One run, repeated runs, search, time limits, and the record that reproduces a run."""
