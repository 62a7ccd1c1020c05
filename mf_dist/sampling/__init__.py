"""Sampling images from a checkpoint."""
