"""The method of arXiv 2505.13447 as pure functions of tensors, independent of device and rank."""
