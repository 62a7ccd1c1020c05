"""Every number of a run, how it is read from YAML, and what a run costs. No torch."""
