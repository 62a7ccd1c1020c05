"""Stops agreed by all ranks, hangs, and the status file that says why a run or tool ended."""
