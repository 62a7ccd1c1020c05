"""mf_dist.load: a trained model in a program or a notebook.

import mf_dist
model = mf_dist.load("runs/digits")          # a run, a checkpoint, a model folder, an exported .safetensors
images = model.sample(8, classes=[3], nfe=1, seed=0)        # uint8 (8, H, W, 3)
"""

from collections.abc import Sequence
from functools import cached_property
from operator import index
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mf_dist.checkpoint.reader import Checkpoint, find_checkpoint
from mf_dist.objectives.sampler import uniform_grid
from mf_dist.runtime.distributed import choose_device
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.precision import Precision, single_cpu_thread
from mf_dist.sampling.generator import BLOCK, LatentGenerator, load_network, sampling_config, vae_source
from mf_dist.vae import Vae

Images = npt.NDArray[np.uint8]
"""(N, H, W, 3), RGB."""

Classes = Sequence[int | str] | int | str | None
"""Numbers or names, or one of them; None: as eval.labels of the run's config says."""


class Model:
    """Sample i depends on (seed, i), its class and the settings alone: n samples are the first n of any larger number,
    with the bits of tools/fid_eval.py and tools/sample.py --count on the same machine. For this they are computed 50 at
    a time: one image takes as long as fifty."""

    def __init__(
        self, checkpoint: Checkpoint, ema: str | None, vae: str | None, device: torch.device, precision: Precision
    ) -> None:
        self.checkpoint, self.device, self.precision = checkpoint, device, precision
        self.config = sampling_config(checkpoint)
        self.ema, self.net = load_network(checkpoint, self.config, ema)
        self.net.to(device).eval()
        self.class_names: list[str] = checkpoint.state["classes"]
        """By number; empty if they are not known."""
        self.num_classes = self.config.model.num_classes or 0
        self._vae_source = vae_source(checkpoint, self.config, vae)

    @cached_property
    def vae(self) -> Vae:
        """Loaded when it first decodes."""
        return Vae(self._vae_source, self.device, self.checkpoint.state["vae"], self.precision)

    def sample(
        self,
        n: int,
        classes: Classes = None,
        nfe: int = 1,
        seed: int = 0,
        guidance: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> Images:
        """n images. Sample i has class classes[i mod len(classes)]. nfe: network calls per image. guidance,
        interval: of networks that take them as an input; None: the run's. Raises UserError for values that do not apply
        to the model."""
        blocks = [self.block(k, classes, nfe, seed, guidance, interval)[0] for k in _blocks(n)]
        side = self.config.model.latent_size or 0
        empty = np.empty((0, side * self.vae.reduction, side * self.vae.reduction, 3), np.uint8)
        return np.concatenate([empty, *blocks])[:n]

    def latents(
        self,
        n: int,
        classes: Classes = None,
        nfe: int = 1,
        seed: int = 0,
        guidance: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """Those of `sample`, (n, C, S, S) fp32 on the CPU, as `decode` takes them: not normalised."""
        blocks = [self._latents(k, classes, nfe, seed, guidance, interval)[0].cpu() for k in _blocks(n)]
        return torch.cat([torch.empty(0, *self._shape), *blocks])[:n]

    def decode(self, latents: Tensor) -> Images:
        """Latents (B, C, S, S) as the VAE gives them -> images (B, H, W, 3). Those of a block of 50 have the same bits
        only if they are decoded together."""
        with single_cpu_thread(self.device):
            pixels = self.vae.decode(latents)
        return np.ascontiguousarray(pixels.cpu().numpy().transpose(0, 2, 3, 1))

    def block(
        self,
        number: int,
        classes: Classes = None,
        nfe: int = 1,
        seed: int = 0,
        guidance: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> tuple[Images, list[int]]:
        """Samples [50 number, 50 (number + 1)), which are computed together, and their classes."""
        latents, labels = self._latents(number, classes, nfe, seed, guidance, interval)
        return self.decode(latents), labels

    @property
    def _shape(self) -> tuple[int, ...]:
        model = self.config.model
        assert model.latent_channels is not None and model.latent_size is not None
        return model.latent_channels, model.latent_size, model.latent_size

    def _latents(
        self,
        number: int,
        classes: Classes,
        nfe: int,
        seed: int,
        guidance: float | None,
        interval: tuple[float, float] | None,
    ) -> tuple[Tensor, list[int]]:
        classes = [classes] if isinstance(classes, int | str) else classes
        if nfe < 1 or not 0 <= seed < 2**63 or (classes is not None and not len(classes)):
            raise UserError("expected nfe >= 1, seed from 0 to 2^63 - 1 and at least one class")
        config = sampling_config(self.checkpoint, None, guidance, interval)
        generator = LatentGenerator(self.net, self.checkpoint.state["vae"], config, self.device, self.precision)
        indices = range(number * BLOCK, (number + 1) * BLOCK)
        noise, labels = generator.draw(indices, config.eval.labels, seed, nfe)
        if classes is not None:
            numbers = [class_number(given, self.class_names, self.num_classes) for given in classes]
            labels = torch.tensor([numbers[i % len(numbers)] for i in indices])
        with single_cpu_thread(self.device):
            return generator.latents(noise, labels, uniform_grid(nfe)), labels.tolist()


def _blocks(n: int) -> range:
    """Numbers of the blocks that have the first n samples."""
    if n < 0:
        raise UserError(f"the number of samples must be at least 0, got {n}")
    return range(-(-n // BLOCK))


def class_number(given: int | str, names: Sequence[str], num_classes: int) -> int:
    """Of a number or a name; a text of digits is a number. Raises UserError for an unknown one."""
    text, known = given if isinstance(given, str) else str(index(given)), max(1, num_classes)
    if not text.removeprefix("-").isdecimal():
        if text not in names:
            some = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
            raise UserError(f"there is no class {text!r}; there are {some or f'numbers 0 to {known - 1}'}")
        return list(names).index(text)
    if not 0 <= int(text) < known:
        raise UserError(f"class {text} is not in 0..{known - 1}")
    return int(text)


def load(
    path: str | Path,
    *,
    ema: str | float | None = None,
    vae: str | Path | None = None,
    device: str | torch.device | None = None,
    precision: Precision | None = None,
) -> Model:
    """The model of a run (its newest checkpoint), a checkpoint, a model folder or an exported .safetensors. ema: decay,
    None: the run's first. vae: folder or hub id, None: the recorded one. device: None: a GPU if there is one.
    precision: None: tf32 on a GPU, else fp32. Raises UserError, with one line, for what cannot be loaded."""
    chosen = choose_device(0) if device is None else _device(device)
    if precision not in (None, *get_args(Precision)):
        raise UserError(f"there is no precision {precision!r}; there are {', '.join(get_args(Precision))}")
    default: Precision = "tf32" if chosen.type == "cuda" else "fp32"
    decay, decoder = (None if given is None else str(given) for given in (ema, vae))
    return Model(find_checkpoint(Path(path).expanduser()), decay, decoder, chosen, precision or default)


def _device(given: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=given).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise UserError(f"there is no device {str(given)!r}: {str(error).splitlines()[0]}") from None
