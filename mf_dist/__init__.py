"""One-step generative models at scale: MeanFlow (arXiv 2505.13447) on DeepSpeed."""
