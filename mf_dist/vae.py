"""Converts pixels to latents and back. Only this module handles the VAE and its value range."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_dist.runtime.atomic_files import sha256_of
from mf_dist.runtime.errors import UserError, import_error
from mf_dist.runtime.precision import Precision, compute_precision

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LOCAL_FOLDERS = {
    *("cache", "checkpoint", "checkpoints", "ckpt", "ckpts", "data", "dataset", "datasets", "exp"),
    *("home", "local", "mnt", "model", "models", "opt", "out", "output", "outputs"),
    *("pretrained", "results", "run", "runs", "scratch", "shared", "storage", "tmp", "vae"),
    *("vaes", "weights", "work"),
}
"""Usual names of folders, which are taken for missing ones and not for owners on the hub."""
DTYPES = ("F64", "F32", "F16", "BF16")
"""Types of safetensors in which weights may be stored."""
COUNT = "a whole number >= 1", lambda value: type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6  # false for what is not a number, too


RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "scaling_factor": ("a number from 1e-6 to 1e6", lambda value: _is_number(value) and 1e-6 <= value <= 1e6),
    "in_channels": ("3", lambda value: value == 3),
    "out_channels": ("3", lambda value: value == 3),
    "latent_channels": COUNT,
    "layers_per_block": COUNT,
    "norm_num_groups": COUNT,
    "block_out_channels": (
        "a list of whole numbers >= 1",
        lambda value: isinstance(value, list) and len(value) > 0 and all(type(n) is int and n >= 1 for n in value),
    ),
}
"""Of a VAE's config: what a number must be."""
SHIFTS = ("shift_factor", "latents_mean", "latents_std")
BLOCKS = ("block_out_channels", "down_block_types", "up_block_types")
DECODED_PIXELS = 50 * 256 * 256
"""Of a pass of the decoder at most: Stable Diffusion's takes 12.5 GiB for them in fp32 (docs/gpu.md)."""


def to_pixels(images: Tensor, truncates: bool = False) -> Tensor:
    """[-1, 1] -> uint8, clip(round((x + 1) / 2 * 255)), in fp32. truncates: floor in place of round, which darkens by
    half a level: as EDM2's decoder of latents does."""
    levels = (images.float() + 1) * 127.5
    return (levels.floor() if truncates else levels.round()).clamp(0, 255).to(torch.uint8)


class Vae:
    """A diffusers AutoencoderKL from a local folder or by hub id."""

    def __init__(
        self,
        source: str,
        device: torch.device,
        expected: dict[str, Any] | None = None,
        precision: Precision = "fp32",
        compiled: bool = False,
    ) -> None:
        """Raises UserError if the VAE cannot be loaded or its `identity` is not the expected one, as far as that is
        known. compiled: encoder and decoder are compiled, one graph per batch shape."""
        self.folder = folder = _vae_folder(source)
        self.source, self.precision, self.compiled = source, precision, compiled
        self.sha256 = sha256_of(folder / WEIGHTS)
        self.device = device
        if precision == "tf32" and device.type != "cuda":
            raise UserError("precision tf32 needs a GPU; use fp32 or bf16")
        model = _load_autoencoder(folder).eval().requires_grad_(False)
        self.model = model.to(device=device, memory_format=torch.channels_last)
        self.model.decoder.conv_out = _InFp32(self.model.decoder.conv_out)
        if compiled:
            self.model.encoder.compile(dynamic=False)
            self.model.decoder.compile(dynamic=False)
        config = {key: value for key, value in sorted(self.model.config.items()) if key[0] != "_"}
        self.config_sha256 = hashlib.sha256(json.dumps(config, default=str).encode()).hexdigest()
        self.scale = _scale(self.model.config)
        """How diffusers' pipelines scale its latents: scaling_factor and, where the VAE has them, shift_factor or
        latents_mean and latents_std."""
        self.reduction = 2 ** (len(self.model.config["block_out_channels"]) - 1)
        """Side of an image / side of its latent."""
        expected = expected or {}
        for key in _compared(expected):
            own, theirs = self.identity.get(key, "none"), expected.get(key, "none")
            if own != theirs:
                raise UserError(
                    f"VAE {source!r} has {key} {own}, the latents were made with {theirs}; "
                    "set that VAE with eval.vae=FOLDER or --vae FOLDER"
                )

    @property
    def identity(self) -> dict[str, Any]:
        """What datasets and checkpoints record about their VAE."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "config_sha256": self.config_sha256,
            **self.scale,
        }

    def copy_files(self, into: Path) -> None:
        """Copies its config and weights into a new folder, from which it can be loaded."""
        into.mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(self.folder / name, into / name)

    @property
    def environment(self) -> str:
        """The software and the device, which affect the last bits of `encode`'s result."""
        device = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        return f"torch {torch.__version__}, diffusers {version('diffusers')}, {device}"

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> posterior mean and std (B, 2C, h, w) fp32, unscaled; input range is [-1, 1]."""
        x = (pixels.to(self.device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with compute_precision(self.precision, self.device):
            posterior = self.model.encode(x).latent_dist
        return torch.cat([posterior.mean.float(), posterior.logvar.float().mul(0.5).exp()], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor, truncates: bool = False) -> Tensor:
        """Unscaled latents (B, C, h, w) -> pixels (B, 3, H, W) uint8 by `to_pixels`; in equal parts where one pass
        would take too much memory. The parts depend on the size of the images only, so that their bits do too."""
        pixels = latents.shape[0] * latents.shape[2] * latents.shape[3] * self.reduction**2
        with compute_precision(self.precision, self.device):
            parts = latents.to(self.device).chunk(-(-pixels // DECODED_PIXELS))
            return torch.cat([to_pixels(self.model.decode(part).sample, truncates) for part in parts])


class _InFp32(torch.nn.Module):
    """Runs the decoder's last layer in fp32, whatever the precision of the others: bf16 has 8 significant bits, and
    rounding it to uint8 would give one pixel value in seven another level."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.float())


