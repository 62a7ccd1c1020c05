"""Reading a folder of latent shards: manifest, index, random access by memory map.

    manifest.json            count, latent shape, classes, VAE, images, per-channel statistics, shards with sha256
    shard-00000.tar          webdataset: KEY.moments.npy (2C, S, S) fp16 = posterior mean, std; KEY.cls; KEY.json
    shard-00000.index.npz    offsets (n,) int64 of the raw moments in the tar, labels (n,) int64, shape (3,)

The manifest is written last: a folder without one is not finished.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mf_dist.errors import UserError

FORMAT = 1
Moments = npt.NDArray[np.float16]


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.tar"


def index_path(tar: Path) -> Path:
    return tar.with_suffix(".index.npz")


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a finished dataset, None where there is none; UserError if it cannot be understood."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}: format {manifest['format']}, this version reads {FORMAT}; encode again")
        for key in ("count", "latent_size", "latent_channels", "num_classes", "vae", "shards"):
            manifest[key]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); run the encode command again") from None
    return manifest


class LatentShards:
    """Images by index in [0, count), in the order of the source list."""

    def __init__(self, folder: str | Path, manifest: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        manifest = manifest or read_manifest(folder)
        if manifest is None:
            raise UserError(f"no finished dataset at {str(folder)!r}; run tools/encode_latents.py first")
        self.manifest = manifest
        self.count: int = manifest["count"]
        self.moments_shape = (2 * manifest["latent_channels"], manifest["latent_size"], manifest["latent_size"])
        self._starts = np.cumsum([0, *(shard["count"] for shard in manifest["shards"])])
        for shard in manifest["shards"]:
            self._check(shard)

    def _check(self, shard: dict[str, Any]) -> None:
        tar = self.folder / shard["name"]
        size = tar.stat().st_size if tar.is_file() else None
        if size != shard["bytes"] or not index_path(tar).is_file():
            found = "is missing" if size is None else f"has {size} bytes, the manifest says {shard['bytes']}"
            raise UserError(f"{tar} (or its index) {found}; run the encode command again to restore it")

    @cached_property
    def _open(self) -> list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Per shard: mapped bytes, offsets, labels. Opened at first use, hence once per loader process."""
        opened: list[Any] = []
        for shard in self.manifest["shards"]:
            tar = self.folder / shard["name"]
            with np.load(index_path(tar), allow_pickle=False) as index:
                opened.append((np.memmap(tar, np.uint8, "r"), index["offsets"], index["labels"]))
        return opened

    def __getitem__(self, index: int) -> tuple[Moments, int]:
        """Posterior moments (2C, S, S) fp16, mean then std, unscaled; and the label."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        mapped, offsets, labels = self._open[shard]
        row = index - int(self._starts[shard])
        size = 2 * int(np.prod(self.moments_shape))
        raw = mapped[offsets[row] : offsets[row] + size]
        return raw.view(np.float16).reshape(self.moments_shape), int(labels[row])
