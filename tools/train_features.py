"""Trains the small classifier whose features measure Frechet distances on small images.

    python tools/train_features.py --images data/digits --name digits --out mf_dist/assets/digits-features

writes OUT/config.json and OUT/model.safetensors; the printed accuracy is that on one image in five, held out.
"""

import argparse
import json
import sys

from mf_dist.runtime.atomic_files import write_atomic
from mf_dist.runtime.errors import UserError, command_line
from mf_dist.runtime.paths import expanded, expanded_path


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=expanded, required=True, help="image folder; sub-folders are classes")
    parser.add_argument("--name", required=True, help="the metric will be called fd_NAME")
    parser.add_argument("--out", type=expanded_path, required=True, help="the network's folder")
    parser.add_argument("--resolution", type=int, default=32, help="side of the square images (default 32)")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of 64 images (default 1500)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or args.resolution < 8:
        raise UserError("--steps must be at least 1, --resolution at least 8")
    if args.name.startswith("inception") or not args.name.isidentifier():
        raise UserError(f"--name {args.name!r} must be an identifier without the prefix inception")
    import numpy as np
    import torch
    from safetensors.torch import save

    from mf_dist.data.image_folder import list_images
    from mf_dist.data.images import load_image
    from mf_dist.data.labels import refuse_empty_classes
    from mf_dist.evaluation.features import WEIGHTS

    folder = list_images(args.images, [args.out])
    if not folder.classes:
        raise UserError(f"{args.images!r} has no class folders, and a classifier needs classes")
    refuse_empty_classes(folder.root, folder.labels, folder.classes)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(folder.paths)} images{folder.ignored}", flush=True)
    pixels = torch.from_numpy(np.stack([load_image(folder.root / p, args.resolution) for p in folder.paths]))
    labels = torch.tensor(folder.labels)
    g = torch.Generator().manual_seed(args.seed)
    shuffled = torch.randperm(len(labels), generator=g)
    held_out, kept = shuffled[: len(labels) // 5], shuffled[len(labels) // 5 :]
    network = fit(pixels[kept], labels[kept], len(folder.classes), args.steps, args.seed, g)
    with torch.no_grad():
        accuracy = (network(pixels[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    config = {"name": args.name, "resolution": args.resolution, "classes": len(folder.classes)}
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = save(network.state_dict())
    write_atomic(args.out / WEIGHTS, lambda file: file.write(weights))
    print(f"{args.out}: accuracy {accuracy:.1%} on {len(held_out)} held-out images")


def fit(pixels, labels, num_classes, steps, seed, g):
    """A new classifier trained by cross-entropy on batches of 64."""
    import torch
    import torch.nn.functional as F

    from mf_dist.evaluation.features import SmallClassifier
    from mf_dist.runtime.progress import progress

    with torch.random.fork_rng():  # torch initialises layers from the global generator
        torch.manual_seed(seed)
        network = SmallClassifier(num_classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    with progress(steps, "step", "train features") as bar:
        for _ in range(steps):
            rows = torch.randint(len(labels), (64,), generator=g)
            optimizer.zero_grad()
            F.cross_entropy(network(pixels[rows]), labels[rows], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
            bar.update()
    return network


if __name__ == "__main__":
    sys.exit(main())
