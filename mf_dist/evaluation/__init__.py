"""Distances between sets of images: feature networks, references, statistics, and a record of how each was made."""
