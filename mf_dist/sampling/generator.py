"""Samples and grids of samples from a checkpoint.

Sample i depends on (seed, i) only: its noise and label come from rng.sample_draw, and images are computed in fixed
blocks (evaluation/blocks.py). A block is always computed in full, so the bits of an image do not depend on the number
of samples.
"""

import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mf_dist.checkpoint.reader import Checkpoint
from mf_dist.config.loader import from_tree
from mf_dist.config.schema import Config, ModelConfig
from mf_dist.data.images import Pixels, can_draw, image_grid
from mf_dist.data.normalisation import normalisation
from mf_dist.models.dit import DiT
from mf_dist.models.imf_dit import Guidance, ImfDiT
from mf_dist.models.network import Network
from mf_dist.objectives.sampler import SAMPLERS, uniform_grid
from mf_dist.runtime import rng
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.precision import Precision, compute_precision, single_cpu_thread
from mf_dist.runtime.weights import load_weights
from mf_dist.vae import Vae

BLOCK = 50
"""Images computed together."""
GRID_COLUMNS = 8
IMAGENET_GRID = (207, 360, 387, 974, 88, 979, 417, 279)
"""The classes shown in the figures of iMF and DiT."""
FEW_FLOW_STEPS = 8
"""With fewer Euler steps, samples of flow matching are visibly blurred (docs/experiments.md)."""


def build_network(model: ModelConfig, seed: int, for_sampling: bool = False) -> Network:
    """The network of a resolved config with its initial weights, which depend on the seed only; for_sampling: without
    what only training needs."""
    assert model.latent_size is not None and model.latent_channels is not None and model.num_classes is not None
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "latent_size": model.latent_size,
        "latent_channels": model.latent_channels,
        "num_classes": model.num_classes,
        "patch_size": model.patch_size,
        "hidden_size": model.hidden_size,
        "depth": model.depth,
        "num_heads": model.num_heads,
    }
    if model.network == "dit":
        return DiT(**sizes, generator=generator)
    assert model.imf_dit is not None
    return ImfDiT(**sizes, **asdict(model.imf_dit), generator=generator, v_head=not for_sampling)


def sampling_network(model: ModelConfig, trained: dict[str, Tensor], source: str) -> Network:
    """The network that samples, with its part of the weights of a trained one. Raises UserError as load_weights."""
    net = build_network(model, 0, for_sampling=True)
    part = {name: tensor for name, tensor in trained.items() if not name.startswith(net.TRAINING_ONLY)}
    load_weights(net, part, source)
    return net


