"""What a run costs, by arithmetic alone (no torch): parameters, FLOPs, steps. --dry-run prints it."""

import yaml

from mf_dist.config import Config, ModelConfig
from mf_dist.config_loader import to_tree

SINUSOIDS = 256


def tokens(model: ModelConfig) -> int:
    assert model.latent_size is not None
    return (model.latent_size // model.patch_size) ** 2


def parameters(model: ModelConfig) -> int:
    """Trainable numbers of the DiT in models/dit.py."""
    assert model.latent_channels is not None and model.num_classes is not None
    d, patch = model.hidden_size, model.patch_size**2 * model.latent_channels
    block = (3 * d * d + 3 * d) + (d * d + d) + (8 * d * d + 5 * d) + (6 * d * d + 6 * d)
    time = (SINUSOIDS * d + d) + (d * d + d)
    ends = (patch * d + d) + (2 * d * d + 2 * d) + (d * patch + patch)
    return model.depth * block + 2 * time + (model.num_classes + 1) * d + ends


def forward_flops(model: ModelConfig) -> int:
    """Of one image in one forward pass, counting a multiply-add as 2; matrix products only."""
    assert model.latent_channels is not None
    n, d, patch = tokens(model), model.hidden_size, model.patch_size**2 * model.latent_channels
    block = 12 * n * d * d + 2 * n * n * d + 6 * d * d
    time = SINUSOIDS * d + d * d
    return 2 * (model.depth * block + 2 * time + 2 * n * patch * d + 2 * d * d)


def forwards_per_image(config: Config) -> float:
    """A step's cost per image in forward passes F: 3 F regression, guidance's null pass on every row and u(y) on
    the r < t rows, value and tangent on the r < t rows."""
    below = 1 - float(config.meanflow.share_r_equals_t)
    guidance = (1 + (below if config.meanflow.kappa else 0)) if config.meanflow.guided else 0
    return 3 + guidance + 2 * below


def describe(config: Config, world_size: int) -> str:
    """The resolved config and its consequences, for --dry-run."""
    model, train = config.model, config.train
    assert train.micro_batch is not None
    count, flops, per_image = parameters(model), forward_flops(model), forwards_per_image(config)
    lines = [
        yaml.safe_dump(to_tree(config), sort_keys=False).rstrip(),
        "---",
        f"latent          ({model.latent_channels}, {model.latent_size}, {model.latent_size}), {tokens(model)} tokens, "
        f"{model.num_classes} classes",
        f"parameters      {count:,}",
        f"forward         {flops / 1e9:,.2f} GFLOP an image (2 per multiply-add)",
        f"step            {per_image:.2f} forwards an image, {per_image * flops * train.batch_size / 1e12:,.3f} TFLOP "
        f"(plain flow matching: 3)",
        f"batch           {train.batch_size} = {world_size} ranks x {train.micro_batch} x "
        f"{train.batch_size // (world_size * train.micro_batch)} accumulation",
        f"run             {config.total_steps:,} steps, {per_image * flops * train.total_images:.2e} FLOP",
        f"checkpoint      {count * 16 / 2**30:,.2f} GiB each (fp32 weights, two moments, EMA)",
    ]
    return "\n".join(lines)
