"""Times the data path: decoding images, and reading latents against WebDataset's own reader.

    python tools/bench/bench_data.py --images data/digits          # decode and crop, images/s per core
    python tools/bench/bench_data.py --samples 20000               # reading, on synthetic latents, warm cache
    python tools/bench/bench_data.py --index 1281167               # opening, shuffling, seeking at ImageNet's size

Each part runs in one process on one thread; rates are medians over --rounds, ratios are taken within a round. "read"
makes batches of moments and labels in random order; "whole" adds the random draws of a training step.
"""

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.figures import three_digits
from mf_dist.runtime.paths import expanded

BATCH = 256
RANKS, WORKERS = 8, 2


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=expanded, help="folder, .tar or folder of tars to decode")
    parser.add_argument("--resolution", type=int, default=256, help="side of the crop (default 256)")
    parser.add_argument("--samples", type=int, help="latents (8, 32, 32) fp16 to write and read")
    parser.add_argument("--index", type=int, help="samples of a synthetic dataset to open")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not (args.images or args.samples or args.index) or args.rounds < 1 or args.resolution < 1:
        raise UserError("give at least one of --images, --samples and --index; --rounds and --resolution at least 1")
    if args.samples and args.samples < BATCH or args.index and args.index < 1:
        raise UserError(f"--samples must be at least {BATCH}, a batch, and --index at least 1")
    return args


def bench_decode(args):
    """Images per second per core; for JPEGs also simplejpeg against Pillow, in time and pixels."""
    import io

    import numpy as np
    import simplejpeg
    from PIL import Image

    from mf_dist.data.image_tars import open_images
    from mf_dist.data.images import decode_image

    source = open_images(args.images, labelled=False)
    numbers = range(min(200, len(source.paths)))
    raw = [source.read(i) for i in numbers]
    forms = {"whole": lambda i: decode_image(raw[i], source.paths[i], args.resolution)}
    if all(data.startswith(b"\xff\xd8") for data in raw):
        forms |= {
            "simplejpeg": lambda i: simplejpeg.decode_jpeg(raw[i]),
            "Pillow": lambda i: np.asarray(Image.open(io.BytesIO(raw[i])).convert("RGB")),
        }
    seconds = {name: [] for name in forms}
    for _ in range(args.rounds):
        for name, form in forms.items():
            start = time.process_time()
            for i in numbers:
                form(i)
            seconds[name].append((time.process_time() - start) / len(raw))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    kib = sum(map(len, raw)) / len(raw) / 1024
    print(
        f"decode and crop to {args.resolution} px: {three_digits(1 / median['whole'])} images/s per core, "
        f"{1e3 * median['whole']:.2f} ms ({len(raw)} images of {kib:.0f} KiB)"
    )
    if len(forms) > 1:
        equal = sum(np.array_equal(forms["simplejpeg"](i), forms["Pillow"](i)) for i in numbers)
        print(
            f"decoding alone: simplejpeg {1e3 * median['simplejpeg']:.2f} ms, Pillow {1e3 * median['Pillow']:.2f} ms; "
            f"the same pixels in {equal} of {len(raw)}"
        )


def write_latents(folder, count, per_shard=5000):
    """Writes a dataset of random moments in the encoder's format."""
    import numpy as np

    from mf_dist.data.shard_writer import Record, write_shard
    from mf_dist.data.shards import FORMAT, index_path, read_index, shard_name, write_manifest
    from mf_dist.runtime.atomic_files import sha256_of

    g, shards = np.random.default_rng(0), []
    for number, first in enumerate(range(0, count, per_shard)):
        block = range(first, min(first + per_shard, count))
        moments = g.standard_normal((len(block), 8, 32, 32), dtype=np.float32).astype(np.float16)
        records = [Record(i, row, i % 1000, "synthetic", "") for i, row in zip(block, moments, strict=True)]
        write_shard(folder / shard_name(number), records, [], "synthetic")
        index = read_index(folder / shard_name(number))
        shards.append(
            {
                "name": shard_name(number),
                "count": len(block),
                "bytes": index.size,
                "sha256": index.sha256,
                "index_sha256": sha256_of(index_path(folder / shard_name(number))),
            }
        )
    write_manifest(folder, manifest(count, shards, FORMAT))


def manifest(count, shards, version):
    return {
        "format": version,
        "count": count,
        "latent_size": 32,
        "latent_channels": 4,
        "num_classes": 1000,
        "classes": [str(i) for i in range(1000)],
        "flip": False,
        "shards": shards,
        "vae": {"source": "none", "sha256": "", "scaling_factor": 0.18215},
    }


def reading_forms(folder, samples):
    """label -> a generator that reads all samples once, in batches, and yields the batch sizes."""
    import numpy as np
    import torch
    import webdataset

    from mf_dist.config.objectives import MeanFlowConfig
    from mf_dist.data.loader import LatentStream
    from mf_dist.data.shards import LatentShards

    shards = LatentShards(folder)
    order = np.random.default_rng(0).permutation(samples).tolist()

    def theirs():
        urls = [str(Path(folder) / shard["name"]) for shard in shards.manifest["shards"]]
        loader = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("moments.npy", "cls")
        for moments, labels in loader.batched(BATCH):
            yield len(torch.from_numpy(moments)) and len(labels)

    def read():
        for first in range(0, samples, BATCH):
            rows = order[first : first + BATCH]
            moments, labels = shards.batch(rows, [False] * len(rows))
            yield len(torch.from_numpy(moments)) and len(labels)

    def whole():
        stream = LatentStream(shards, 0, BATCH, MeanFlowConfig(), False)
        for first in range(0, samples - BATCH + 1, BATCH):
            yield len(stream[first].labels)

    return {"WebDataset, decoded, in order": theirs, "ours, read, random order": read, "ours, whole": whole}


