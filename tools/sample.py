"""Draws images from a trained model: one labelled picture, or any number of files.

    python tools/sample.py --class 3 --nfe 1 --out grid.png
    python tools/sample.py --checkpoint runs/digits --nfe 2 --seed 7 --out grid.png     # every class
    python tools/sample.py --count 5000 --classes 3,7 --out digits                      # digits/0003_0_000000.png, ...
    torchrun --nproc_per_node=8 tools/sample.py --count 50000 --classes all --out imagenet
    python tools/sample.py --guidance 8 --interval 0.42,0.62      # of networks that take guidance as an input
    python tools/sample.py --classes list                         # numbers and names

With --count, file CLASS_SEED_INDEX.png holds sample INDEX, whose class is the next of --classes in turn; the same
command continues where it stopped, with any number of processes, and a larger --count adds files.
"""

import argparse
import sys
from pathlib import Path

from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.outputs import refuse_inside
from mf_dist.runtime.paths import expanded, expanded_path
from mf_dist.sampling.options import add_sampling_options

SETTINGS = "samples.json"
"""In the folder of --count: what determines its images."""
END_OF_PNG = b"IEND\xaeB`\x82"


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint",
        type=expanded_path,
        help="folder of a run, checkpoint or model (default: the newest run under runs/)",
    )
    parser.add_argument(
        "--classes",
        "--class",
        action="append",
        metavar="all|list|3,7|NAME",
        help="numbers or a name, may be repeated; list: print them and stop (default: at most ten in a picture, all "
        "with --count)",
    )
    parser.add_argument("--nfe", type=int, default=1, help="network calls per image (default 1)")
    add_sampling_options(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", help="decay of the EMA to sample from (default: the run's)")
    parser.add_argument(
        "--vae", type=expanded, help="folder or hub id of the VAE (default: the one the latents were made with)"
    )
    parser.add_argument("--count", type=int, help="write that many images as files into the folder --out")
    parser.add_argument("--out", type=expanded_path, help="PNG to write (default grid.png), or with --count the folder")
    args = parser.parse_args()
    if not 1 <= args.nfe <= 10_000 or not 0 <= args.seed < 2**63:
        raise UserError("--nfe must be from 1 to 10000 and --seed from 0 to 2^63 - 1")
    if args.count is not None and (args.out is None or not 1 <= args.count <= 10_000_000):
        raise UserError("--count must be from 1 to 10000000 and needs a folder, --out")
    args.out = args.out or Path("grid.png")
    if args.count is None and (args.out.suffix.lower() != ".png" or args.out.is_dir()):
        raise UserError(f"--out {str(args.out)!r} must be a file name ending in .png, or a folder with --count")
    return args


def checkpoint_of(args):
    from mf_dist.checkpoint.reader import find_checkpoint
    from mf_dist.checkpoint.runs import newest_run

    checkpoint = find_checkpoint(args.checkpoint or newest_run(Path("runs")))
    refuse_inside([args.out], checkpoint.folder)
    return checkpoint


def list_classes(args):
    checkpoint = checkpoint_of(args)
    names = checkpoint.state.get("classes", [])
    count = checkpoint.state["config"]["model"]["num_classes"]
    unnamed = f"{count} classes, whose names are not known" if count else "without classes"
    print("\n".join(f"class {number}: {name}" for number, name in enumerate(names)) or unnamed)


def numbers_of(given, checkpoint):
    """Numbers of --classes; None if it is not given. A name may contain commas."""
    from mf_dist.sampling.model import class_number

    names, count = checkpoint.state["classes"], checkpoint.state["config"]["model"]["num_classes"]
    if given is None:
        return None
    if given == ["all"]:
        return list(range(max(1, count)))
    parts = [part for text in given for part in ([text] if text in names else text.split(","))]
    return [class_number(part, names, count) for part in parts]


def write_grid(args):
    from mf_dist.runtime.distributed import choose_device
    from mf_dist.sampling.generator import load_trained_model

    checkpoint = checkpoint_of(args)
    classes = numbers_of(args.classes, checkpoint)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    options = {"sampler": args.sampler, "guidance": args.guidance, "interval": args.interval}
    trained = load_trained_model(checkpoint, args.ema, args.vae, choose_device(0), **options)
    if warning := trained.generator.warning_of_few_steps(args.nfe):
        print(warning, file=sys.stderr)
    trained.generator.grid([args.nfe], args.seed, args.out, trained.class_names, classes)
    print(f"{trained.checkpoint.folder}, {args.nfe} network calls per image: {args.out}")


def write_files(args):
    """Each rank writes every world_size-th block of 50."""
    from mf_dist.runtime.distributed import process_group, raise_on_all_ranks
    from mf_dist.runtime.progress import progress
    from mf_dist.sampling.generator import BLOCK, load_trained_model

    with process_group() as ranks:
        with raise_on_all_ranks(ranks):
            checkpoint = checkpoint_of(args)
            precision = "tf32" if ranks.device.type == "cuda" else "fp32"
            options = {"sampler": args.sampler, "guidance": args.guidance, "interval": args.interval}
            trained = load_trained_model(checkpoint, args.ema, args.vae, ranks.device, precision, **options)
            classes = numbers_of(args.classes, checkpoint) or list(range(max(1, trained.generator.num_classes)))
            if ranks.is_rank_zero:
                claim(args, trained, classes)
                if warning := trained.generator.warning_of_few_steps(args.nfe):
                    print(warning, file=sys.stderr)
        blocks = range(ranks.rank, -(-args.count // BLOCK), ranks.world_size)
        own = sum(min(args.count, (k + 1) * BLOCK) - k * BLOCK for k in blocks)
        name = "sample" if ranks.world_size == 1 else f"sample on rank {ranks.rank}"
        with raise_on_all_ranks(ranks), progress(own, "img", name, shown=ranks.is_rank_zero) as bar:
            for number in blocks:
                bar.update(write_block(args, trained.generator, classes, number))
        if ranks.is_rank_zero:
            print(f"{args.count} images of {trained.checkpoint.folder}, {args.nfe} network calls each: {args.out}")


def claim(args, trained, classes):
    """Makes the folder, with a record of what its images are. Raises UserError if it is of others."""
    import json

    from mf_dist.runtime.atomic_files import write_json

    generator = trained.generator
    settings = {
        "checkpoint_sha256": trained.checkpoint.sha256,
        "ema": trained.ema_decay,
        "vae_sha256": generator.vae.sha256,
        "nfe": args.nfe,
        **generator.protocol,
        "classes": classes,
        "seed": args.seed,
        "precision": generator.precision,
    }
    path = args.out / SETTINGS
    args.out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if any(args.out.iterdir()):
            raise UserError(f"{args.out} holds files of another origin (no {SETTINGS}): choose another --out")
        write_json(path, settings)
    try:
        recorded = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: choose another --out") from None
    if differing := [key for key in settings if recorded.get(key) != json.loads(json.dumps(settings[key]))]:
        raise UserError(f"{args.out} holds images that differ in {differing[0]}: choose another --out")


def is_whole(path):
    """Whether a PNG is there to its last chunk; one that was cut off is written again."""
    return path.is_file() and path.read_bytes().endswith(END_OF_PNG)


def write_block(args, generator, classes, number):
    """Writes the missing files of a block, and returns its number of images."""
    import torch
    from PIL import Image

    from mf_dist.objectives.sampler import uniform_grid
    from mf_dist.runtime.atomic_files import write_atomic
    from mf_dist.runtime.precision import single_cpu_thread
    from mf_dist.sampling.generator import BLOCK

    indices = range(number * BLOCK, (number + 1) * BLOCK)
    labels = [classes[i % len(classes)] for i in indices]
    kept = [i for i in indices if i < args.count]
    paths = {i: args.out / f"{label:04d}_{args.seed}_{i:06d}.png" for i, label in zip(indices, labels, strict=True)}
    if all(is_whole(paths[i]) for i in kept):
        return len(kept)
    noise, _ = generator.draw(indices, "balanced", args.seed, args.nfe)
    with single_cpu_thread(generator.device):
        pixels = generator(noise, torch.tensor(labels), uniform_grid(args.nfe))
    for i in kept:
        image = Image.fromarray(pixels[i - indices.start].transpose(1, 2, 0))
        write_atomic(paths[i], lambda file, image=image: image.save(file, format="PNG"))
    return len(kept)


@command_line
def main() -> None:
    args = parse()
    if args.classes == ["list"]:
        list_classes(args)
    elif args.count is None:
        write_grid(args)
    else:
        write_files(args)


if __name__ == "__main__":
    sys.exit(main())
