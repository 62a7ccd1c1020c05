"""The method of arXiv 2505.13447: pure functions of tensors, no device, no rank."""
