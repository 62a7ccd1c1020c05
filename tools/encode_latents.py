"""Turns images into latent shards for training.

    python tools/encode_latents.py --images data/digits --out data/digits-latents \\
        --vae mf_dist/assets/digits-vae --resolution 32
    python tools/encode_latents.py --images /data/imagenet/train --out data/imagenet256 \\
        --vae stabilityai/sd-vae-ft-mse --resolution 256
    torchrun --nproc_per_node=8 tools/encode_latents.py ...      # shard i by process i mod 8
    sbatch --array=0-9 slurm/encode_latents.sh ...               # shard i by task i mod 10, times its processes
    python tools/encode_latents.py ... --verify                  # the error of --precision against fp32, no shards

Images: a folder, a tar, or a folder of tars. Labels come from the first of these forms that is there; if none is, a
line says so before the work begins, and the dataset is unconditional:
    sub-folders   of a folder of images: a direct sub-folder is a class
    KEY.cls       beside every image KEY.jpg: the number of its class
    KEY.json      beside every image KEY.jpg: its "label", a number or a name
    folders       in tars: below the folders that all images share, each path has one more, which is the class
    tars          of which each image's name begins with its tar's, as n01_1.jpg in n01.tar: a tar is a class
Names are numbered in their order, as ImageNet's wnids are; numbers are used as they are.

Images are cut to the square ADM centre crop. Each shard holds a fixed block of the image list and is complete or
absent: the same command, with any number of processes, continues where it stopped. An image that cannot be read is left
out and listed in manifest.json.
"""

import argparse
import os
import sys

from mf_dist.fault_tolerance.tool_status import reports_status
from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.launch import rank_from_environment
from mf_dist.runtime.paths import expanded, expanded_path


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=expanded, required=True, help="image folder, .tar, or folder of tars")
    parser.add_argument("--out", type=expanded_path, help="the dataset's folder")
    parser.add_argument("--vae", type=expanded, required=True, help="folder or hub id of a diffusers AutoencoderKL")
    parser.add_argument("--resolution", type=int, required=True, help="side of the square crop in pixels")
    parser.add_argument("--shard-size", type=int, default=10_000, help="images per shard (default 10000)")
    parser.add_argument("--batch", type=int, default=32, help="images encoded together (default 32)")
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="precision of the VAE (default fp32)"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the VAE with torch.compile (default: on a GPU)",
    )
    parser.add_argument("--flip", action="store_true", help="also store each mirrored image, encoded by itself")
    parser.add_argument(
        "--max-bad-share", type=float, default=0.001, help="allowed share of unreadable images (default 0.001)"
    )
    parser.add_argument("--task", help="I/N: make shards I, I + N, ... (default: from torchrun or the SLURM job array)")
    parser.add_argument("--verify", action="store_true", help="compare --precision with fp32 on 8 images, and stop")
    args = parser.parse_args()
    if not (args.out or args.verify):
        raise UserError("--out FOLDER is needed: the folder of the dataset")
    for name in ("resolution", "shard_size", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.max_bad_share < 1:
        raise UserError(f"--max-bad-share must be in [0, 1), got {args.max_bad_share}")
    return args


def task_of(args):
    """(number, count) from --task, else from the SLURM job array and the launcher's rank combined."""
    if args.task is not None:
        number, slash, count = args.task.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise UserError(f"--task {args.task!r}: expected I/N with 0 <= I < N")
        return int(number), int(count)
    launched = rank_from_environment()
    number, count = array_task() if "SLURM_ARRAY_TASK_ID" in os.environ else (0, 1)
    return number * launched.world_size + launched.rank, count * launched.world_size


def array_task():
    """(number, count) of this task of a SLURM job array such as 0-7 or 10-40:10."""
    names = ("TASK_ID", "TASK_MIN", "TASK_MAX", "TASK_COUNT")
    values = {name: os.environ.get(f"SLURM_ARRAY_{name}", "") for name in names}
    if all(value.isdecimal() for value in values.values()):
        number, first, last, count = (int(value) for value in values.values())
        step = max(1, (last - first) // max(1, count - 1))
        if (last - first) == step * (count - 1) and (number - first) % step == 0:
            return (number - first) // step, count
    raise UserError(f"the job array {values} is not evenly spaced: submit 0-N, or give each task --task I/N")


@command_line
@reports_status
def main() -> None:
    args = parse()
    number, count = task_of(args)
    import torch

    from mf_dist.data.encode import Encoding, Task, encode_images, precision_error
    from mf_dist.runtime.compiler import require_compiler
    from mf_dist.runtime.distributed import choose_device
    from mf_dist.vae import Vae

    device = choose_device(rank_from_environment().local_rank)
    if device.type == "cpu":
        torch.set_num_threads(1)  # it affects a convolution's last bits, and the bytes of shards must not vary
    compiled = device.type == "cuda" if args.compile is None else args.compile
    if compiled:
        require_compiler(device, "give --no-compile")
    vae = Vae(args.vae, device, precision=args.precision, compiled=compiled)
    encoding = Encoding(args.resolution, args.shard_size, args.batch, args.flip, args.max_bad_share)
    if args.verify:
        print(precision_error(args.images, vae, Vae(args.vae, device), args.resolution))
        return
    encode_images(args.images, args.out, vae, encoding, Task(number, count))


if __name__ == "__main__":
    sys.exit(main())
