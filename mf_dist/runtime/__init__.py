"""The base of all other packages: process group, launch, files, errors, randomness, precision."""
