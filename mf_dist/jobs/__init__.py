"""Commands for job scripts: whether to start, what follows the end of a start, which nodes are fit to train."""
