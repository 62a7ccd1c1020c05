"""Stops agreed on by all ranks, detection of hangs, and the status file that records why a run or tool ended."""
