"""Checkpoints independent of the world size: reading, writing in the background, retention."""
