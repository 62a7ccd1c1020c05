"""What job scripts ask: whether to start, what follows an end, which nodes are fit."""
