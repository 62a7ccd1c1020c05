"""What every other room stands on: processes, files, errors, randomness, precision."""
