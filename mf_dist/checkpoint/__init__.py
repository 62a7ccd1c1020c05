"""Checkpoints that belong to no world size: read, written in the background, kept or removed."""
