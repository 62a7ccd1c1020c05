"""Encodes images into a dataset of latent shards, with one process or many.

Shard i holds block i of the source list, whatever the number of tasks, and is made by task i mod n; each is complete or
absent. A task that finds all shards complete writes the manifest. Making a shard twice gives the same bytes.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mf_dist.data.image_list import ImageList
from mf_dist.data.image_tars import open_images
from mf_dist.data.images import Pixels, Unreadable, decode_image
from mf_dist.data.labels import refuse_empty_classes, some_of
from mf_dist.data.normalisation import channel_summary
from mf_dist.data.shard_writer import Record, remove_temporary_files, valid_index, write_shard
from mf_dist.data.shards import FORMAT, LatentShards, index_path, read_index, shard_name, write_manifest
from mf_dist.fault_tolerance.tool_status import count_finished_unit
from mf_dist.runtime.atomic_files import sha256_of, write_json
from mf_dist.runtime.errors import UserError
from mf_dist.runtime.output import complain
from mf_dist.runtime.progress import progress
from mf_dist.vae import Vae

PLAN = "plan.json"
"""Records how the shards in a folder are made; a folder with another plan is refused."""


@dataclass(frozen=True)
class Encoding:
    """How images become latents; all of it is part of the plan."""

    resolution: int
    shard_size: int
    batch: int
    """Images encoded together, always of one shard, so that the bytes do not depend on the number of tasks."""
    flip: bool = False
    max_bad_share: float = 0.001
    """Allowed share of unreadable images, which are left out and listed."""


@dataclass(frozen=True)
class Task:
    """Task `number` of `count`."""

    number: int = 0
    count: int = 1


def encode_images(images: str, out: Path, vae: Vae, encoding: Encoding, task: Task) -> None:
    """Writes the missing shards of this task, and the manifest once all shards exist. Raises UserError on too many
    unreadable images, on a class without images, on write errors, and if `out` holds shards of another plan."""
    source = open_images(images, [out])
    refuse_empty_classes(source.root, source.labels, source.classes)
    check_resolution(encoding.resolution, vae)
    if task.number == 0:
        _announce(source)
    plan = _plan(source, vae, encoding)
    try:
        _write_or_check_plan(out, plan)
        _encode_shards(source, out, vae, encoding, task, _plan_sha256(plan))
        _finish(source, out, plan, encoding, task)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; finished shards are kept, the same command continues"
        ) from None


def _announce(source: ImageList) -> None:
    """Says what is encoded before the work begins."""
    classes = "without classes"
    if source.classes:
        classes = f"of {len(source.classes)} classes ({source.form}): {some_of(source.classes)}"
    print(f"{len(source.paths)} images {classes}{source.ignored}", flush=True)
    text = source.doubt
    if not source.classes:
        text = f"no labels found in {str(source.root)!r}: this becomes an unconditional dataset; " + (
            text or 'labels are class folders, KEY.cls, KEY.json with a "label", or one tar a class (see --help)'
        )
    if text:
        complain(f"warning: {text}")


def check_resolution(resolution: int, vae: Vae) -> None:
    if resolution % vae.reduction:
        raise UserError(f"--resolution {resolution} is not a multiple of {vae.reduction}, this VAE's reduction")


def _encode_shards(source: ImageList, out: Path, vae: Vae, encoding: Encoding, task: Task, plan_sha256: str) -> None:
    blocks = _blocks(len(source.paths), encoding)
    own = range(task.number, len(blocks), task.count)
    with (
        progress(sum(len(blocks[number]) for number in own), "img", "encode") as bar,
        ThreadPoolExecutor(1) as writer,  # a shard is written while the next is encoded
    ):
        writing, all_bad, unreadable = Future[None](), list[str](), Counter[int]()
        writing.set_result(None)
        for number in own:
            tar = out / shard_name(number)
            unreadable.update(source.labels[i] for i in blocks[number])
            if index := valid_index(tar, plan_sha256):
                all_bad += index.skipped
                unreadable.subtract(index.labels.tolist())
                bar.update(len(blocks[number]))
                continue
            bad: list[str] = []
            records = list(_encode_block(source, blocks[number], vae, encoding, bar, bad))
            all_bad += bad
            _check_bad(all_bad, len(source.paths), encoding)
            if not records:
                raise UserError(f"no image of {tar.name} can be read; the first: {bad[0]}")
            unreadable.subtract(record.label for record in records)
            _check_classes(source, unreadable)
            writing.result()
            writing = writer.submit(_write, tar, records, bad, plan_sha256)
        writing.result()


def _write(tar: Path, records: list[Record], bad: list[str], plan_sha256: str) -> None:
    write_shard(tar, records, bad, plan_sha256)
    count_finished_unit()


def _blocks(total: int, encoding: Encoding) -> list[range]:
    """Which images each shard holds."""
    size = encoding.shard_size
    return [range(first, min(first + size, total)) for first in range(0, total, size)]


def _plan(source: ImageList, vae: Vae, encoding: Encoding) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "image_list_sha256": _list_sha256(source),
        "count": len(source.paths),
        "num_classes": len(source.classes),
        "classes": source.classes,
        "resolution": encoding.resolution,
        "crop": "ADM centre crop",
        "value_range": [-1, 1],
        "dtype": "float16",
        "flip": encoding.flip,
        "encode_batch": encoding.batch,
        "encode_precision": vae.precision,
        "encode_compiled": vae.compiled,
        "encoded_by": vae.environment,
        "shard_size": encoding.shard_size,
        "vae": vae.identity,
    }


def _list_sha256(source: ImageList) -> str:
    """Hash of the images' names below the source, sizes in bytes and classes; another list is another dataset."""
    digest = hashlib.sha256()
    with progress(len(source.paths), "img", "list") as bar:
        for path, size, label in zip(source.paths, source.sizes(), source.labels, strict=True):
            digest.update(f"{path} {size} {label}\n".encode())
            bar.update(1)
    return digest.hexdigest()