def _vae_folder(source: str) -> Path:
    """A folder with config.json and weights: a local one, or, for a hub id, that in the hub's cache, where both are
    downloaded if one is missing. No network is asked before that."""
    folder = Path(source)
    if folder.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"VAE folder {source!r} has no {name}; save it with diffusers' save_pretrained")
        return folder
    if not _is_hub_id(source):
        raise UserError(
            f"no VAE folder at {source!r}; working directory: {os.getcwd()} (a hub id has the form owner/name)"
        )
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        paths = [huggingface_hub.try_to_load_from_cache(source, name) for name in (CONFIG, WEIGHTS)]
        if not all(isinstance(path, str) for path in paths):
            # asked once: a download tries an unreachable hub for half a minute, which is right for a busy one only
            with suppress(huggingface_hub.errors.HfHubHTTPError):
                huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(source, CONFIG))
            paths = [huggingface_hub.hf_hub_download(source, name) for name in (CONFIG, WEIGHTS)]
    except Exception as error:  # of the hub, its HTTP client, the disk; ImportError where a proxy needs a package
        raise UserError(
            f"no VAE folder at {source!r}, and none from the hub: {_reason(error)}. On a machine with network run "
            f"`hf download {source} {CONFIG} {WEIGHTS} --local-dir FOLDER`, copy FOLDER here and give its path"
        ) from None
    return Path(str(paths[0])).parent


def _is_hub_id(source: str) -> bool:
    """Whether a source that is no folder is owner/name on the hub: in the hub's letters, where `owner` is neither a
    folder here nor one of the usual names of folders."""
    owner, slash, _ = source.partition("/")
    if not slash or owner.lower() in LOCAL_FOLDERS or Path(owner).is_dir():
        return False
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _reason(error: BaseException) -> str:
    """The first line of the error that began a chain of them."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _check_config(path: Path) -> None:
    """Raises UserError unless the config.json of a VAE describes one that `Vae` can use. What is missing has a default
    in diffusers."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {str(path)!r}: {_reason(error)}; expected JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"{str(path)!r} holds no JSON object, expected the config of an AutoencoderKL")
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(f"{str(path)!r} is of class {config.get('_class_name')}, expected AutoencoderKL")
    for key, (expected, holds) in RULES.items():
        if key in config and not holds(config[key]):
            raise UserError(f"{str(path)!r}: {key} is {json.dumps(config[key])}, expected {expected}")
    blocks = {len(config[key]) for key in BLOCKS if isinstance(config.get(key), list)}
    if len(blocks) > 1:
        raise UserError(f"{str(path)!r}: {', '.join(BLOCKS)} differ in length")
    _check_shift(path, config)


def _check_shift(path: Path, config: dict[str, Any]) -> None:
    """The numbers by which latents are shifted and scaled by channel."""
    channels, given = config.get("latent_channels", 4), [key for key in SHIFTS if config.get(key) is not None]
    for key in given:
        value = config[key]
        items = [value] if key == "shift_factor" else value if isinstance(value, list) else []
        positive = key == "latents_std"
        holds = all(_is_number(n) and (n >= 1e-6 or not positive) for n in items)
        if not holds or len(items) != (1 if key == "shift_factor" else channels):
            expected = "a number" if key == "shift_factor" else f"a list of {channels} {'positive ' * positive}numbers"
            raise UserError(f"{str(path)!r}: {key} is {json.dumps(value)}, expected {expected}")
    if given not in ([], ["shift_factor"], ["latents_mean", "latents_std"]):
        raise UserError(
            f"{str(path)!r} has {' and '.join(given)}; expected shift_factor, or latents_mean and latents_std together"
        )


def _compared(expected: Mapping[str, Any]) -> list[str]:
    """Of the identity of the VAE that latents were made with: what is known of it, its scale as a whole."""
    known = [key for key in ("sha256", "scaling_factor", "config_sha256") if key in expected]
    return [*known, *SHIFTS] if "scaling_factor" in expected else known


def _scale(config: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: config[key] for key in SHIFTS if config.get(key) not in (None, 0)}
    return {"scaling_factor": float(config["scaling_factor"]), **given}


def _load_autoencoder(folder: Path) -> Any:
    from mf_dist.runtime.torchvision_repair import repair_torchvision

    repair_torchvision()
    try:
        from diffusers import AutoencoderKL
    except Exception as error:  # it imports whatever else of its kind is installed
        raise import_error("diffusers", "loads VAEs", error) from None
    from safetensors import safe_open

    _check_config(folder / CONFIG)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  it is no dict
        model, loading = AutoencoderKL.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # diffusers' constructors raise any on numbers that do not fit together
        raise UserError(f"cannot load the VAE in {str(folder)!r}: {_reason(error)}") from None
    if mismatch := [*loading["missing_keys"], *loading["unexpected_keys"]]:
        raise UserError(f"the weights in {str(folder)!r} are not those of a complete AutoencoderKL: {mismatch[0]}")
    odd = [f"{name} has type {kind}, which holds no weights" for name, kind in stored.items() if kind not in DTYPES]
    odd += [f"{name} is not finite" for name, p in model.named_parameters() if not p.isfinite().all()]
    if odd:
        raise UserError(f"the weights in {str(folder)!r}: {odd[0]}")
    return model