def bench_reading(args):
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder), args.samples)
        forms = reading_forms(folder, args.samples)
        rates = {label: [] for label in forms}
        for _ in range(args.rounds + 1):  # the first fills the page cache
            for label, form in forms.items():
                start = time.process_time()
                count = sum(form())
                rates[label].append(count / (time.process_time() - start))
    theirs = next(iter(rates.values()))
    for label, values in rates.items():
        ratios = [a / b for a, b in zip(values[1:], theirs[1:], strict=True)]
        rate, ratio = statistics.median(values[1:]), statistics.median(ratios)
        print(
            f"{label:32}{rate:10,.0f} samples/s per core, {ratio:.2f} times WebDataset "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def write_index(folder, total, member=20480):
    """Writes a dataset of sparse files as tars, with synthetic offsets; returns the number of shards."""
    import numpy as np

    from mf_dist.data.shards import FORMAT, index_checksum, index_path, shard_name, write_manifest
    from mf_dist.runtime.atomic_files import sha256_of

    shards = []
    for number, first in enumerate(range(0, total, 10_000)):
        count = min(10_000, total - first)
        tar = folder / shard_name(number)
        with open(tar, "wb") as file:
            file.truncate(count * member)
        digest = hashlib.sha256(tar.name.encode()).hexdigest()
        columns = {
            "plan": np.array("x"),
            "numbers": np.arange(first, first + count, dtype=np.int32),
            "offsets": np.arange(count) * member + 1024,
            "flipped": np.zeros(0, np.int64),
            "labels": (np.arange(count) % 1000).astype(np.int32),
            "crc32": np.full(count, zlib.crc32(bytes(16384)), np.uint32),
            "flipped_crc32": np.zeros(0, np.uint32),
            "skipped": np.array([], np.str_),
            "shape": np.array([8, 32, 32]),
            "size": np.array(count * member),
            "sha256": np.array(digest),
        }
        np.savez(index_path(tar), **columns, checksum=np.array(index_checksum(columns)))
        shards.append(
            {
                "name": tar.name,
                "count": count,
                "bytes": count * member,
                "sha256": digest,
                "index_sha256": sha256_of(index_path(tar)),
            }
        )
    write_manifest(folder, manifest(total, shards, FORMAT))
    return len(shards)


def bench_index(args):
    from mf_dist.config.objectives import MeanFlowConfig
    from mf_dist.data.loader import LatentStream
    from mf_dist.data.shards import LatentShards
    from mf_dist.runtime import rng

    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as small:
        folder, num_shards = Path(name), write_index(Path(name), args.index)
        start = time.perf_counter()
        opened = LatentShards(folder)
        opening = time.perf_counter() - start
        start = time.perf_counter()
        rng.order(0, 1, args.index)
        shuffling = time.perf_counter() - start
        start = time.perf_counter()
        _ = LatentStream(opened, 0, 32, MeanFlowConfig(), False)[100 * args.index]
        seeking = time.perf_counter() - start
        del opened
        write_index(Path(small), 1000)
        index_alone = node_memory(folder) - node_memory(Path(small))
        print(
            f"{args.index:,} samples in {num_shards} shards: open {opening:.2f} s, shuffle {shuffling:.2f} s, "
            f"first batch after seeking 100 epochs {seeking:.2f} s; {RANKS} ranks with {WORKERS} loader processes "
            f"each hold {index_alone:.0f} MiB more than at 1000 samples"
        )


def node_memory(folder):
    """MiB by which the ranks of a node and their loader processes grow together, shared pages counted once."""
    import multiprocessing

    context, pipes = multiprocessing.get_context("fork"), []
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        process = context.Process(target=one_rank, args=(folder, rank, theirs))
        process.start()
        pipes.append((process, ours))
    grown = 0.0
    for sign in (-1, 1):  # before and after
        for _, pipe in pipes:
            pipe.recv()
        for _, pipe in pipes:
            pipe.send("measure")
            grown += sign * pipe.recv()
        for _, pipe in pipes:
            pipe.send("go on")
    for process, _ in pipes:
        process.join()
    return grown


def one_rank(folder, rank, pipe):
    """Opens the dataset and loads batches with loader processes; sends its memory in MiB before and after."""
    from torch.utils.data import DataLoader

    from mf_dist.config.objectives import MeanFlowConfig
    from mf_dist.data.loader import LatentStream
    from mf_dist.data.shards import LatentShards

    def send_memory():
        pipe.send("ready")
        pipe.recv()
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in ("self", *children)]
        kinds = ("Pss_Anon:", "Pss_Shmem:")  # not the tars' mapped pages: those are page cache
        pipe.send(sum(int(text.split(kind)[1].split()[0]) for text in rollups for kind in kinds) / 1024)
        pipe.recv()

    send_memory()
    stream = LatentStream(LatentShards(folder), 0, 32, MeanFlowConfig(), False)
    slots = range(32 * rank, 32 * (rank + 400 * RANKS), 32 * RANKS)
    batches = iter(DataLoader(stream, batch_size=None, sampler=slots, num_workers=WORKERS))
    for _ in range(100):
        next(batches)
    send_memory()


@command_line
def main() -> None:
    args = parse()
    if args.images:
        bench_decode(args)
    if args.samples:
        bench_reading(args)
    if args.index:
        bench_index(args)


if __name__ == "__main__":
    sys.exit(main())