def _without_vae_path(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan without the path of the VAE, which does not affect the latents."""
    vae = plan.get("vae")
    return {**plan, "vae": {**vae, "source": ""} if isinstance(vae, dict) else vae}


def _plan_sha256(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_without_vae_path(plan), sort_keys=True).encode()).hexdigest()


def _write_or_check_plan(out: Path, plan: dict[str, Any]) -> None:
    """Records the plan in a new folder; raises UserError if the folder has another plan."""
    path = out / PLAN
    out.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        if any(out.glob("shard-*")) or (out / "manifest.json").exists():
            raise UserError(
                f"{str(out)!r} holds shards, but its {PLAN} is missing: choose another --out or remove that folder"
            )
        write_json(path, plan)
    try:
        recorded = _without_vae_path(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); choose another --out or remove that folder") from None
    for key, value in _without_vae_path(plan).items():
        if recorded.get(key) != value:
            raise UserError(
                f"{str(out)!r} holds latents of another plan: {key} was {recorded.get(key)!r}, now {value!r}; "
                "choose another --out or remove that folder"
            )


def _encode_block(
    source: ImageList, block: range, vae: Vae, encoding: Encoding, bar: Any, bad: list[str]
) -> Iterator[Record]:
    """Records of the readable images of a block, in order; adds a line to `bad` for each unreadable one."""
    images = _decoded(source, block, encoding, bar, bad)
    while group := list(islice(images, encoding.batch)):
        pixels = torch.zeros(encoding.batch, 3, encoding.resolution, encoding.resolution, dtype=torch.uint8)
        pixels[: len(group)] = torch.from_numpy(np.stack([image for _, image, _ in group]))  # one shape: one graph
        views = [pixels, pixels.flip(3)] if encoding.flip else [pixels]
        moments = [vae.encode(view).cpu().numpy().astype(np.float16) for view in views]
        for row, (i, _, sha256) in enumerate(group):
            flipped = moments[1][row] if encoding.flip else None
            for array in (moments[0][row], flipped):
                if array is not None and not np.isfinite(array).all():
                    raise UserError(
                        f"the VAE gives latents of {source.paths[i]!r} that fp16 cannot hold; encode with "
                        "--precision fp32, or use another VAE"
                    )
            yield Record(i, moments[0][row], source.labels[i], source.paths[i], sha256, flipped)


def _decoded(
    source: ImageList, block: range, encoding: Encoding, bar: Any, bad: list[str]
) -> Iterator[tuple[int, Pixels, str]]:
    """(number, pixels, sha256 of the file), decoded by threads a few batches ahead."""

    def load(i: int) -> tuple[int, Pixels, str]:
        raw = source.read(i)
        return i, decode_image(raw, source.paths[i], encoding.resolution), hashlib.sha256(raw).hexdigest()

    waiting: deque[Future[tuple[int, Pixels, str]]] = deque()
    numbers = iter(block)
    with ThreadPoolExecutor() as pool:
        for i in islice(numbers, 4 * encoding.batch):
            waiting.append(pool.submit(load, i))
        while waiting:
            result = waiting.popleft()
            for i in islice(numbers, 1):
                waiting.append(pool.submit(load, i))
            bar.update(1)
            try:
                yield result.result()
            except Unreadable as error:
                bad.append(str(error))


def _check_bad(bad: list[str], total: int, encoding: Encoding) -> None:
    if len(bad) > encoding.max_bad_share * total:
        raise UserError(
            f"{len(bad)} of {total} images cannot be read, more than --max-bad-share {encoding.max_bad_share:g} "
            f"allows; the first: {bad[0]}"
        )


def _check_classes(source: ImageList, unreadable: Counter[int]) -> None:
    """`unreadable`: images by class. Raises UserError if none of a class can be read, as it would never be trained."""
    total = Counter(source.labels)
    for label, name in enumerate(source.classes):
        if unreadable[label] == total[label]:
            first = source.paths[source.labels.index(label)]
            raise UserError(
                f"none of the {total[label]} images of class {name!r} can be read, such as {first!r}; repair them, or "
                "remove the class"
            )


def _finish(source: ImageList, out: Path, plan: dict[str, Any], encoding: Encoding, task: Task) -> None:
    """Writes the manifest if all shards exist: the plan, the shards with sizes and sha256, the latents' shape, exact
    channel statistics, and the images left out."""
    num_shards = len(_blocks(plan["count"], encoding))
    indices = [read_index(out / shard_name(number)) for number in range(num_shards)]
    missing = sum(
        index is None or index.plan != _plan_sha256(plan) or not (out / shard_name(n)).is_file()
        for n, index in enumerate(indices)
    )
    if missing:
        others = f"left to other tasks (this was number {task.number} of {task.count}, counted from 0)"
        print(f"{missing} of {num_shards} shards at {out} are still missing, {others}")
        return
    complete = [index for index in indices if index is not None]
    skipped = [line for index in complete for line in index.skipped]
    _check_bad(skipped, plan["count"], encoding)
    unreadable = Counter(source.labels)
    for index in complete:
        unreadable.subtract(index.labels.tolist())
    _check_classes(source, unreadable)
    shards = [
        {
            "name": shard_name(n),
            "count": len(index.labels),
            "bytes": index.size,
            "sha256": index.sha256,
            "index_sha256": sha256_of(index_path(out / shard_name(n))),
        }
        for n, index in enumerate(complete)
    ]
    channels, side, _ = complete[0].shape
    manifest = {**plan, "source_count": plan["count"], "count": sum(len(index.labels) for index in complete)}
    manifest |= {"latent_channels": channels // 2, "latent_size": side, "skipped": skipped, "shards": shards}
    mean, deviation = channel_statistics(LatentShards(out, manifest))
    manifest |= {"channel_mean": mean, "channel_std": deviation}
    write_manifest(out, manifest)
    remove_temporary_files(out)
    left_out = f", {len(skipped)} unreadable images left out (listed in manifest.json)" if skipped else ""
    classes = f"of {len(plan['classes'])} classes" if plan["classes"] else "without classes"
    print(
        f"{manifest['count']} images {classes} in {num_shards} shards at {out}{left_out}{source.ignored}; "
        f"{channel_summary(manifest)}"
    )


def channel_statistics(shards: LatentShards) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (C,) of posterior samples over all images and pixels, unscaled."""
    means, squares = [], []
    with progress(shards.count, "sample", "statistics") as bar:
        for i in range(shards.count):
            mean, std = np.split(shards[i][0].astype(np.float64), 2)
            means.append(mean.mean(axis=(1, 2)))
            squares.append((mean**2 + std**2).mean(axis=(1, 2)))
            bar.update(1)
    centre = np.mean(means, axis=0)
    return centre.tolist(), np.sqrt(np.mean(squares, axis=0) - centre**2).tolist()


def precision_error(images: str, vae: Vae, exact: Vae, resolution: int, count: int = 8) -> str:
    """A sentence with the error of `vae` against `exact` on the first `count` readable images."""
    check_resolution(resolution, vae)
    source, decoded = open_images(images, labelled=False), list[Pixels]()
    for i in range(len(source.paths)):
        with suppress(Unreadable):
            decoded.append(decode_image(source.read(i), source.paths[i], resolution))
        if len(decoded) == count:
            break
    if not decoded:
        raise UserError(f"no image of {images!r} can be read")
    pixels = torch.from_numpy(np.stack(decoded))
    (mean, std), (exact_mean, exact_std) = (v.encode(pixels).chunk(2, dim=1) for v in (vae, exact))
    errors = [((a - b).norm() / b.norm()).item() for a, b in ((mean, exact_mean), (std, exact_std))]
    in_noise = ((mean - exact_mean).abs().mean() / exact_std.mean()).item()
    return (
        f"{vae.precision} against fp32 on {len(decoded)} images: relative error of mean {errors[0]:.2e}, of std "
        f"{errors[1]:.2e}; the mean moves by {in_noise:.2f} of a posterior standard deviation"
    )
