"""A folder of images into a dataset of latent shards."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mf_dist.data.images import ImageFolder, list_images, load_image
from mf_dist.data.shard_writer import Record, is_whole, write_json, write_shard
from mf_dist.data.shards import FORMAT, LatentShards, read_index, shard_name
from mf_dist.errors import UserError
from mf_dist.latents import Vae
from mf_dist.progress import progress

PLAN = "plan.json"
"""What the shards in a folder are made of; a folder with another plan is refused."""


def encode_folder(images: str, out: Path, vae_source: str, resolution: int, shard_size: int, batch: int) -> None:
    """Writes the shards that are missing, then the manifest. Raises UserError on unreadable images and where `out`
    holds shards of another plan."""
    folder = list_images(images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = Vae(vae_source, device)
    if resolution % vae.reduction:
        raise UserError(f"--resolution {resolution} is not a multiple of {vae.reduction}, this VAE's reduction")
    plan = _plan(folder, vae, resolution, shard_size, batch)
    _claim(out, plan)
    starts = range(0, len(folder.paths), shard_size)
    with progress(len(folder.paths), "img", "encode") as bar:
        for number, first in enumerate(starts):
            tar = out / shard_name(number)
            rows = range(first, min(first + shard_size, len(folder.paths)))
            if not is_whole(tar):
                moments = _encode_rows(folder, rows, vae, resolution, batch, bar)
                records = [Record(m, folder.labels[i], folder.paths[i]) for i, m in zip(rows, moments, strict=True)]
                write_shard(tar, first, records)
            else:
                bar.update(len(rows))
    _finish(out, plan, len(starts))


def _plan(folder: ImageFolder, vae: Vae, resolution: int, shard_size: int, batch: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "image_list_sha256": _list_sha256(folder),
        "count": len(folder.paths),
        "num_classes": len(folder.classes),
        "classes": folder.classes,
        "resolution": resolution,
        "crop": "ADM centre crop",
        "value_range": [-1, 1],
        "dtype": "float16",
        "encode_batch": batch,
        "shard_size": shard_size,
        "vae": vae.identity,
    }


def _list_sha256(folder: ImageFolder) -> str:
    """Of the images' paths below the folder, and their sizes in bytes: another list is another dataset."""
    lines = (f"{path} {(folder.root / path).stat().st_size}\n" for path in folder.paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Records the plan in a new folder; UserError where the folder has another."""
    path = out / PLAN
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_json(path, plan)
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in plan if found.get(key) != plan[key]]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot use {str(out)!r}: {error}") from None
    if changed:
        key = changed[0]
        raise UserError(
            f"{str(out)!r} holds latents of another plan: {key} was {found.get(key)!r}, now {plan[key]!r}; "
            "choose another --out or remove that folder"
        )


def _encode_rows(
    folder: ImageFolder, rows: range, vae: Vae, resolution: int, batch: int, bar: Any
) -> Iterator[npt.NDArray[np.float16]]:
    """Moments (2C, S, S) fp16 of each row; decoding runs in threads beside the VAE."""

    def load(i: int) -> npt.NDArray[np.uint8]:
        return load_image(folder.root / folder.paths[i], resolution)

    with ThreadPoolExecutor() as pool:
        for first in range(rows.start, rows.stop, batch):
            pixels = np.stack(list(pool.map(load, range(first, min(first + batch, rows.stop)))))
            moments = vae.encode(torch.from_numpy(pixels)).cpu().numpy()
            if not np.isfinite(moments).all():
                raise UserError(f"the VAE gives non-finite latents near {folder.paths[first]!r}; encode in fp32")
            yield from moments.astype(np.float16)
            bar.update(len(pixels))


def _finish(out: Path, plan: dict[str, Any], num_shards: int) -> None:
    """The manifest: the plan, the shards with sizes and sha256, the latents' shape and exact channel statistics."""
    shards = []
    for number in range(num_shards):
        index = read_index(out / shard_name(number))
        assert index is not None
        channels, side, _ = index.shape
        shards.append(
            {"name": shard_name(number), "count": len(index.labels), "bytes": index.size, "sha256": index.sha256}
        )
    manifest = {**plan, "latent_channels": channels // 2, "latent_size": side, "shards": shards}
    mean, deviation = _channel_statistics(LatentShards(out, manifest))
    write_json(out / "manifest.json", manifest | {"channel_mean": mean, "channel_std": deviation})
    scaled = [round(d * plan["vae"]["scaling_factor"], 3) for d in deviation]
    print(f"{plan['count']} images in {num_shards} shards at {out}; scaled latents' std per channel {scaled}")


def _channel_statistics(shards: LatentShards) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (C,) of posterior samples over all images and pixels, unscaled."""
    means, squares = [], []
    for i in range(shards.count):
        mean, std = np.split(shards[i][0].astype(np.float64), 2)
        means.append(mean.mean(axis=(1, 2)))
        squares.append((mean**2 + std**2).mean(axis=(1, 2)))
    centre = np.mean(means, axis=0)
    return centre.tolist(), np.sqrt(np.mean(squares, axis=0) - centre**2).tolist()
