"""From a checkpoint to samples and pictures.

Sample i depends on (seed, i) alone: its noise and label come from rng.sample_draw, and images are computed in
fixed blocks, [k BLOCK, (k + 1) BLOCK), each whole even where fewer are wanted, so that their bits never depend
on how many were asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mf_dist import rng
from mf_dist.checkpoint import Checkpoint
from mf_dist.config import Config, ModelConfig
from mf_dist.config_loader import from_tree
from mf_dist.data.images import Pixels, image_grid
from mf_dist.errors import UserError
from mf_dist.latents import Vae
from mf_dist.meanflow.sampler import sample_euler, sample_meanflow, uniform_grid
from mf_dist.models.dit import DiT

BLOCK = 50
"""Images computed together; part of the protocol, since a batch's size can change an image's last bits."""
GRID_COLUMNS = 8
IMAGENET_GRID = (207, 360, 387, 974, 88, 979, 417, 279)
"""The classes that iMF's and DiT's figures show."""


def new_net(model: ModelConfig, seed: int) -> DiT:
    """A DiT at its initial weights, which follow from the seed."""
    assert model.latent_size is not None and model.latent_channels is not None and model.num_classes is not None
    return DiT(
        latent_size=model.latent_size, latent_channels=model.latent_channels, num_classes=model.num_classes,
        patch_size=model.patch_size, hidden_size=model.hidden_size, depth=model.depth, num_heads=model.num_heads,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


class Generator:
    """A network, its VAE and its way of sampling: (noise, labels) to pixels."""

    def __init__(self, net: DiT, vae: Vae, config: Config, device: torch.device) -> None:
        self.net, self.vae, self.device = net.to(device).eval(), vae, device
        model = config.model
        assert model.latent_size is not None and model.latent_channels is not None and model.num_classes is not None
        self.shape = (model.latent_channels, model.latent_size, model.latent_size)
        self.num_classes = model.num_classes
        # a network trained at r = t alone knows velocities, not averages
        self.is_flow = config.meanflow.share_r_equals_t == 1
        self._sample = sample_euler if self.is_flow else sample_meanflow

    @torch.no_grad()
    def __call__(self, noise: Tensor, labels: Tensor, nfe: int) -> Pixels:
        """noise (B, C, S, S), labels (B,) -> pixels (B, 3, H, W) uint8."""
        x = self._sample(self.net, noise.to(self.device), labels.to(self.device), uniform_grid(nfe))
        if not x.isfinite().all():
            raise UserError("the model's samples are not finite: its training diverged; use an older checkpoint")
        return self.vae.decode(x).cpu().numpy()

    def blocks(self, count: int, nfe: int, labels: str, seed: int) -> Iterator[tuple[Pixels, npt.NDArray[np.int64]]]:
        """Samples [0, count) as (pixels, labels), at most BLOCK at a time; labels 'random' or 'balanced'."""
        for first in range(0, count, BLOCK):
            noise, y = self.draw(range(first, first + BLOCK), labels, seed)
            wanted = min(BLOCK, count - first)
            yield self(noise, y, nfe)[:wanted], y.numpy()[:wanted]

    def draw(self, indices: range, labels: str, seed: int) -> tuple[Tensor, Tensor]:
        """Noise (B, C, S, S) and labels (B,) of samples `indices`."""
        draws = [rng.sample_draw(seed, i, self.shape, self.num_classes) for i in indices]
        y = [label for _, label in draws] if labels == "random" else [i % max(1, self.num_classes) for i in indices]
        return torch.from_numpy(np.stack([noise for noise, _ in draws])), torch.tensor(y)

    def grid(self, nfe: int, seed: int, path: Path, names: list[str], classes: list[int] | None = None) -> None:
        """Writes a labelled PNG: a row per class (at most ten), the same noise and classes every time."""
        classes = self._grid_classes() if classes is None else classes
        noise, _ = self.draw(range(len(classes) * GRID_COLUMNS), "random", seed)
        y = torch.tensor(classes).repeat_interleave(GRID_COLUMNS)
        parts = [self(z, label, nfe) for z, label in zip(noise.split(BLOCK), y.split(BLOCK), strict=True)]
        texts = [names[c] if c < len(names) else str(c) if self.num_classes else "any" for c in classes]
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(np.concatenate(parts), texts).save(path)

    def _grid_classes(self) -> list[int]:
        if self.num_classes == 1000:
            return list(IMAGENET_GRID)
        return list(range(max(1, min(10, self.num_classes))))


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds, ready to sample."""

    generator: Generator
    config: Config
    checkpoint: Checkpoint
    ema_decay: str
    class_names: list[str]


def load_trained(checkpoint: Checkpoint, ema_decay: str | None, vae: str | None, device: torch.device) -> Trained:
    """The EMA network of a checkpoint with the VAE its latents were made with; UserError if one is missing."""
    state = checkpoint.state
    for key in ("config", "vae", "classes"):
        if key not in state:
            raise UserError(f"{checkpoint.folder}/state.json has no {key!r}: not a checkpoint of this program")
    config = from_tree(Config, state["config"], f"{checkpoint.folder}/state.json")
    decays = checkpoint.ema_decays()
    wanted = ema_decay or str(config.optim.ema_decay[0])
    if wanted not in decays:
        raise UserError(f"{checkpoint.folder} has no EMA of decay {wanted}; it has {', '.join(decays)}")
    net = new_net(config.model, seed=0)
    net.load_state_dict(checkpoint.load(f"ema-{wanted}"))
    source = vae or config.eval.vae or state["vae"]["source"]
    loaded = Vae(source, device, state["vae"])
    return Trained(Generator(net, loaded, config, device), config, checkpoint, wanted, state["classes"])
