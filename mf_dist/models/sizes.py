"""Named shapes of DiTs and of the networks of improved MeanFlow. No torch, for command lines and cost estimates.

B to XL: the paper's Table 4. XXL and G: width, depth and heads of Large-DiT 2B and 3B (Alpha-VLLM/LLaMA2-Accessory);
with full modulations in every block they have 2.3 and 5.5 billion parameters here.
iMF's: the authors' imfDiT_B_2 to imfDiT_XL_2 (arXiv 2512.02012).
"""

from mf_dist.config.schema import ImfDitConfig, ModelConfig

SHAPES = {  # depth, width, heads
    "B": (12, 768, 12),
    "M": (16, 1024, 16),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "XXL": (24, 2304, 32),
    "G": (32, 3072, 32),
}
IMF_SHAPES = {"B": (12, 768, 12), "M": (24, 768, 12), "L": (32, 1024, 16), "XL": (48, 1024, 16)}


def named_model(name: str, latent_size: int, num_classes: int = 1000) -> ModelConfig:
    """'XL/2' -> DiT-XL with patches of 2 on 4-channel latents; KeyError or ValueError for an unknown name."""
    letters, patch = name.split("/")
    depth, width, heads = SHAPES[letters]
    return ModelConfig(depth, width, heads, int(patch), latent_size, 4, num_classes)


def named_imf_dit(name: str, latent_size: int, num_classes: int = 1000) -> ModelConfig:
    """'XL/2' -> iMF-XL/2; otherwise as named_model."""
    letters, patch = name.split("/")
    depth, width, heads = IMF_SHAPES[letters]
    sizes = (depth, width, heads, int(patch), latent_size, 4, num_classes)
    return ModelConfig(*sizes, network="imf_dit", imf_dit=ImfDitConfig())