class LatentGenerator:
    """Network and sampler: (noise, labels) -> latents. vae: identity of the VAE of these latents."""

    def __init__(
        self,
        net: Network,
        vae: dict[str, Any],
        config: Config,
        device: torch.device,
        precision: Precision = "fp32",
        compile_net: bool = False,
    ) -> None:
        self.net, self.device, self.precision = net.to(device).eval(), device, precision
        self.normalisation = normalisation(config.data, vae, device)
        if compile_net:
            self.net.compile(dynamic=False)
        model = config.model
        assert model.latent_size is not None and model.latent_channels is not None and model.num_classes is not None
        self.shape = (model.latent_channels, model.latent_size, model.latent_size)
        self.num_classes = model.num_classes
        self.section, self.is_flow, self.sampler = config.objective_section, config.objective.is_flow, config.sampler
        self.guidance = config.guidance

    @property
    def protocol(self) -> dict[str, Any]:
        """How it samples, for results."""
        if self.guidance is None:
            return {"sampler": self.sampler}
        scale, *interval = self.guidance
        return {"sampler": self.sampler, "guidance": scale, "interval": interval}

    @torch.no_grad()
    def latents(self, noise: Tensor, labels: Tensor, times: list[float]) -> Tensor:
        """noise (k, B, C, S, S) as from `draw`, labels (B,) -> latents (B, C, S, S) fp32 as the VAE decodes them;
        `times` from 1 down to 0."""
        with compute_precision(self.precision, self.device):
            x = SAMPLERS[self.sampler](self._net, noise.to(self.device), labels.to(self.device), times)
        if not x.isfinite().all():  # also synchronises with the GPU
            raise UserError("the samples are not finite: the training diverged; use an older checkpoint")
        return self.normalisation.undo(x.float())

    def _net(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Any:
        if self.guidance is None:
            return self.net(z, r, t, y)
        return self.net(z, r, t, y, Guidance(*(torch.full_like(t, value) for value in self.guidance)))

    def warning_of_few_steps(self, nfe: int) -> str | None:
        """What `nfe` network calls per image will show, if the network knows velocities only and they are too few."""
        if not self.is_flow or nfe >= FEW_FLOW_STEPS:
            return None
        shown = "about the mean image of their class" if nfe == 1 else "blurred"
        return (
            f"warning: this run is flow matching ({self.section}.share_r_equals_t=1), whose samples in {nfe} "
            f"step{'s' * (nfe > 1)} are {shown}; use --nfe 25 or more, or a run with r < t"
        )

    def draw(self, indices: range, labels: str, seed: int, steps: int) -> tuple[Tensor, Tensor]:
        """Noise (k, B, C, S, S), k = 1 unless the sampler takes new noise in each of `steps`, and labels (B,) of the
        samples `indices`; `labels` is 'random' or 'balanced'."""
        count = steps if self.sampler == "restart" else 1
        draws = [rng.sample_draw(seed, i, self.shape, self.num_classes, count) for i in indices]
        y = [label for _, label in draws] if labels == "random" else [i % max(1, self.num_classes) for i in indices]
        return torch.from_numpy(np.stack([noise for noise, _ in draws], axis=1)), torch.tensor(y)


class ImageGenerator(LatentGenerator):
    """Network, sampler and VAE decoder: (noise, labels) -> pixels."""

    def __init__(
        self,
        net: Network,
        vae: Vae,
        config: Config,
        device: torch.device,
        precision: Precision = "fp32",
        compile_net: bool = False,
    ) -> None:
        super().__init__(net, vae.identity, config, device, precision, compile_net)
        self.vae = vae
        self.resolution = self.shape[-1] * vae.reduction
        """Side of an image."""
        self.truncates = False
        """Whether pixels are truncated (vae.to_pixels)."""
        self.seconds: dict[str, float] = defaultdict(float)
        """Time spent in sampling and in decoding."""

    def __call__(self, noise: Tensor, labels: Tensor, times: list[float]) -> Pixels:
        """noise (k, B, C, S, S) as from `draw`, labels (B,) -> pixels (B, 3, H, W) uint8; `times` from 1 down to 0."""
        start = time.perf_counter()
        latents = self.latents(noise, labels, times)
        sampled = time.perf_counter()
        pixels: Pixels = self.vae.decode(latents, self.truncates).cpu().numpy()
        self.seconds["sample"] += sampled - start
        self.seconds["decode"] += time.perf_counter() - sampled
        return pixels

    def grid(
        self,
        nfes: list[int],
        seed: int,
        path: Path,
        names: list[str],
        classes: list[int] | None = None,
        times: list[float] | None = None,
    ) -> None:
        """Writes a PNG: one row per class (at most ten by default), with its name or number, the numbers of
        steps side by side, always with the same noise and classes. `times`: a grid of times instead of equal steps."""
        classes = self._grid_classes() if classes is None else classes
        columns = GRID_COLUMNS if len(nfes) == 1 else GRID_COLUMNS // 2
        noise, _ = self.draw(range(len(classes) * columns), "random", seed, max(len(times or []) - 1, *nfes))
        y = torch.tensor(classes).repeat_interleave(columns)
        batches = list(zip(noise.split(BLOCK, dim=1), y.split(BLOCK), strict=True))
        with single_cpu_thread(self.device):
            groups = [
                np.concatenate([self(z, label, times or uniform_grid(nfe)) for z, label in batches]) for nfe in nfes
            ]
        side_by_side = np.stack([group.reshape(len(classes), columns, *group.shape[1:]) for group in groups], axis=1)
        row_labels = [self._row_label(c, names) for c in classes]
        column_labels = [f"{nfe} step{'s' * (nfe > 1)}" for nfe in nfes]
        path.parent.mkdir(parents=True, exist_ok=True)
        column_labels = column_labels if len(nfes) > 1 else []
        image_grid(side_by_side.reshape(-1, *groups[0].shape[1:]), row_labels, column_labels).save(path)

    def _row_label(self, number: int, names: list[str]) -> str:
        """The name of a class, or its number if it has no name, or one that cannot be drawn."""
        if not self.num_classes:
            return "any"
        return names[number] if number < len(names) and can_draw(names[number]) else str(number)

    def _grid_classes(self) -> list[int]:
        if self.num_classes == 1000:
            return list(IMAGENET_GRID)
        return list(range(max(1, min(10, self.num_classes))))


class Samples:
    """`count` samples as a Source (evaluation/sources.py). `made_by`: identifies the weights."""

    def __init__(
        self, generator: ImageGenerator, count: int, times: list[float], labels: str, seed: int, made_by: dict[str, Any]
    ) -> None:
        self.generator, self.count, self.seconds = generator, count, generator.seconds
        self.cycle = generator.num_classes if labels == "balanced" else 0
        self._draw = labels, seed
        self.times = times
        self.identity = {
            **made_by,
            "times": times,
            "labels": labels,
            "seed": seed,
            "resolution": generator.resolution,
            "vae_sha256": generator.vae.sha256,
            "precision": generator.precision,
            **generator.protocol,
            **({"pixels": "truncated"} if generator.truncates else {}),
        }

    def read(self, first: int, last: int) -> tuple[Pixels, npt.NDArray[np.int64]]:
        noise, labels = self.generator.draw(range(first, last), *self._draw, len(self.times) - 1)
        return self.generator(noise, labels, self.times), labels.numpy()


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model, ready to sample."""

    generator: ImageGenerator
    config: Config
    checkpoint: Checkpoint
    ema_decay: str
    class_names: list[str]


def load_trained_model(
    checkpoint: Checkpoint,
    ema_decay: str | None,
    vae: str | None,
    device: torch.device,
    precision: Precision = "fp32",
    compiles: bool = False,
    sampler: Literal["meanflow", "restart"] | None = None,
    guidance: float | None = None,
    interval: tuple[float, float] | None = None,
) -> TrainedModel:
    """The EMA network of a checkpoint and the VAE of its latents; sampler, guidance and interval: in place of the
    run's. Raises UserError if one is missing, or does not apply to the network."""
    config = sampling_config(checkpoint, sampler, guidance, interval)
    wanted, net = load_network(checkpoint, config, ema_decay)
    decoder = Vae(vae_source(checkpoint, config, vae), device, checkpoint.state["vae"], precision, compiles)
    generator = ImageGenerator(net, decoder, config, device, precision, compiles)
    return TrainedModel(generator, config, checkpoint, wanted, checkpoint.state["classes"])


def sampling_config(
    checkpoint: Checkpoint,
    sampler: Literal["meanflow", "restart"] | None = None,
    guidance: float | None = None,
    interval: tuple[float, float] | None = None,
) -> Config:
    """The config of a checkpoint's run, with other settings of sampling. Raises UserError if one does not apply to the
    network."""
    for key in ("config", "vae", "classes"):
        if key not in checkpoint.state:
            raise UserError(f"{checkpoint.folder}/state.json has no {key!r}: not a checkpoint of this program")
    config = from_tree(Config, checkpoint.state["config"], f"{checkpoint.folder}/state.json")
    if sampler and config.objective.is_flow:
        raise UserError(f"{checkpoint.folder} is a run of flow matching, sampled by Euler steps: leave out --sampler")
    if config.guidance is None and (guidance is not None or interval is not None):
        raise UserError(
            f"{checkpoint.folder} has a network without guidance as an input (model.network={config.model.network}): "
            "leave out --guidance and --interval"
        )
    if guidance is not None and not 1 <= guidance < math.inf:
        raise UserError(f"guidance must be a number >= 1, got {guidance}")
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
        raise UserError(f"the interval of guidance must be start, end with 0 <= start <= end <= 1, got {interval}")
    given: dict[str, Any] = {"sampler": sampler, "guidance": guidance, "interval": interval}
    return replace(config, eval=replace(config.eval, **{key: a for key, a in given.items() if a is not None}))


def load_network(checkpoint: Checkpoint, config: Config, ema_decay: str | None) -> tuple[str, Network]:
    """The decay of the EMA, None: the run's first, and its network. Raises UserError if it is missing or damaged."""
    decays = checkpoint.ema_decays()
    wanted = ema_decay or (decays[0] if len(decays) == 1 else str(config.optim.ema_decay[0]))
    if wanted not in decays:
        raise UserError(f"{checkpoint.folder} has no EMA of decay {wanted}; it has {', '.join(decays)}")
    weights = f"ema-{wanted}"
    return wanted, sampling_network(config.model, checkpoint.load(weights), str(checkpoint.file(weights)))


def vae_source(checkpoint: Checkpoint, config: Config, given: str | None) -> str:
    """Folder or hub id of the VAE."""
    return given or str(checkpoint.vae_folder or config.eval.vae or checkpoint.state["vae"]["source"])
