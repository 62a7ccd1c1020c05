"""Samples a trained model in few steps and measures the Frechet distance to real images.

    python tools/fid_eval.py --nfe 1                                  # the newest run under runs/
    python tools/fid_eval.py --checkpoint runs/digits --nfe 2 --save-npz
    python tools/fid_eval.py --images DIR --features F --reference DIR2 --out OUT    # any set of images

Writes OUT/metrics.json (an entry per protocol), OUT/grid_nfeK.png and, with --save-npz, OUT/samples_nfeK.npz
(ADM's layout). What is not given comes from the run's config.
"""

import argparse
import sys
from pathlib import Path

from mf_dist.errors import UserError, command_line


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=Path, help="run or step-N folder (default: the newest run under runs/)")
    parser.add_argument("--images", type=Path, help="measure this image folder instead of a model")
    parser.add_argument("--nfe", type=int, help="network calls per image (default 1)")
    parser.add_argument("--num-samples", type=int, help="images to generate")
    parser.add_argument("--labels", choices=("random", "balanced"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--ema", help="decay of the EMA to sample from")
    parser.add_argument("--features", help="folder of the feature network")
    parser.add_argument("--reference", help="folder of real images, or .npz with mu and sigma")
    parser.add_argument("--vae", help="folder or hub id of the VAE (default: the one the latents were made with)")
    parser.add_argument("--out", type=Path, help="default: eval/ in the run folder")
    parser.add_argument("--save-npz", action="store_true")
    args = parser.parse_args()
    if args.images:
        for name in ("checkpoint", "nfe", "num_samples", "labels", "seed", "ema", "vae", "save_npz"):
            if getattr(args, name):
                raise UserError(f"--images measures all of a folder: leave out --{name.replace('_', '-')}")
    args.nfe = 1 if args.nfe is None else args.nfe
    for name, low, high in (("nfe", 1, 10_000), ("num_samples", 1, 10_000_000), ("seed", 0, 2**63 - 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be from {low} to {high}, got {value}")
    if args.images and not (args.features and args.reference and args.out):
        raise UserError("--images needs --features, --reference and --out")
    return args


def measure_folder(args, device):
    from mf_dist.data.images import list_images
    from mf_dist.evaluate import folder_blocks, load_reference, measure
    from mf_dist.features import FeatureNetwork

    features = FeatureNetwork(args.features, device)
    reference = load_reference(args.reference, features)
    count = len(list_images(args.images).paths)
    blocks = folder_blocks(args.images, features.resolution)
    return measure(blocks, count, features, reference, {"images": str(args.images)}), args.out


def measure_model(args, device):
    from mf_dist.checkpoint import find_checkpoint, newest_run
    from mf_dist.evaluate import load_reference, measure_samples, save_npz
    from mf_dist.features import FeatureNetwork
    from mf_dist.generate import load_trained

    path = args.checkpoint or newest_run(Path("runs"))
    checkpoint = find_checkpoint(path)
    print(f"evaluating {checkpoint.folder}")
    trained = load_trained(checkpoint, args.ema, args.vae, device)
    defaults = trained.config.eval
    chosen = {name: getattr(args, name) or getattr(defaults, name) for name in ("features", "reference")}
    for name, value in chosen.items():
        if value is None:
            raise UserError(f"the run's config has no eval.{name}; give --{name}")
    features = FeatureNetwork(chosen["features"], device)
    reference = load_reference(chosen["reference"], features)
    count, labels = args.num_samples or defaults.num_samples, args.labels or defaults.labels
    seed = defaults.seed if args.seed is None else args.seed
    out = args.out or checkpoint.folder.parent.parent / "eval"
    out.mkdir(parents=True, exist_ok=True)
    measured = measure_samples(trained, args.nfe, count, labels, seed, features, reference, args.save_npz)
    trained.generator.grid(args.nfe, seed, out / f"grid_nfe{args.nfe}.png", trained.class_names)
    if args.save_npz:
        save_npz(measured, out / f"samples_nfe{args.nfe}.npz")
    return measured, out


@command_line
def main() -> None:
    args = parse()
    import torch

    from mf_dist.evaluate import record

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured, out = measure_folder(args, device) if args.images else measure_model(args, device)
    path = record(measured.entry, out)
    for key in ("metric", "value", "num_samples", "nfe", "sampler", "labels", "seed", "ema", "step", "reference"):
        if key in measured.entry:
            print(f"  {key:12} {measured.entry[key]}")
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
