"""Between the VAE's latents and the numbers that a network is trained on, x = (latent - mean) scale, by channel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mf_dist.config.schema import DataConfig

FAR_MEAN, FAR_STD = 1.0, 2.0
"""Stable Diffusion's VAE, with its scale, has means up to 0.2 and stds from 0.7 to 1."""


class Normalisation:
    """x = (latent - mean) scale; mean and scale have one number for each of the C channels, or one for all."""

    def __init__(self, mean: Sequence[float], scale: Sequence[float], device: torch.device) -> None:
        self.mean, self.scale = (torch.tensor(values, device=device).reshape(-1, 1, 1) for values in (mean, scale))

    def sample_posterior(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Of the VAE's posterior, normalised: moments (B, 2C, S, S) with mean and std, noise (B, C, S, S) ->
        x (B, C, S, S) fp32."""
        mean, std = moments.float().chunk(2, dim=1)
        return self.apply(mean + std * noise)

    def apply(self, latents: Tensor) -> Tensor:
        """Latents as the VAE gives them -> x, both (B, C, S, S) fp32."""
        return (latents - self.mean) * self.scale

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of `apply`."""
        return x / self.scale + self.mean


def normalisation(data: DataConfig, vae: dict[str, Any], device: torch.device) -> Normalisation:
    """That of a run, whose config is resolved; `vae`: the identity of its VAE (vae.py)."""
    if data.normalisation == "channel":
        assert data.normalisation_mean is not None and data.normalisation_std is not None
        return Normalisation(data.normalisation_mean, [1 / std for std in data.normalisation_std], device)
    return scale_of(vae, device)


def scale_of(vae: dict[str, Any], device: torch.device) -> Normalisation:
    """What a VAE's config says: diffusers' pipelines decode x / scaling_factor + shift_factor, or x latents_std /
    scaling_factor + latents_mean."""
    mean = vae.get("latents_mean", [vae.get("shift_factor", 0.0)])
    return Normalisation(mean, [vae["scaling_factor"] / std for std in vae.get("latents_std", [1.0])], device)


def channel_summary(manifest: dict[str, Any]) -> str:
    """A dataset's means and stds with the VAE's own scale, and what to do where they are far from 0 and 1."""
    scale = scale_of(manifest["vae"], torch.device("cpu"))
    channel_mean, channel_std = (torch.tensor(manifest[key])[:, None, None] for key in ("channel_mean", "channel_std"))
    mean, std = scale.apply(channel_mean).flatten(), (channel_std * scale.scale).flatten()
    shown = [[f"{value:.3f}" for value in values.tolist()] for values in (mean, std)]
    text = f"with the VAE's scale, latents have means {', '.join(shown[0])} and stds {', '.join(shown[1])} by channel"
    if mean.abs().max() > FAR_MEAN or std.min() < 1 / FAR_STD or std.max() > FAR_STD:
        text += "; data.normalisation=channel trains on means 0 and stds 1"
    return text
